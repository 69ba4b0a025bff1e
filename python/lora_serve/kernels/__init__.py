"""LoRA operators and the tables and metadata that they read."""

from __future__ import annotations

from lora_serve.kernels.lora_metadata import LoRAMetadata, LoRASegment, build_lora_metadata
from lora_serve.kernels.lora_ops import add_lora_linear, lora_expand, lora_shrink
from lora_serve.kernels.lora_weights import LoRALayerTable, LoRALayerWeights, LoRASliceWeights

__all__ = [
    "LoRALayerTable",
    "LoRALayerWeights",
    "LoRAMetadata",
    "LoRASegment",
    "LoRASliceWeights",
    "add_lora_linear",
    "build_lora_metadata",
    "lora_expand",
    "lora_shrink",
]
