"""A small model's shape and its LoRA targets, without the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lora_serve.kernels import LoRALayerTable, LoRALayerWeights
from lora_serve.kernels.lora_weights import LoRASliceWeights
from lora_serve.layers.linear import LoRATarget
from lora_serve.testing.adapters import make_random_adapter, read_adapter_config, read_adapter_tensors

NUM_LAYERS = 4
MODEL_CONFIG: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": NUM_LAYERS,
}
_PACKED = {
    "self_attn": ((("q_proj", 32), ("k_proj", 16), ("v_proj", 16)), 24),
    "self_attn.o": ((("o_proj", 24),), 32),
    "mlp": ((("gate_proj", 40), ("up_proj", 40)), 24),
    "mlp.down": ((("down_proj", 24),), 40),
}


def make_targets() -> dict[str, LoRATarget]:
    """Targets with fresh tables for a decoder of `MODEL_CONFIG`."""
    targets = {}
    for layer in range(NUM_LAYERS):
        for block, (slices, in_features) in _PACKED.items():
            table = LoRALayerTable(tuple(width for _, width in slices), in_features)
            for index, (name, width) in enumerate(slices):
                path = f"model.layers.{layer}.{block.split('.')[0]}.{name}"
                targets[path] = LoRATarget(table, index, in_features, width)
    return targets


def tables_of(targets: dict[str, LoRATarget]) -> list[LoRALayerTable]:
    return list({id(target.table): target.table for target in targets.values()}.values())


def entries_of_slot(targets: dict[str, LoRATarget], slot: int) -> list[LoRALayerWeights | None]:
    return [table.get(slot) for table in tables_of(targets)]


def make_adapter(path: Path, **options: Any) -> Path:
    return make_random_adapter(path, MODEL_CONFIG, **options)


def expected_modules(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, LoRASliceWeights]:
    """What an adapter of `make_adapter` holds, by safetensors and plain torch: A [R, H] and B [R, O].

    For adapters with PEFT's own keys, without fused modules and without patterns.
    """
    config = read_adapter_config(path)
    tensors = read_adapter_tensors(path)
    modules = {}
    for key, a in tensors.items():
        if "_A" not in key:
            continue
        module = key.removeprefix("base_model.model.").split(".lora_")[0]
        b = tensors[key.replace("_A", "_B")]
        divisor = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
        modules[module] = LoRASliceWeights(
            (a.T if "embedding" in key else a).to(dtype).contiguous(),
            b.T.to(dtype).contiguous(),
            config["lora_alpha"] / divisor,
        )
    return modules


def num_exact_bytes(path: Path, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all matrices of an adapter."""
    return sum(weights.num_bytes for weights in expected_modules(path, dtype).values())


def copy_adapter(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
