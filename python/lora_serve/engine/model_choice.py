"""The executor of a configuration's model and device."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from lora_serve.common.config import EngineConfig

if TYPE_CHECKING:
    from lora_serve.executor.executor import Executor

logger = logging.getLogger(__name__)


def choose_device(device: str) -> str:
    """Give the device that a configuration's `device` stands for, and log what 'auto' became.

    Notes
    -----
    For the process that computes: 'auto' imports torch and asks the driver.
    """
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        logger.info("the device is cuda: torch finds a CUDA device (--device cpu computes on the CPU)")
        return "cuda"
    logger.info("the device is cpu: torch finds no CUDA device")
    return "cpu"


def make_model_executor(config: EngineConfig) -> Executor:
    """Load the model, and on CUDA warm it up; takes seconds to minutes.

    Parameters
    ----------
    config : EngineConfig
        With a device that `choose_device` gave.

    Raises
    ------
    InvalidArgumentError
        The configuration does not fit the model, or the model cannot be loaded.
    """
    if config.is_cuda:
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
