"""The real server over an engine whose executor computes nothing: for what the server itself costs.

Run as a program it is `lora-serve serve`, whose engine process takes its executor from here.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lora_serve.common.config import EngineConfig
from lora_serve.testing.oracle_executor import OracleExecutor, OracleOptions

if TYPE_CHECKING:
    from lora_serve.executor.executor import ExecutionResult
    from lora_serve.executor.sampling_state import SamplingState
    from lora_serve.scheduler import ExecutionPlan

VOCAB_SIZE = 1536
"""Of the demo's model, whose tokenizer is used."""
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
_STEP_VARIABLE = "LORA_SERVE_BENCH_STEP_MS"
_READY = re.compile(r"^lora-serve: serving .* at (http://\S+)$", re.MULTILINE)


class PacedOracle(OracleExecutor):
    """The oracle, each of whose steps takes some time, as if a device computed."""

    def __init__(self, options: OracleOptions, step_ms: float) -> None:
        super().__init__(options)
        self._step_s = step_ms / 1e3

    def run_plan(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> ExecutionResult:
        """Sleep for what is left of the step."""
        begin = time.perf_counter()
        result = super().run_plan(plan, states)
        time.sleep(max(0.0, self._step_s - (time.perf_counter() - begin)))
        return result


def make_executor(config: EngineConfig) -> PacedOracle:
    """The engine's executor; how long a step takes is in the environment."""
    options = OracleOptions(
        num_device_pages=4096,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=2048,
        vocab_size=VOCAB_SIZE,
    )
    return PacedOracle(options, float(os.environ[_STEP_VARIABLE]))


class OracleServer:
    """A server of our own: it answers inside the `with`, and is gone after it.

    Parameters
    ----------
    arguments
        What follows `lora-serve serve`, without host and port.
    step_ms
        How long a step of the engine takes at least.
    """

    def __init__(self, arguments: Sequence[str], step_ms: float) -> None:
        command = [sys.executable, __file__, "serve", *arguments, "--host", "127.0.0.1", "--port", "0"]
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, _STEP_VARIABLE: repr(step_ms)}
            )
        self.url = ""

    @property
    def pid(self) -> int:
        """The HTTP server's process."""
        return self._process.pid

    @property
    def engine_pid(self) -> int:
        """The engine's process, its only child."""
        (child,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii").split()
        return int(child)

    def __enter__(self) -> OracleServer:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.url:
            log = self._log.read_text(errors="replace")
            ready = _READY.search(log)
            if ready:
                self.url = ready[1]
            elif self._process.poll() is not None or time.monotonic() > deadline:
                self._stop()
                raise RuntimeError(f"the server does not answer; its log:\n{log}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self._log.read_text(errors="replace")[-4000:], file=sys.stderr)
        self._stop()
        self._folder.cleanup()

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> int:
    from lora_serve.cli.main import main as run
    from lora_serve.engine.engine_client import AsyncEngineClient
    from lora_serve.server import launch

    launch.AsyncEngineClient = partial(  # type: ignore[assignment, attr-defined]
        AsyncEngineClient, executor_factory="oracle_server:make_executor"
    )
    return run()


if __name__ == "__main__":
    sys.exit(main())
