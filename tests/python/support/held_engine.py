"""`lora-serve` whose engine process stops where a test wants it to; run as a module by `HoldableServer`."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

from lora_serve.cli.main import main
from lora_serve.common.config import EngineConfig
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.engine.step_loop import StepLoop
from lora_serve.executor.model_executor import ModelExecutor
from lora_serve.server import launch

STEPS_VARIABLE = "LORA_SERVE_TEST_STEPS"
"""Names a file; while it is there, the engine makes as many steps as its first word says, for each text."""
START_VARIABLE = "LORA_SERVE_TEST_START"
"""Names a file; while it is there, an engine process does not become ready."""


def make_executor(config: EngineConfig) -> ModelExecutor:
    """The model's executor, in an engine that looks at both files."""
    steps, start = (Path(os.environ[name]) for name in (STEPS_VARIABLE, START_VARIABLE))
    _limit_steps(steps)
    while start.exists():
        time.sleep(0.01)
    return ModelExecutor(config)


def _limit_steps(path: Path) -> None:
    step = StepLoop.step
    newest, last_step = "", 0

    def step_if_allowed(loop: StepLoop, now_us: int) -> None:
        nonlocal newest, last_step
        try:
            text = path.read_text()
        except FileNotFoundError:
            step(loop, now_us)
            return
        if text != newest:
            newest, last_step = text, loop.num_steps + int(text.split()[0])
        if loop.num_steps < last_step:
            step(loop, now_us)
        else:
            loop.is_stalled = True  # The engine's loop goes on: messages are read and answered.

    StepLoop.step = step_if_allowed  # type: ignore[method-assign]


if __name__ == "__main__":
    factory = "support.held_engine:make_executor"
    launch.AsyncEngineClient = partial(AsyncEngineClient, executor_factory=factory)  # type: ignore[misc]
    sys.exit(main())
