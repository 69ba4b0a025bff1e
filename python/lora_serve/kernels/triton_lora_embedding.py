"""The LoRA look-up, which is the shrink of a token embedding, as a Triton kernel.

Semantics
---------
For token t with id ``i[t]`` and adapter slot l; A is [V, R], a row a token id::

    v[0, 0, t, r] = scaling[l] * A[l][i[t], r]      r < rank[l]

Scaling is applied once, in fp32, before v is rounded. The expand is the second half.

- Slot -1, and columns at or above an adapter's rank: not written, as the expand reads neither. With
  `fill_zeros` they are 0, and a slot without an adapter gives NaN: v is then complete.
- A token id outside [0, V) gives NaN where its token has an adapter with a module; nothing is read for it.
- An empty step launches nothing.

Layouts: token ids [T] of any stride; A in the arena, at a multiple of 16 bytes; v [1, 1, T, R] contiguous.

Grid: (blocks of tokens, blocks of rank). Tokens are taken in the step's order, each with its own slot: a
look-up shares nothing between tokens of one adapter.

Source: what PEFT computes for an embedding, for many adapters at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels._triton import ceil_div, jit, next_power_of_2, tl
from lora_serve.kernels.triton_lora_tiles import NOT_SPECIALIZED, LoRASlotTable, SlotTensors

_BLOCK_T = 16
_MAX_BLOCK_R = 128


@jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_lookup_kernel(
    v_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    mapping_ptr: tl.tensor,
    arena_ptr: tl.tensor,
    a_offset_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    scaling_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_slots: tl.tensor,
    token_ids_stride: tl.tensor,
    a_offset_stride_l: tl.tensor,
    rank_stride_l: tl.tensor,
    scaling_stride_l: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    MAX_RANK: tl.constexpr,
    FILL_ZEROS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_token = rows < num_tokens
    slot = tl.load(mapping_ptr + rows, mask=is_token, other=-1).to(tl.int64)
    has_slot = (slot >= 0) & (slot < num_slots)
    rank = tl.load(rank_ptr + slot * rank_stride_l, mask=has_slot, other=-1)
    rank = tl.where(rank > MAX_RANK, -1, rank)
    a_start = tl.load(a_offset_ptr + slot * a_offset_stride_l, mask=rank > 0, other=0)
    scaling = tl.load(scaling_ptr + slot * scaling_stride_l, mask=rank > 0, other=0.0)
    ids = tl.load(token_ids_ptr + rows * token_ids_stride, mask=is_token & (rank > 0), other=0).to(tl.int64)
    is_known = (ids >= 0) & (ids < VOCAB_SIZE)
    is_rank = r[None, :] < rank[:, None]
    a = tl.load(
        arena_ptr + a_start[:, None] + ids[:, None] * rank[:, None] + r[None, :],
        mask=is_rank & is_known[:, None],
        other=0.0,
    )
    v = a.to(tl.float32) * scaling[:, None]
    v = tl.where(is_rank & (is_known == 0)[:, None], float("nan"), v)
    is_column = is_rank
    if FILL_ZEROS:
        v = tl.where(((slot >= 0) & (rank < 0))[:, None], float("nan"), v)
        is_column = is_token[:, None] & (r < MAX_RANK)[None, :]
    tl.store(v_ptr + rows[:, None] * MAX_RANK + r[None, :], v.to(v_ptr.dtype.element_ty), mask=is_column)


def triton_lora_lookup(
    v: Tensor,
    token_ids: Tensor,
    arena: Tensor,
    table: LoRASlotTable,
    token_lora_mapping: Tensor,
    *,
    vocab_size: int,
    fill_zeros: bool = False,
) -> None:
    """Look up each token in its adapter's A: ``v[0, 0, t] = scaling * A[token_ids[t]]``.

    Parameters
    ----------
    v
        [1, 1, T, R], contiguous, any floating-point dtype, written. R is the largest rank that any adapter
        may have.
    token_ids
        [T] int32 or int64, in [0, V) where the token has an adapter.
    arena
        [E], contiguous, the weights of all adapters.
    table
        Where they lie, for this embedding: one slice.
    token_lora_mapping
        [T] int32, contiguous: adapter slot of each token, -1 = no adapter.
    vocab_size
        V, rows of A.
    fill_zeros
        True: rows of slot -1 and columns at or above an adapter's rank are 0, those of a slot without an
        adapter NaN. False: none of them is written.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit together.

    Notes
    -----
    One launch on the current stream; nothing is allocated and nothing read on the host.
    """
    num_parts, num_slices, num_tokens, max_rank = v.shape
    if num_parts != 1 or num_slices != 1 or table.lora_rank.shape[1] != 1 or not v.is_contiguous():
        raise ValueError(
            f"v has shape {tuple(v.shape)} and strides {v.stride()}, expected contiguous [1, 1, T, R]; the "
            f"table has {table.lora_rank.shape[1]} slices, expected 1"
        )
    is_integer = token_ids.dtype in (torch.int32, torch.int64)
    if tuple(token_ids.shape) != (num_tokens,) or not is_integer:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)} and dtype {token_ids.dtype}, expected "
            f"({num_tokens},) int32 or int64"
        )
    if tuple(token_lora_mapping.shape) != (num_tokens,) or not token_lora_mapping.is_contiguous():
        raise ValueError(
            f"token_lora_mapping has shape {tuple(token_lora_mapping.shape)}, expected ({num_tokens},)"
        )
    if num_tokens == 0:
        return
    block_r = min(max(next_power_of_2(max_rank), 16), _MAX_BLOCK_R)
    _lora_lookup_kernel[(ceil_div(num_tokens, _BLOCK_T), ceil_div(max_rank, block_r))](
        v,
        token_ids,
        token_lora_mapping,
        arena,
        table.a_offset,
        table.lora_rank,
        table.scaling,
        num_tokens,
        table.lora_rank.shape[0],
        token_ids.stride(0),
        table.a_offset.stride(0),
        table.lora_rank.stride(0),
        table.scaling.stride(0),
        VOCAB_SIZE=vocab_size,
        MAX_RANK=max_rank,
        FILL_ZEROS=fill_zeros,
        BLOCK_T=_BLOCK_T,
        BLOCK_R=block_r,
        num_warps=4,
    )


@torch.library.custom_op("lora_serve::lora_lookup", mutates_args=("v",))
def lora_lookup_op(
    v: Tensor,
    token_ids: Tensor,
    arena: Tensor,
    a_offset: Tensor,
    lora_rank: Tensor,
    scaling: Tensor,
    token_lora_mapping: Tensor,
    vocab_size: int,
    fill_zeros: bool,
) -> None:
    """`triton_lora_lookup` as a torch operator, over tensors alone; for compiled and traced models."""
    table = SlotTensors(a_offset, a_offset, lora_rank, scaling)
    triton_lora_lookup(
        v, token_ids, arena, table, token_lora_mapping, vocab_size=vocab_size, fill_zeros=fill_zeros
    )


@lora_lookup_op.register_fake
def _lora_lookup_fake(
    v: Tensor,
    token_ids: Tensor,
    arena: Tensor,
    a_offset: Tensor,
    lora_rank: Tensor,
    scaling: Tensor,
    token_lora_mapping: Tensor,
    vocab_size: int,
    fill_zeros: bool,
) -> None:
    """Nothing comes back: v is changed in place."""
