"""Both halves of a LoRA delta on Triton kernels: two launches a packed layer, or an embedding, or the logits.

What lies between the halves is scratch memory that all layers may share: it is written and read by launches
that follow each other on one stream, and no one looks at what an earlier layer has left there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels.lora_delta import MOST_TOKENS_BESIDE
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.skinny_linear import MAX_ROWS
from lora_serve.kernels.triton_lora_embedding import triton_lora_lookup
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink
from lora_serve.kernels.triton_lora_tiles import (
    TOKEN_CLASSES,
    LoRASlotTable,
    choose_num_parts,
    token_class,
)


def lora_scratch_elements(
    max_tokens: int, num_slices: int, in_features: int, max_rank: int, element_size: int = 2
) -> int:
    """fp32 elements of scratch memory that a layer needs for any step of at most `max_tokens` tokens.

    Parameters
    ----------
    max_tokens, num_slices, in_features, max_rank
        T, S, H and R, at their largest. An embedding has H = 1.
    element_size
        Bytes of a number of the model.
    """
    largest = 0
    for limit in TOKEN_CLASSES:
        tokens = min(limit, max_tokens)
        parts = choose_num_parts(limit, num_slices, in_features, max_rank, element_size)
        largest = max(largest, parts * num_slices * tokens * max_rank)
        if limit >= max_tokens:
            break
    return largest


def warm_up_token_counts(max_tokens: int) -> list[int]:
    """Numbers of tokens that compile all that steps of up to `max_tokens` tokens use, of any layer."""
    skinny = {2**power for power in range(MAX_ROWS.bit_length())}  # Base products: each power of two differs.
    return sorted({min(limit, max_tokens) for limit in {*TOKEN_CLASSES, *skinny, MOST_TOKENS_BESIDE}})


def make_shrunk(
    x: Tensor,
    num_slices: int,
    max_rank: int,
    *,
    dtype: torch.dtype | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Give memory for what the shrink of a layer writes.

    Parameters
    ----------
    x
        [T, H]: the layer's input.
    num_slices, max_rank
        S and R of the layer.
    dtype
        Of v, where the shrink gives a single part; that of the layer's output. None = that of ``x``.
    scratch
        [>= lora_scratch_elements(...)] fp32, contiguous, on the device of ``x``. None: allocated here.

    Returns
    -------
    Tensor
        v [P, S, T, R], uninitialised: partial sums in fp32, or a single part already rounded.

    Raises
    ------
    ValueError
        ``scratch`` is too small or not fp32.
    """
    num_parts = choose_num_parts(token_class(len(x)), num_slices, x.shape[1], max_rank, x.element_size())
    shape = (num_parts, num_slices, len(x), max_rank)
    return _take_scratch(scratch, shape, x.dtype if dtype is None else dtype, x.device)


def triton_add_lora_linear(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: LoRASlotTable,
    metadata: LoRAMetadata,
    *,
    output_slices: tuple[int, ...],
    max_rank: int,
    scratch: Tensor | None = None,
    offset_start: int = 0,
) -> None:
    """Add the adapters' deltas of a packed linear layer, or of the projection to logits, in place.

    Parameters
    ----------
    y
        [T, O] of the arena's dtype, or fp32 (logits); changed in place.
    x
        [T, H] of the arena's dtype.
    arena, table
        The weights, and where they lie for this layer.
    metadata
        Grouping of the rows of ``y``, on its device.
    output_slices
        Widths O_s of the S slices.
    max_rank
        The largest rank that any adapter may have; those above it are treated as an empty slot.
    scratch
        [>= lora_scratch_elements(...)] fp32, contiguous, on the device of ``y``. None: allocated here.
    offset_start
        Column of ``y`` where the first slice starts.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit together.
    """
    v = make_shrunk(x, len(output_slices), max_rank, dtype=y.dtype, scratch=scratch)
    triton_lora_shrink(v, x, arena, table, metadata)
    triton_lora_expand(y, v, arena, table, metadata, output_slices=output_slices, offset_start=offset_start)


def triton_add_lora_embedding(
    y: Tensor,
    token_ids: Tensor,
    arena: Tensor,
    table: LoRASlotTable,
    metadata: LoRAMetadata,
    *,
    vocab_size: int,
    max_rank: int,
    scratch: Tensor | None = None,
) -> None:
    """Add the adapters' deltas of a token embedding to the base rows, in place.

    Parameters
    ----------
    y
        [T, O] of the arena's dtype, the base embedding's rows; changed in place.
    token_ids
        [T] int32 or int64, in [0, V).
    arena, table
        The weights, and where they lie for this embedding.
    metadata
        Grouping of the T tokens, on the device of ``y``.
    vocab_size
        V, rows of each A.
    max_rank
        The largest rank that any adapter may have.
    scratch
        [>= T * max_rank] fp32, contiguous, on the device of ``y``. None: allocated here.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit together.
    """
    v = _take_scratch(scratch, (1, 1, token_ids.shape[0], max_rank), y.dtype, y.device)
    triton_lora_lookup(v, token_ids, arena, table, metadata.token_lora_mapping, vocab_size=vocab_size)
    triton_lora_expand(y, v, arena, table, metadata, output_slices=(y.shape[1],))


def _take_scratch(
    scratch: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Lay v at the start of the scratch memory: partial sums in fp32, a single part of the dtype."""
    dtype = torch.float32 if shape[0] > 1 else dtype
    if scratch is None:
        return torch.empty(shape, dtype=dtype, device=device)
    num_elements = shape[0] * shape[1] * shape[2] * shape[3]
    if scratch.dtype != torch.float32 or scratch.numel() < num_elements:
        raise ValueError(
            f"scratch has {scratch.numel()} elements of {scratch.dtype}, expected {num_elements} of float32"
        )
    return scratch.view(dtype)[:num_elements].view(shape)
