"""Runs `lora-serve serve` as a child process on this machine and stops it again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx

from lora_serve.common.errors import InternalError

HOST = "127.0.0.1"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 15.0
API_KEY_VARIABLE = "LORA_SERVE_API_KEY"
_READY = re.compile(r"^lora-serve: serving .* at (http://\S+)$", re.MULTILINE)


class ServerProcess:
    """A server of our own: started and healthy inside the `with`, gone after it.

    The child gets a process group of its own. So Ctrl-C reaches only this process, which then stops
    the server in order, and no process of the server (it has an engine process) can outlive the `with`.

    Parameters
    ----------
    arguments
        What follows `lora-serve serve`, without host and port.
    port
        TCP port on the loopback interface; 0 = one that is free when the server takes it.

    Attributes
    ----------
    url
        Where it serves; empty before it does.

    Raises
    ------
    InternalError
        On entering: the server ended, or was not healthy within `START_TIMEOUT_S` seconds; the message
        ends with the last lines of its log.
    """

    def __init__(self, arguments: Sequence[str], port: int = 0) -> None:
        self.url = ""
        self._command = [sys.executable, "-m", "lora_serve.cli.main", "serve", "--drain-timeout", "5"]
        self._command += [*arguments, "--host", HOST, "--port", str(port)]
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> ServerProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="lora-serve-demo-")
        # A key in the user's environment is meant for another server; this one is asked without a key.
        environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id; the engine is its child."""
        assert self._process is not None
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The file that gets what the server prints; it is deleted with the server."""
        assert self._folder is not None
        return Path(self._folder.name) / "server.log"

    def log_tail(self, num_lines: int = 30) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def wait(self) -> int:
        """Waits until the server ends by itself; gives its exit status."""
        assert self._process is not None
        return self._process.wait()

    def terminate(self) -> int | None:
        """Asks the server to end; gives its exit status, None if it still runs after `STOP_TIMEOUT_S`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        return self._process.returncode

    def stop(self) -> None:
        """Asks the server to end, kills what is left of it after `STOP_TIMEOUT_S`; may be called twice."""
        process = self._process
        if process is not None:
            if process.poll() is None:
                self.terminate()
            # Usually nothing is left of the group by now.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise InternalError(f"the server ended with status {status}; its log:\n{self.log_tail()}")
            ready = _READY.search(self.log_path.read_text(errors="replace"))
            if ready and _is_healthy(ready[1]):
                self.url = ready[1]
                return
            time.sleep(0.1)
        raise InternalError(
            f"the server was not healthy within {START_TIMEOUT_S:.0f} s; its log:\n{self.log_tail()}"
        )


def _is_healthy(url: str) -> bool:
    try:
        # trust_env=False: a proxy from the environment must not be asked for the loopback interface.
        return httpx.get(f"{url}/health", trust_env=False, timeout=5.0).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
