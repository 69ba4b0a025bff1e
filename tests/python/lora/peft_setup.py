"""A small model's LoRA targets with embeddings and fused modules, and reads of adapters into blocks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.adapter_setup import MODEL_CONFIG, NUM_LAYERS, make_targets
from lora_serve.kernels import LoRALayerTable
from lora_serve.kernels.lora_weights import LoRASliceWeights
from lora_serve.layers.linear import LoRAKind, LoRATarget
from lora_serve.lora.adapter_layout import AdapterLayout, view_modules
from lora_serve.lora.peft_adapter import CheckedAdapter, check_peft_adapter
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.lora.peft_reader import read_into
from lora_serve.testing.adapters import make_random_adapter

VOCAB_SIZE = 48
FULL_CONFIG: dict[str, Any] = {**MODEL_CONFIG, "vocab_size": VOCAB_SIZE}
HIDDEN = MODEL_CONFIG["hidden_size"]
FUSED = {
    f"model.layers.{layer}.{fused}": tuple(f"model.layers.{layer}.{member}" for member in members)
    for layer in range(NUM_LAYERS)
    for fused, members in {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }.items()
}


def make_full_targets() -> dict[str, LoRATarget]:
    """Those of `make_targets`, embed_tokens and lm_head."""
    embedding = LoRATarget(
        LoRALayerTable((HIDDEN,), VOCAB_SIZE, is_embedding=True), 0, VOCAB_SIZE, HIDDEN, LoRAKind.EMBEDDING
    )
    logits = LoRATarget(LoRALayerTable((VOCAB_SIZE,), HIDDEN), 0, HIDDEN, VOCAB_SIZE, LoRAKind.LOGITS)
    return {**make_targets(), "model.embed_tokens": embedding, "lm_head": logits}


def make_full_adapter(path: Path, **options: Any) -> Path:
    return make_random_adapter(path, FULL_CONFIG, **options)


def check(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    *,
    max_lora_rank: int = 64,
    targets: dict[str, LoRATarget] | None = None,
    **options: Any,
) -> CheckedAdapter:
    limits = AdapterLimits(max_lora_rank=max_lora_rank, dtype=dtype)
    return check_peft_adapter(
        str(path), targets or make_full_targets(), limits, **{"fused": FUSED, **options}
    )


def new_block(layout: AdapterLayout) -> Tensor:
    """A block of 0xAA bytes, so that what nobody writes shows."""
    return torch.full((layout.num_bytes,), 0xAA, dtype=torch.uint8)


def read_block(
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    threads: ThreadPoolExecutor | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
    **options: Any,
) -> tuple[AdapterLayout, Tensor, str]:
    """Layout, block and digest of an adapter."""
    with check(path, dtype, **options) as checked:
        block = new_block(checked.layout)
        digest = read_into(checked, block, threads=threads, is_cancelled=is_cancelled)
    return checked.layout, block, digest


def read_modules(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, LoRASliceWeights]:
    layout, block, _ = read_block(path, dtype)
    return view_modules(layout, block, make_full_targets(), dtype)


def digest_of(path: Path, dtype: torch.dtype = torch.float32) -> str:
    return read_block(path, dtype)[2]
