"""The LoRA shrink as one Triton kernel for all slices of a packed layer.

Semantics
---------
For token t with adapter slot l, slice s, and part p of the input features, which is a range of h::

    v[p, s, t, r] = scaling[l, s] * sum_{h in part p} x[t, h] * A[l, s][r, h]      r < rank[l, s]

The shrink is the sum over p: the expand adds the parts in their order, so nothing is added by chance, and no
memory has to be zero before. Accumulation and scaling are in fp32; v is fp32, or with P = 1 any dtype.

- Slot -1, and columns at or above an adapter's rank: not written, as the expand reads neither. With
  `fill_zeros` they are 0, and a slot without an adapter gives NaN: v is then complete.
- An empty step launches nothing.

Layouts: x [T, H] of any strides; A [R, H] in the arena, at a multiple of 16 bytes; v [P, S, T, R] contiguous.

Grid: (P x S x blocks of rank, programs that share the tiles of tokens), see `triton_lora_tiles`, or the other
way round where that was measured to be faster (`ShrinkTiles.tiles_first`). A program multiplies a tile of x
with a block of rows of A; blocks at or above the adapter's rank end at once. An
adapter with many of a decode step's rows gets larger tiles and so fewer programs: each keeps a multiprocessor
from the base product that runs beside it. Where kernels are launched early, a program finds its rows and its
A before it waits for x, see `wait_for_previous`, and the next kernel may begin when x is complete: see
`begin_after_wait`.

Source: Punica's and vLLM's SGMV shrink (Chen et al., 2023), split along the input features. Different here:
weights through offsets into one arena at each adapter's own rank, no atomics, no zero-fill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels._triton import MOST_EARLY_LORA_ROWS, begin_after_wait, ceil_div, early_launch, jit, tl
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.triton_lora_tiles import (
    NOT_SPECIALIZED,
    LoRASlotTable,
    SlotTensors,
    check_metadata,
    choose_num_tile_programs,
    choose_shrink_tiles,
    load_num_tiles,
    load_rank,
    load_tile,
    metadata_of_tensors,
    token_class,
)


@jit
def _shrink_tile(
    v_part: tl.tensor,
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    order_ptr: tl.tensor,
    num_rows: tl.tensor,
    r_index: tl.tensor,
    part: tl.tensor,
    slot: tl.tensor,
    rank: tl.tensor,
    scaling: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_h: tl.tensor,
    IN_FEATURES: tl.constexpr,
    K_PER_PART: tl.constexpr,
    IS_EVEN: tl.constexpr,
    MAX_RANK: tl.constexpr,
    FILL_ZEROS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One tile: the first `num_rows` of BLOCK_T rows of an adapter by the columns `r_index` of v."""
    index = tl.arange(0, BLOCK_T)
    is_row = index < num_rows
    rows = tl.load(order_ptr + index, mask=is_row, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    is_rank = r_index < rank
    begin_after_wait(EARLY)
    if tl.min(r_index) < rank:
        a_rows = a_ptr + r_index.to(tl.int64)[None, :] * IN_FEATURES
        x_rows = x_ptr + rows[:, None] * x_stride_t
        for k_step in range(0, K_PER_PART, BLOCK_K):
            k = part * K_PER_PART + k_step + tl.arange(0, BLOCK_K)
            is_a, is_x = is_rank[None, :], is_row[:, None]
            if not IS_EVEN:
                is_k = k < IN_FEATURES
                is_a, is_x = is_a & is_k[:, None], is_x & is_k[None, :]
            a = tl.load(a_rows + k[:, None], mask=is_a, other=0.0)
            x = tl.load(x_rows + k[None, :].to(tl.int64) * x_stride_h, mask=is_x, other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        acc *= scaling
    is_column = is_rank
    if FILL_ZEROS:
        # NaN in x must not reach columns that A does not have; a slot without an adapter shows.
        acc = tl.where(is_rank[None, :], acc, 0.0)
        acc = tl.where((rank < 0) & (slot >= 0), float("nan"), acc)
        is_column = r_index < MAX_RANK
    tl.store(
        v_part + rows[:, None] * MAX_RANK + r_index[None, :],
        acc.to(v_part.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


@jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_shrink_kernel(
    v_ptr: tl.tensor,
    x_ptr: tl.tensor,
    arena_ptr: tl.tensor,
    a_offset_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    scaling_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_slots: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_h: tl.tensor,
    a_offset_stride_l: tl.tensor,
    a_offset_stride_s: tl.tensor,
    rank_stride_l: tl.tensor,
    rank_stride_s: tl.tensor,
    scaling_stride_l: tl.tensor,
    scaling_stride_s: tl.tensor,
    IN_FEATURES: tl.constexpr,
    K_PER_PART: tl.constexpr,
    IS_EVEN: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    NUM_R_BLOCKS: tl.constexpr,
    FILL_ZEROS: tl.constexpr,
    A_ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_T_MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_AXIS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    program = tl.program_id(1 - TILE_AXIS)
    first_r = program % NUM_R_BLOCKS * BLOCK_R
    r_index = first_r + tl.arange(0, BLOCK_R)
    slice_index = program // NUM_R_BLOCKS % NUM_SLICES
    part = program // (NUM_R_BLOCKS * NUM_SLICES)
    v_row = (part * NUM_SLICES + slice_index).to(tl.int64) * num_tokens
    end = load_num_tiles(tiles_ptr, FILL_ZEROS)
    first, num_rows, slot = load_tile(tiles_ptr, tl.program_id(TILE_AXIS), True)
    for tile in range(tl.program_id(TILE_AXIS), end, tl.num_programs(TILE_AXIS)):
        table_row, rank = load_rank(
            slot, rank_ptr + slice_index * rank_stride_s, num_slots, rank_stride_l, MAX_RANK
        )
        a_start = tl.load(a_offset_ptr + table_row * a_offset_stride_l + slice_index * a_offset_stride_s)
        scaling = tl.load(scaling_ptr + table_row * scaling_stride_l + slice_index * scaling_stride_s)
        if (first_r < rank) | FILL_ZEROS:
            v_part = v_ptr + v_row * MAX_RANK
            a_ptr = arena_ptr + tl.multiple_of(a_start, A_ALIGNMENT)
            if num_rows <= BLOCK_T:
                _shrink_tile(
                    *(v_part, x_ptr, a_ptr, order_ptr + first, num_rows, r_index, part, slot, rank, scaling),
                    *(x_stride_t, x_stride_h),
                    *(IN_FEATURES, K_PER_PART, IS_EVEN, MAX_RANK, FILL_ZEROS),
                    *(BLOCK_T, BLOCK_R, BLOCK_K, EARLY),
                )
            if BLOCK_T_MANY > 0:  # noqa: SIM102 - alone, so that without it nothing more is compiled
                if num_rows > BLOCK_T:
                    _shrink_tile(
                        *(v_part, x_ptr, a_ptr, order_ptr + first, num_rows, r_index, part, slot, rank),
                        *(scaling, x_stride_t, x_stride_h),
                        *(IN_FEATURES, K_PER_PART, IS_EVEN, MAX_RANK, FILL_ZEROS),
                        *(BLOCK_T_MANY, BLOCK_R, BLOCK_K // 2, EARLY),
                    )
        next_tile = tile + tl.num_programs(TILE_AXIS)
        first, num_rows, slot = load_tile(tiles_ptr, next_tile, next_tile < end)
    begin_after_wait(EARLY)  # Also where there is nothing to do: the next kernel relies on it.


def triton_lora_shrink(
    v: Tensor,
    x: Tensor,
    arena: Tensor,
    table: LoRASlotTable,
    metadata: LoRAMetadata,
    *,
    fill_zeros: bool = False,
) -> None:
    """Project the input onto each adapter's rank, in P partial sums: ``sum_p v[p, s] = scaling * x A[s]^T``.

    Parameters
    ----------
    v
        [P, S, T, R], contiguous, written; fp32, or any dtype where P is 1. R is the largest rank that any
        adapter may have; `choose_num_parts` gives a good P.
    x
        [T, H] of the arena's dtype, any strides.
    arena
        [E], contiguous, the weights of all adapters.
    table
        Where they lie, for this layer; offsets are multiples of 16 bytes.
    metadata
        Grouping of the T tokens, on the device of ``x``.
    fill_zeros
        True: rows of slot -1 and columns at or above an adapter's rank are 0, those of a slot without an
        adapter NaN. False: none of them is written.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit together.

    Notes
    -----
    One launch on the current stream; nothing is allocated and nothing read on the host. Up to 512 rows it may
    begin while the kernel before still runs: what has written metadata or tables must lie further back, in
    front of a kernel that is not launched early, or of the graph's launch.
    """
    _check(v, x, arena, table, metadata)
    num_parts, num_slices, num_tokens, max_rank = v.shape
    if num_tokens == 0:
        return
    in_features = x.shape[1]
    tiles = choose_shrink_tiles(token_class(num_tokens), in_features, max_rank, x.element_size(), num_slices)
    num_r_blocks = ceil_div(max_rank, tiles.block_r)
    per_tile = num_parts * num_slices * num_r_blocks
    k_per_part = ceil_div(ceil_div(in_features, num_parts), tiles.block_k) * tiles.block_k
    num_bytes = tiles.num_buffered * x.element_size()
    programs = choose_num_tile_programs(metadata, tiles.block_t, per_tile, num_bytes, tiles.num_warps)
    _lora_shrink_kernel[(programs, per_tile) if tiles.tiles_first else (per_tile, programs)](
        v,
        x,
        arena,
        table.a_offset,
        table.lora_rank,
        table.scaling,
        metadata.token_indices_sorted_by_lora_ids,
        metadata.tiles_of(tiles.block_t, tiles.block_t_many),
        *(num_tokens, table.lora_rank.shape[0]),
        *x.stride(),
        *(*table.a_offset.stride(), *table.lora_rank.stride(), *table.scaling.stride()),
        IN_FEATURES=in_features,
        K_PER_PART=k_per_part,
        IS_EVEN=k_per_part * num_parts == in_features,
        NUM_SLICES=num_slices,
        MAX_RANK=max_rank,
        NUM_R_BLOCKS=num_r_blocks,
        FILL_ZEROS=fill_zeros,
        A_ALIGNMENT=16 // arena.element_size(),
        BLOCK_T=tiles.block_t,
        BLOCK_T_MANY=tiles.block_t_many,
        BLOCK_R=tiles.block_r,
        BLOCK_K=tiles.block_k,
        TILE_AXIS=0 if tiles.tiles_first else 1,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **early_launch(x, MOST_EARLY_LORA_ROWS),
    )


def _check(v: Tensor, x: Tensor, arena: Tensor, table: LoRASlotTable, metadata: LoRAMetadata) -> None:
    num_parts, num_slices, num_tokens, _ = v.shape
    if x.dim() != 2 or x.shape[0] != num_tokens or x.dtype != arena.dtype:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}, expected [{num_tokens}, H] of {arena.dtype}"
        )
    if table.lora_rank.shape[1] != num_slices or not v.is_contiguous():
        raise ValueError(
            f"v has shape {tuple(v.shape)} and strides {v.stride()}, expected contiguous [P, S, T, R] with S "
            f"= {table.lora_rank.shape[1]}"
        )
    if num_parts > 1 and v.dtype != torch.float32:
        raise ValueError(f"v has {num_parts} parts of {v.dtype}, expected float32")
    check_metadata(metadata, x, "x")


@torch.library.custom_op("lora_serve::lora_shrink", mutates_args=("v",))
def lora_shrink_op(
    v: Tensor,
    x: Tensor,
    arena: Tensor,
    a_offset: Tensor,
    lora_rank: Tensor,
    scaling: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    lora_tiles: Tensor,
    fill_zeros: bool,
) -> None:
    """`triton_lora_shrink` as a torch operator, over tensors alone; for compiled and traced models."""
    metadata = metadata_of_tensors(token_indices_sorted_by_lora_ids, lora_tiles)
    table = SlotTensors(a_offset, a_offset, lora_rank, scaling)
    triton_lora_shrink(v, x, arena, table, metadata, fill_zeros=fill_zeros)


@lora_shrink_op.register_fake
def _lora_shrink_fake(
    v: Tensor,
    x: Tensor,
    arena: Tensor,
    a_offset: Tensor,
    lora_rank: Tensor,
    scaling: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    lora_tiles: Tensor,
    fill_zeros: bool,
) -> None:
    """Nothing comes back: v is changed in place."""
