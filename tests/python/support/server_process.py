"""A real server in a process of its own, for tests over HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import httpx

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
_READY = re.compile(r"^lora-serve: serving .* at (http://\S+)$", re.MULTILINE)


class ServerProcess:
    """`lora-serve serve` on a free loopback port and the CPU: healthy inside the `with`, gone after it.

    Parameters
    ----------
    *arguments : str or Path
        What follows `lora-serve serve`, without host and port.
    environment : mapping or None
        Variables to add to those of this process.
    """

    def __init__(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
        # Streams that a test leaves open are not waited for for long; a test's own options come later.
        self._command = [sys.executable, "-m", "lora_serve.cli.main", "serve", "--drain-timeout", "5"]
        self._command += ["--device", "cpu"]
        self._command += [*map(str, arguments), "--host", "127.0.0.1", "--port", "0"]
        paths = os.pathsep.join(path for path in sys.path if path)
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(environment or {})}
        self._folder = tempfile.TemporaryDirectory(prefix="lora-serve-test-")
        self._log_path = Path(self._folder.name) / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._whole_log = ""
        self.url = ""

    def __enter__(self) -> ServerProcess:
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(f"--- log of the server ---\n{self.log()}")
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id; the engine is its child."""
        assert self._process is not None
        return self._process.pid

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.url.rsplit(":", 1)[1])

    def log(self) -> str:
        """What the server has printed."""
        if self._log_path.exists():
            self._whole_log = self._log_path.read_text(errors="replace")
        return self._whole_log

    def http(self, **options: object) -> httpx.Client:
        """A client of this server; a proxy of the environment is not asked for the loopback interface."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=60.0, **options)  # type: ignore[arg-type]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the server; give its exit status, negative when it had to be killed. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            status = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        self.log()
        self._folder.cleanup()
        return status

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            ready = _READY.search(self.log())
            if ready:
                self.url = ready[1]
                with self.http() as http:
                    http.get("/health").raise_for_status()
                return
            status = self._process.poll()
            if status is not None:
                raise AssertionError(f"the server ended with status {status}; its log:\n{self.log()}")
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready in {START_TIMEOUT_S:.0f} s; its log:\n{self.log()}")
