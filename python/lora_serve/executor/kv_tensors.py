"""The memory that KV pages stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.layers.attention import KVLayer
from lora_serve.models.config import ModelConfig

_GIB = 2**30


def page_num_bytes(model: ModelConfig, page_size: int) -> int:
    """Bytes of one page over all layers, keys and values."""
    elements = 2 * model.num_layers * page_size * model.num_kv_heads * model.head_dim
    return elements * model.dtype.itemsize


def choose_num_device_pages(config: EngineConfig, model: ModelConfig) -> int:
    """Pages to allocate: `num_device_pages`, or what `kv_memory_gb` (GiB) holds.

    Raises
    ------
    InvalidArgumentError
        `kv_memory_gb` does not hold a page.
    """
    if config.num_device_pages is not None:
        return config.num_device_pages
    num_bytes = page_num_bytes(model, config.page_size)
    num_pages = int(config.kv_memory_gb * _GIB) // num_bytes
    if num_pages < 1:
        raise InvalidArgumentError(
            f"kv_memory_gb is {config.kv_memory_gb} but one page of {config.page_size} tokens takes "
            f"{num_bytes / _GIB:.6f} GiB; raise --kv-memory-gb or lower --page-size"
        )
    return num_pages


def choose_num_host_pages(config: EngineConfig, model: ModelConfig) -> int:
    """Pages of the host tier: what `kv_host_memory_gb` (GiB) holds, 0 for none.

    Raises
    ------
    InvalidArgumentError
        `kv_host_memory_gb` is above 0 and does not hold a page.
    """
    num_bytes = page_num_bytes(model, config.page_size)
    num_pages = int(config.kv_host_memory_gb * _GIB) // num_bytes
    if config.kv_host_memory_gb > 0 and num_pages < 1:
        raise InvalidArgumentError(
            f"kv_host_memory_gb is {config.kv_host_memory_gb} but one page of {config.page_size} tokens "
            f"takes {num_bytes / _GIB:.6f} GiB; raise --kv-host-memory-gb, or set it to 0 for no host tier"
        )
    return num_pages


def choose_max_model_len(config: EngineConfig, model: ModelConfig, num_device_pages: int) -> int:
    """Longest request in tokens: as configured, else the lesser of the model's and what the pages hold.

    Raises
    ------
    InvalidArgumentError
        `max_model_len` is given and is more than the model or the pages can do.
    """
    pool_len = num_device_pages * config.page_size
    if config.max_model_len is None:
        chosen = min(model.max_model_len, pool_len)
        if chosen < 2:
            raise InvalidArgumentError(
                f"{num_device_pages} KV pages of {config.page_size} tokens hold {pool_len} tokens but a "
                "request needs at least 2; raise --num-device-pages or --kv-memory-gb"
            )
        return chosen
    if config.max_model_len > model.max_model_len:
        raise InvalidArgumentError(
            f"max_model_len is {config.max_model_len} but the model was made for at most "
            f"{model.max_model_len} tokens; lower --max-model-len"
        )
    if config.max_model_len > pool_len:
        raise InvalidArgumentError(
            f"max_model_len is {config.max_model_len} but the {num_device_pages} KV pages of "
            f"{config.page_size} tokens hold {pool_len}; lower --max-model-len, or raise --num-device-pages "
            "or --kv-memory-gb"
        )
    return config.max_model_len


def allocate_kv_layers(
    model: ModelConfig, num_device_pages: int, page_size: int, device: torch.device
) -> list[KVLayer]:
    """Zeroed KV tensors, one pair a layer.

    Returns
    -------
    list of KVLayer
        [num_layers]; keys and values each [num_device_pages, page_size, num_kv_heads, head_dim] in the
        model's dtype. Zeroed, so that two runs are equal even where something read what was never written.
    """
    shape = (num_device_pages, page_size, model.num_kv_heads, model.head_dim)
    return [
        KVLayer(
            k=torch.zeros(shape, dtype=model.dtype, device=device),
            v=torch.zeros(shape, dtype=model.dtype, device=device),
        )
        for _ in range(model.num_layers)
    ]


def allocate_host_block(model: ModelConfig, num_host_pages: int, page_size: int) -> Tensor:
    """Zeroed memory of the host tier, one contiguous block.

    Returns
    -------
    Tensor
        [num_host_pages, num_layers, 2, page_size, num_kv_heads, head_dim] of the model's dtype on the CPU;
        keys before values. Page after page, unlike the device's tensors: all of a page lies together, so that
        a copy moves few large pieces. Zeroed, so that the memory is really there before the first request.

    Raises
    ------
    InvalidArgumentError
        The machine does not give that much memory.
    """
    shape = (num_host_pages, model.num_layers, 2, page_size, model.num_kv_heads, model.head_dim)
    try:
        return torch.zeros(shape, dtype=model.dtype)
    except RuntimeError as error:
        num_bytes = num_host_pages * page_num_bytes(model, page_size)
        raise InvalidArgumentError(
            f"the host tier of {num_host_pages} KV pages takes {num_bytes / _GIB:.3f} GiB, which this "
            f"machine does not give ({error}); lower --kv-host-memory-gb"
        ) from error
