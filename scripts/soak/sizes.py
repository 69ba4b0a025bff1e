"""How large a soak is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_serve.cli.bench.generated_adapters import GeneratedAdapters
from lora_serve.common.config import EngineConfig
from lora_serve.models.shapes import write_model_shape
from lora_serve.testing.models import make_random_model

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class SoakSizes:
    """How large a soak is.

    Parameters
    ----------
    num_clients, max_num_seqs
        Requests that are there at any time, and those of them that run.
    max_num_batched_tokens, num_device_pages, kv_host_memory_gb
        As in EngineConfig; the pages are too few for all that runs, so that some is preempted.
    min_prompt_tokens, max_prompt_tokens, max_output_tokens
        Lengths: logarithmically uniform, and uniform from 1 on.
    num_adapters, lora_ranks
        Names of adapters, and the ranks that take turns. Each name has two contents of different rank.
    num_device_adapters, num_host_adapters
        How many of average size the device and the host hold.
    change_interval_s, sample_interval_s
        Between two changes of adapters, and between two looks at the memory.
    num_checked_answers
        Greedy answers that are checked at the end.
    least_answers
        The load does not end before there are as many, however slow the machine is.
    """

    num_clients: int = 96
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 4096
    num_device_pages: int = 2400
    kv_host_memory_gb: float = 6.0
    min_prompt_tokens: int = 16
    max_prompt_tokens: int = 2000
    max_output_tokens: int = 300
    num_adapters: int = 16
    lora_ranks: tuple[int, ...] = (8, 16, 32, 64)
    num_device_adapters: float = 7.0
    num_host_adapters: float = 12.0
    change_interval_s: float = 0.5
    sample_interval_s: float = 3.0
    num_checked_answers: int = 32
    least_answers: int = 1000


SMALLEST = SoakSizes(
    num_clients=8,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    num_device_pages=32,
    kv_host_memory_gb=0.001,
    min_prompt_tokens=4,
    max_prompt_tokens=60,
    max_output_tokens=24,
    num_adapters=5,
    lora_ranks=(2, 3, 8),
    num_device_adapters=2.5,
    num_host_adapters=4.0,
    change_interval_s=0.05,
    sample_interval_s=0.1,
    num_checked_answers=8,
    least_answers=60,
)


def make_model(sizes: SoakSizes, shape: str, folder: Path) -> Path:
    """Write the model: of a published one's shape, or a tiny one."""
    if sizes is not SMALLEST:
        return write_model_shape(shape, folder)
    make_random_model(folder, "Qwen3ForCausalLM", dtype=model_dtype())
    return folder


def model_dtype() -> str:
    """Of the models that `make_model` writes on this machine: FlashInfer wants 16 bits."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def make_contents(sizes: SoakSizes, adapters: GeneratedAdapters) -> dict[str, list[Path]]:
    """Write the adapters; give the two contents of each name."""
    num_ranks = len(sizes.lora_ranks)
    per_rank = -(-2 * sizes.num_adapters // num_ranks)
    by_rank = [adapters.paths(rank, per_rank) for rank in sizes.lora_ranks]
    contents = [paths[index] for index in range(per_rank) for paths in by_rank]
    return {f"adapter-{i}": contents[2 * i : 2 * i + 2] for i in range(sizes.num_adapters)}


def make_config(sizes: SoakSizes, model: Path, adapters: GeneratedAdapters) -> EngineConfig:
    """An engine on which everything is scarce."""
    is_smallest = sizes is SMALLEST
    settings: dict[str, Any] = {"page_size": 4} if is_smallest else {"load_format": "dummy"}
    num_bytes = [adapters.num_bytes(rank) for rank in sizes.lora_ranks]
    average_gb = sum(num_bytes) / len(num_bytes) / _GIB
    largest_gb = max(num_bytes) / _GIB
    return EngineConfig(
        model=str(model),
        device="cuda" if torch.cuda.is_available() else "cpu",
        num_device_pages=sizes.num_device_pages,
        kv_host_memory_gb=sizes.kv_host_memory_gb,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_prompt_tokens + sizes.max_output_tokens + 2,
        max_loras=8,
        max_lora_rank=max(sizes.lora_ranks),
        lora_memory_gb=max(1.1 * largest_gb, sizes.num_device_adapters * average_gb),
        lora_host_memory_gb=max(2.2 * largest_gb, sizes.num_host_adapters * average_gb),
        **settings,
    )
