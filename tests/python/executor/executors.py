"""Executors of every kind under one name, so that the same tests run on each."""

from __future__ import annotations

import torch

from lora_serve.common.config import EngineConfig
from lora_serve.executor.cuda_executor import CudaExecutor
from lora_serve.executor.cuda_setup import CudaSetup, set_up_cuda
from lora_serve.executor.executor import Executor
from lora_serve.executor.kv_tensors import (
    allocate_kv_pool,
    choose_max_model_len,
    choose_num_device_pages,
    choose_num_host_pages,
    kv_layers_of,
)
from lora_serve.executor.model_executor import ModelExecutor
from lora_serve.executor.model_setup import load_configured_model, make_adapter_memory
from lora_serve.executor.transfers import make_page_transfers


def make_executor(kind: str, config: EngineConfig) -> Executor:
    """Make an executor: "cpu", "cuda", or "interpreted", which is CUDA's with the CPU as its device."""
    if kind == "cpu":
        return ModelExecutor(config)
    if kind == "cuda":
        return CudaExecutor(config, set_up_cuda(config))
    return CudaExecutor(config, set_up_cpu(config))


def set_up_cpu(config: EngineConfig) -> CudaSetup:
    """Fill the CPU as a CUDA device is filled, without decode graphs."""
    model = load_configured_model(config)
    num_device_pages = choose_num_device_pages(config, model.config)
    num_host_pages = choose_num_host_pages(config, model.config)
    pool = allocate_kv_pool(model.config, num_device_pages, config.page_size, torch.device("cpu"))
    return CudaSetup(
        device=torch.device("cpu"),
        model=model,
        lora=make_adapter_memory(config, model),
        kv_layers=kv_layers_of(pool),
        transfers=make_page_transfers(pool, num_host_pages),
        num_device_pages=num_device_pages,
        num_host_pages=num_host_pages,
        max_model_len=choose_max_model_len(config, model.config, num_device_pages),
        decode_graph_sizes=(),
    )
