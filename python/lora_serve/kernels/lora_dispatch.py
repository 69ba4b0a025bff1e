"""Which implementation of the LoRA operators runs on which device: the one place that decides it."""

from __future__ import annotations

from functools import cache
from typing import Protocol

from torch import Tensor

from lora_serve.kernels import torch_lora
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_weights import LoRALayerTable


class LoRAImplementation(Protocol):
    """What an implementation gives. Shapes were checked, and the step has adapters."""

    def add_linear(self, y: Tensor, x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
        """See `add_lora_linear`, and `add_lora_logits`, where ``y`` is wider than ``x``."""

    def add_embedding(
        self, y: Tensor, token_ids: Tensor, table: LoRALayerTable, metadata: LoRAMetadata
    ) -> None:
        """See `add_lora_embedding`."""


@cache
def lora_implementation(device_type: str) -> LoRAImplementation:
    """The implementation for tensors on this type of device."""
    if device_type == "cuda":
        from lora_serve.kernels import cuda_lora

        return cuda_lora
    return torch_lora
