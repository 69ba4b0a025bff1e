"""The LoRA operators on CUDA: the layer's view of arena and tables, handed to the Triton kernels.

Imported only where a layer runs on CUDA, so that nothing else needs Triton.
"""

from __future__ import annotations

from functools import cache

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
    delta = LoRADelta(v, table, metadata)
    if FEW_TOKENS < len(x) <= _MOST_ASIDE and torch.cuda.is_current_stream_capturing():
        stream, aside = torch.cuda.current_stream(x.device), _aside(x.device)
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):
            triton_lora_shrink(v, x, table.arena, table, metadata)
        y = cuda_linear(x, weight, bias)
        stream.wait_stream(aside)
        return y, delta
    triton_lora_shrink(v, x, table.arena, table, metadata)
    return cuda_linear_beside_shrink(x, weight, bias), delta


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
