"""LoRA operators and the tables and metadata that they read."""

from __future__ import annotations

from lora_serve.kernels.lora_delta import LoRADelta
from lora_serve.kernels.lora_embedding import add_lora_embedding, lora_lookup
from lora_serve.kernels.lora_logits import add_lora_logits
from lora_serve.kernels.lora_metadata import LoRAMetadata, build_lora_metadata
from lora_serve.kernels.lora_ops import add_lora_linear, lora_expand, lora_shrink
from lora_serve.kernels.lora_weights import LoRALayerTable, LoRALayerWeights, LoRASliceWeights

__all__ = [
    "LoRADelta",
    "LoRALayerTable",
    "LoRALayerWeights",
    "LoRAMetadata",
    "LoRASliceWeights",
    "add_lora_embedding",
    "add_lora_linear",
    "add_lora_logits",
    "build_lora_metadata",
    "lora_expand",
    "lora_lookup",
    "lora_shrink",
]
