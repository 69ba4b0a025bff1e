"""Starts the engine's process, tells when it has ended, and ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

SHUTDOWN_TIMEOUT_S = 5.0
"""How long the process may take to end by itself, or after SIGTERM before it is killed."""
_POLL_INTERVAL_S = 0.01


def make_environment() -> dict[str, str]:
    """Give the engine's environment variables: this process's, and defaults for torch's CPU threads.

    Notes
    -----
    By default OpenMP threads spin while they wait for each other. As soon as another process needs a core
    (this one does), a step of a small model then takes seconds instead of milliseconds. So they sleep, and
    one core is left to the server. Variables that the user has set win.
    """
    num_cores = len(os.sched_getaffinity(0))
    defaults = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(max(1, num_cores - 1))}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class EngineProcessHandle:
    """The engine's process, as its parent sees it.

    Both processes hold one end of a socket pair on which nothing is ever sent. The system closes an end when
    its process ends, however that happens, and the other side sees it at once.

    Parameters
    ----------
    endpoint : str
        ZeroMQ address at which the client listens.
    executor_factory : str or None
        'module:function' that makes the executor; None = the model's.
    """

    def __init__(self, endpoint: str, executor_factory: str | None) -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.setblocking(False)
        command = [sys.executable, "-m", "lora_serve.engine.engine_process"]
        command += ["--endpoint", endpoint, "--parent-fd", str(theirs.fileno())]
        if executor_factory is not None:
            command += ["--executor-factory", executor_factory]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=make_environment(), stdin=subprocess.DEVNULL
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def watch(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` once, in the running event loop, when the process has ended."""
        loop = asyncio.get_running_loop()

        def notice() -> None:
            loop.remove_reader(self._ours)
            on_end()

        loop.add_reader(self._ours, notice)

    async def describe_end(self) -> str:
        """Say how the process ended, for a message; waits a moment for the system to know it."""
        await self._wait(1.0)
        code = self._process.poll()
        if code is None:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"

    async def end(self, grace_s: float) -> None:
        """Give the process `grace_s` seconds to end by itself, then ask it (SIGTERM), then kill it."""
        asyncio.get_running_loop().remove_reader(self._ours)
        if not await self._wait(grace_s):
            self._process.terminate()
            if not await self._wait(SHUTDOWN_TIMEOUT_S):
                self._process.kill()
        self._process.wait()
        self._ours.close()

    async def _wait(self, timeout_s: float) -> bool:
        for _ in range(int(timeout_s / _POLL_INTERVAL_S)):
            if self._process.poll() is not None:
                break
            await asyncio.sleep(_POLL_INTERVAL_S)
        return self._process.poll() is not None
