"""`lora-serve` whose engine process has a probe and, where asked for, a planted fault; run as a module."""

from __future__ import annotations

import sys
from functools import partial

from lora_serve.cli.main import main
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.server import launch

if __name__ == "__main__":
    factory = "support.life_cycle.probe:make_executor"
    launch.AsyncEngineClient = partial(AsyncEngineClient, executor_factory=factory)  # type: ignore[misc]
    sys.exit(main())
