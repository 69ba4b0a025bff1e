"""What the torch implementations of the LoRA operators share: the step's weights and the checks of rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_weights import LoRALayerTable, LoRALayerWeights


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that products of tensors of ``dtype`` are computed and accumulated in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def weights_by_segment(table: LoRALayerTable, metadata: LoRAMetadata) -> list[LoRALayerWeights]:
    """Give the weights of each segment's adapter, in the order of ``metadata.segments``.

    Raises
    ------
    LookupError
        A token names an adapter slot that holds no adapter.
    """
    step_weights: list[LoRALayerWeights] = []
    for segment in metadata.segments:
        weights = table.get(segment.slot)
        if weights is None:
            # Going on without the adapter would answer with the base model in its name.
            raise LookupError(
                f"adapter slot {segment.slot} holds no adapter but {segment.rows.shape[0]} tokens of this "
                f"step name it; installed slots are {table.installed_slots}"
            )
        step_weights.append(weights)
    return step_weights


def largest_rank(step_weights: Iterable[LoRALayerWeights]) -> int:
    """The largest rank of any module of the step on this layer; 0 where there is none."""
    return max((m.lora_rank for weights in step_weights for m in weights if m is not None), default=0)


def check_rows(name: str, tensor: Tensor, metadata: LoRAMetadata, features: int) -> None:
    """Raise ``ValueError`` unless a tensor is [T, features] of a floating-point dtype."""
    expected = (metadata.num_tokens, features)
    if tuple(tensor.shape) != expected or not tensor.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected {expected} of a "
            "floating-point dtype"
        )
