"""One engine under test, with its adapters, in this process."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_serve.cli.bench.workloads import RequestMaker
from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.engine_process import STALLED_POLL_MS, settle_interpreter
from lora_serve.engine.messages import EngineOutput

logger = logging.getLogger(__name__)


class BenchEngine:
    """An engine that has loaded its adapters and waits for requests.

    Parameters
    ----------
    config
        What to run.
    adapters
        Directories; the first is the most popular one.

    Attributes
    ----------
    core : EngineCore
        The engine.
    names : list of str
        Its adapters, the most popular one first.
    requests : RequestMaker
        Makes its requests.
    start_s, load_adapters_s : float
        Seconds that the engine's start and the loads took.
    """

    def __init__(self, config: EngineConfig, adapters: Sequence[Path]) -> None:
        begin = time.perf_counter()
        self.core = EngineCore(config)
        self.start_s = time.perf_counter() - begin
        self.requests = RequestMaker(self.core.model_info.vocab_size)
        self.names = [f"adapter-{index}" for index in range(len(adapters))]
        begin = time.perf_counter()
        try:
            # The most popular one last: where not all of them fit, memory begins with those asked for most.
            for name, path in reversed(list(zip(self.names, adapters, strict=True))):
                load = self.core.load_adapter(name, str(path))
                while not load.done():
                    self.step()
                load.result()
        except BaseException:
            self.core.close()
            raise
        self.load_adapters_s = time.perf_counter() - begin
        settle_interpreter()

    def step(self, longest_wait_s: float = STALLED_POLL_MS / 1e3) -> list[EngineOutput]:
        """One step, and where it could do nothing a wait for whatever else the engine waits for.

        Raises
        ------
        LoraServeError
            The engine has stopped, or a request failed.
        """
        outputs = self.core.step()
        if outputs:
            for output in outputs:
                if output.error is not None:
                    raise output.error.to_exception()
        elif self.core.is_stalled:
            self.core.wait_for_news(min(longest_wait_s, STALLED_POLL_MS / 1e3))
        if self.core.failure is not None:
            raise InternalError(self.core.failure)
        return outputs

    def close(self) -> None:
        """Stop the engine; its memory is free after `free_memory`, once nobody has this object any more."""
        self.core.close()


def free_memory() -> None:
    """Let go of what engines that are gone have left, so that another one finds the device empty."""
    gc.unfreeze()  # `settle_interpreter` had taken them out of what is ever collected.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        logger.info("%.2f GiB of the device are in use", torch.cuda.memory_allocated() / 2**30)
