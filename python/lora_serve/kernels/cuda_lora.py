"""The LoRA operators on CUDA: the layer's view of arena and tables, handed to the Triton kernels.

Imported only where a layer runs on CUDA, so that nothing else needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from lora_serve.kernels._triton import MOST_EARLY_LORA_ROWS, can_launch_early, launches_early
from lora_serve.kernels.cuda_linear import cuda_linear, cuda_linear_beside_shrink
from lora_serve.kernels.lora_delta import FEW_TOKENS, MOST_TOKENS_BESIDE, LoRADelta
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_weights import LoRALayerTable
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import (
    make_shrunk,
    triton_add_lora_embedding,
    triton_add_lora_linear,
)
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink
from lora_serve.kernels.triton_lora_tiles import DECODE_TOKENS

_MOST_ASIDE = 512
_MOST_EXPANDED_FEATURES = 8192
"""Up to so many output features, a delta in memory costs less than an expand in the next kernel."""
_LARGE_RANK = 32
_LEFT, _LEFT_TO_LARGE_RANKS = 1 / 8, 1 / 6
"""Share of the multiprocessors that a product leaves to the expand into the residual stream; the larger one
for more than `DECODE_TOKENS` rows where adapters may have a rank above `_LARGE_RANK`. The product loses 0 to
5% by it: half of the multiprocessors read its weights nearly as fast as memory gives them.
"""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: LoRALayerTable, metadata: LoRAMetadata
) -> tuple[Tensor, LoRADelta]:
    """Give a layer's base product, and what the adapters add; see :func:`lora_serve.layers.ops.lora_linear`.

    Notes
    -----
    The shrink comes before the base product, and the two run side by side: for few rows by early launches,
    for more of them in a CUDA graph on two streams. Where it pays, the expand follows the shrink there, into
    memory of its own. A prefill fills the device with any of them.
    """
    v = make_shrunk(x, table.num_slices, table.tables.max_rank)
    shrink = partial(triton_lora_shrink, v, x, table.arena, table, metadata)
    if not _fits_beside(x) or len(weight) > _MOST_EXPANDED_FEATURES:
        return _linear_beside(shrink, x, weight, bias), LoRADelta(v, table, metadata)
    expanded = x.new_empty(len(x), len(weight), dtype=torch.float32)

    def shrink_and_expand() -> None:
        shrink()
        triton_lora_expand(
            *(expanded, v, table.arena, table, metadata),
            output_slices=table.output_slices,
            add_inputs=False,
            rounds_v_as_arena=True,
        )

    y = _linear_beside(shrink_and_expand, x, weight, bias)
    return y, LoRADelta(v, table, metadata, expanded)


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
    wants_more = len(x) > DECODE_TOKENS and table.tables.max_rank > _LARGE_RANK
    share = _LEFT_TO_LARGE_RANKS if wants_more else _LEFT
    left = int(share * _num_multiprocessors(x.device)) if _fits_beside(x) else 0
    return _linear_beside(partial(add_linear, residual, x, table, metadata), x, weight, bias, left)


def _fits_beside(x: Tensor) -> bool:
    """Whether a product of these rows leaves the device to both halves of a delta.

    It does not depend on how kernels are launched: captured in a graph or not, a step has the same bits.
    """
    return FEW_TOKENS < len(x) <= MOST_TOKENS_BESIDE and x.element_size() == 2 and can_launch_early(x)


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _linear_beside(
    launch: Callable[[], None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiprocessors_left: int = 0,
) -> Tensor:
    """Give ``x W^T + b``, and run what `launch` does with x beside it where that is possible.

    Of two kernels that wait for x, the one that starts first gets its multiprocessors at once, and the other
    takes what is left. The product takes nearly all there are, so it must be the other one.
    """
    if not (FEW_TOKENS < len(x) <= _MOST_ASIDE and torch.cuda.is_current_stream_capturing()):
        launch()
        return cuda_linear_beside_shrink(x, weight, bias, multiprocessors_left)
    y = x.new_empty(len(x), len(weight))
    stream, is_early = torch.cuda.current_stream(x.device), launches_early(x, MOST_EARLY_LORA_ROWS)
    aside = _aside(x.device, priority=0 if is_early else -1)
    aside.wait_stream(stream)
    if is_early:  # On this stream, then: an early launch is one behind a kernel of the same stream.
        launch()
        with torch.cuda.stream(aside):
            cuda_linear(x, weight, bias, y, multiprocessors_left)
    else:
        with torch.cuda.stream(aside):
            launch()
        cuda_linear(x, weight, bias, y, multiprocessors_left)
    stream.wait_stream(aside)
    return y


@cache
def _aside(device: torch.device, priority: int) -> torch.cuda.Stream:
    """A second stream; programs of priority -1 go before those of 0."""
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]


def add_delta(y: Tensor, delta: LoRADelta) -> None:
    """Add what `linear` has left over to its ``y`` [T, sum(O_s)], in place; always from its v."""
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
