"""The executor of a configuration's model and device."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_serve.common.config import EngineConfig

if TYPE_CHECKING:
    from lora_serve.executor.executor import Executor


def make_model_executor(config: EngineConfig) -> Executor:
    """Load the model, and on CUDA warm it up; takes seconds to minutes.

    Raises
    ------
    InvalidArgumentError
        The configuration does not fit the model, or the model cannot be loaded.
    """
    if config.device.partition(":")[0] == "cuda":
        from lora_serve.executor.cuda_executor import CudaExecutor
        from lora_serve.executor.cuda_setup import set_up_cuda
        from lora_serve.executor.warm_up import warm_up

        setup = set_up_cuda(config)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(setup.close)
            executor = CudaExecutor(config, setup)
            on_failure.pop_all()
            on_failure.callback(executor.close)  # Of the setup as well, when its steps have ended.
            warm_up(executor, config)
            on_failure.pop_all()
        return executor
    from lora_serve.executor.model_executor import ModelExecutor

    return ModelExecutor(config)
