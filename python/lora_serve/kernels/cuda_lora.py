"""The LoRA operators on CUDA: the layer's view of arena and tables, handed to the Triton kernels.

Imported only where a layer runs on CUDA, so that nothing else needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from lora_serve.kernels.cuda_linear import cuda_linear, cuda_linear_beside_shrink
from lora_serve.kernels.lora_delta import FEW_TOKENS, LoRADelta
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_weights import LoRALayerTable
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import (
    make_shrunk,
    triton_add_lora_embedding,
    triton_add_lora_linear,
)
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink

_MOST_ASIDE = 512


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: LoRALayerTable, metadata: LoRAMetadata
) -> tuple[Tensor, LoRADelta]:
    """Give a layer's base product, and what the adapters add; see :func:`lora_serve.layers.ops.lora_linear`.

    Notes
    -----
    The shrink comes before the base product, and the two run side by side: for few rows by early launches,
    for more of them in a CUDA graph on a second stream. A prefill fills the device with either of them.
    """
    v = make_shrunk(x, table.num_slices, table.tables.max_rank)
    shrink = partial(triton_lora_shrink, v, x, table.arena, table, metadata)
    return _linear_beside(shrink, x, weight, bias), LoRADelta(v, table, metadata)


def linear_into(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: LoRALayerTable,
    metadata: LoRAMetadata,
) -> Tensor:
    """Give a layer's base product; see :func:`lora_serve.layers.ops.lora_linear_into`.

    Notes
    -----
    For more than `FEW_TOKENS` rows the expand adds to the residual stream, which nobody reads before the
    product is complete, so it runs beside the product, too.
    """
    if len(x) <= FEW_TOKENS:
        y, delta = linear(x, weight, bias, table, metadata)
        add_delta(y, delta)
        return y
    # Kept until the streams have met: memory that is free may be the product's.
    v = make_shrunk(x, table.num_slices, table.tables.max_rank)

    def add_to_residual() -> None:
        triton_lora_shrink(v, x, table.arena, table, metadata)
        add_delta(residual, LoRADelta(v, table, metadata))

    return _linear_beside(add_to_residual, x, weight, bias)


def _linear_beside(launch: Callable[[], None], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Give ``x W^T + b``, and run what is launched ahead of it, side by side where that is possible."""
    if FEW_TOKENS < len(x) <= _MOST_ASIDE and torch.cuda.is_current_stream_capturing():
        stream, aside = torch.cuda.current_stream(x.device), _aside(x.device)
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):
            launch()
        y = cuda_linear(x, weight, bias)
        stream.wait_stream(aside)
        return y
    launch()
    return cuda_linear_beside_shrink(x, weight, bias)


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The second stream. Its programs go first, or they would wait for the end of the base product."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def add_delta(y: Tensor, delta: LoRADelta) -> None:
    """Add what `linear` has left over to its ``y`` [T, sum(O_s)], in place."""
    table = delta.table
    triton_lora_expand(y, delta.v, table.arena, table, delta.metadata, output_slices=table.output_slices)


def add_linear(y: Tensor, x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
    """See `add_lora_linear`."""
    triton_add_lora_linear(
        y,
        x,
        table.arena,
        table,
        metadata,
        output_slices=table.output_slices,
        max_rank=table.tables.max_rank,
    )


def add_embedding(y: Tensor, token_ids: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
    """See `add_lora_embedding`."""
    triton_add_lora_embedding(
        y,
        token_ids,
        table.arena,
        table,
        metadata,
        vocab_size=table.in_features,
        max_rank=table.tables.max_rank,
    )
