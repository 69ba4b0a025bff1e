"""The memory that KV pages stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.layers.attention import KVLayer
from lora_serve.models.config import ModelConfig

_GIB = 2**30
_CPU_MEMORY_GB = 1.0
"""For KV pages where nothing is said and the device is not CUDA's."""


def page_num_bytes(model: ModelConfig, page_size: int) -> int:
    """Bytes of one page over all layers, keys and values."""
    elements = 2 * model.num_layers * page_size * model.num_kv_heads * model.head_dim
    return elements * model.dtype.itemsize


def choose_num_device_pages(config: EngineConfig, model: ModelConfig, free_bytes: int | None = None) -> int:
    """Pages to allocate: `num_device_pages`, else what `kv_memory_gb` (GiB) holds, else what fits.

    Parameters
    ----------
    config : EngineConfig
        The engine's.
    model : ModelConfig
        For the size of a page.
    free_bytes : int or None
        On a CUDA device: what `gpu_memory_utilization` leaves beside the weights, the adapters, the largest
        step, decode graphs and other users of the device; below 0 if they take more. None = another
        device, where a GiB is taken.

    Raises
    ------
    InvalidArgumentError
        Not one page fits.
    """
    if config.num_device_pages is not None:
        return config.num_device_pages
    num_bytes = page_num_bytes(model, config.page_size)
    page = f"one page of {config.page_size} tokens takes {num_bytes / _GIB:.6f} GiB"
    if config.kv_memory_gb is None and free_bytes is not None:
        if free_bytes < num_bytes:
            lacks = "leaves" if free_bytes >= 0 else "is exceeded, beside KV pages, by"
            raise InvalidArgumentError(
                f"gpu_memory_utilization is {config.gpu_memory_utilization}, which {lacks} "
                f"{abs(free_bytes) / _GIB:.3f} GiB, but {page}; raise --gpu-memory-utilization, or lower "
                "--lora-memory-gb, --max-num-batched-tokens, --max-num-seqs or --cuda-graph-sizes, or end "
                "what else uses it"
            )
        return free_bytes // num_bytes
    memory_gb = config.kv_memory_gb if config.kv_memory_gb is not None else _CPU_MEMORY_GB
    num_pages = int(memory_gb * _GIB) // num_bytes
    if num_pages < 1:
        raise InvalidArgumentError(
            f"kv_memory_gb is {memory_gb} but {page}; raise --kv-memory-gb or lower --page-size"
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


def allocate_kv_pool(
    model: ModelConfig, num_device_pages: int, page_size: int, device: torch.device
) -> Tensor:
    """Zeroed memory of all KV pages, one contiguous block.

    Returns
    -------
    Tensor
        [P, num_layers, 2, G, kv_heads, D] of the model's dtype: P pages of G tokens, keys before values. Page
        after page, so that a page is one piece of memory, which a copy engine moves at its full speed: layer
        after layer, a page of Qwen3-8B would be 72 pieces of 32 KiB. Zeroed, so that two runs are equal even
        where something read what was never written.

    Raises
    ------
    InvalidArgumentError
        The device does not give that much memory.
    """
    shape = (num_device_pages, model.num_layers, 2, page_size, model.num_kv_heads, model.head_dim)
    try:
        return torch.zeros(shape, dtype=model.dtype, device=device)
    except RuntimeError as error:
        num_bytes = num_device_pages * page_num_bytes(model, page_size)
        raise InvalidArgumentError(
            f"{num_device_pages} KV pages take {num_bytes / _GIB:.3f} GiB, which {device} does not give "
            f"({error}); lower --num-device-pages, --kv-memory-gb or --gpu-memory-utilization"
        ) from error


def kv_layers_of(pool: Tensor) -> list[KVLayer]:
    """The pages as each layer sees them: views of a pool of `allocate_kv_pool`, [num_layers]."""
    return [KVLayer(k=pool[:, layer, 0], v=pool[:, layer, 1]) for layer in range(pool.shape[1])]
