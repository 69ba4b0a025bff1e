"""The LoRA expand as one Triton kernel for all slices of a packed layer.

Semantics
---------
For token t with adapter slot l, and slice s whose columns of y start at ``offset_s``::

    y[t, offset_s + o] (+)= sum_r round(sum_p v[p, s, t, r]) * B[l, s][r, o]      r < rank[l, s]

The parts of v (see `triton_lora_shrink`) are added in fp32 in their order; the sum is rounded to the dtype of
y once. Accumulation is in fp32, y is added in fp32 and rounded once.

- Slot -1: its rows are neither read nor written. So are columns outside the slices.
- No module on a slice (rank 0): the same; without `add_inputs` its columns are 0.
- A slot that holds no adapter (rank -1), or one that cannot be: its rows become NaN on all slices. A kernel
  cannot raise, and running as the base model would be an answer in another adapter's name; NaN logits fail
  the request.
- An empty step launches nothing.

y of fp32 over a 16-bit arena (logits): with bf16, v is split into three bf16 numbers whose sum is v, so that
tensor cores multiply exactly; with fp16, whose range is too small for that, fp32 arithmetic is used.

Layouts: y [T, O] of any strides; v [P, S, T, R] contiguous; B [R, O_s] in the arena, at a multiple of 16
bytes.

Grid: (runs of tiles of output features of all slices, programs that share the tiles of tokens), see
`triton_lora_tiles`. The whole rank is one block where it fits. A program that has several tiles of features
reads v once, and copies the next tiles of y and B to shared memory while it multiplies: in a prefill the
memory never waits for a program that is still finding its rows.

Source: Punica's and vLLM's SGMV expand over packed slices (Chen et al., 2023). Different here: it adds up the
shrink's parts itself; B is [R, O] at its own rank; empty slots poison their rows.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from lora_serve.kernels._triton import (
    MOST_EARLY_LORA_ROWS,
    ceil_div,
    early_launch,
    jit,
    let_next_begin,
    tl,
    wait_for_previous,
)
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.triton_lora_tiles import (
    NOT_SPECIALIZED,
    LoRASlotTable,
    SlotTensors,
    check_metadata,
    choose_expand_tiles,
    choose_num_tile_programs,
    load_num_tiles,
    load_rank,
    load_tile,
    metadata_of_tensors,
    token_class,
)

_MOST_CACHED_TOKENS = 2048
"""A bound of the classes of T. With more, y would push B and v out of the L2 cache, and itself before it is
read again.
"""


@jit
def _load_b(
    b_columns: tl.tensor, r: tl.tensor, is_n: tl.tensor, rank: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """A block of B: rows r of the rank, 0 at or above it."""
    mask = (r < rank)[:, None] & is_n[None, :]
    return tl.load(b_columns + r[:, None].to(tl.int64) * width, mask=mask, other=0.0)


@jit
def _load_v(
    v_rows: tl.tensor,
    v_part: tl.tensor,
    r: tl.tensor,
    is_row: tl.tensor,
    rank: tl.tensor,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
) -> tl.tensor:
    """The sum of v's parts. Columns at or above the rank are read too, in whole vectors, and dropped."""
    v_ptrs = v_rows + r[None, :]
    mask = is_row[:, None] & (r < MAX_RANK)[None, :]
    v = tl.load(v_ptrs, mask=mask, other=0.0)
    for part in tl.static_range(1, NUM_PARTS):
        v += tl.load(v_ptrs + part * v_part, mask=mask, other=0.0)
    return tl.where((r < rank)[None, :], v, 0.0)


@jit
def _multiply(v: tl.tensor, b: tl.tensor, acc: tl.tensor, SPLIT_V: tl.constexpr) -> tl.tensor:
    """``acc + v b`` in fp32; v may be wider than b."""
    if SPLIT_V:
        high = v.to(b.dtype)
        rest = v - high.to(tl.float32)
        middle = rest.to(b.dtype)
        low = (rest - middle.to(tl.float32)).to(b.dtype)
        # The smallest first: only the last sum is rounded at the size of the result.
        acc = tl.dot(low, b, acc)
        acc = tl.dot(middle, b, acc)
        acc = tl.dot(high, b, acc)
    else:
        acc = tl.dot(v, b.to(v.dtype), acc, input_precision="ieee")
    return acc


@jit
def load_whole_v(
    v_rows: tl.tensor,
    v_part: tl.tensor,
    is_row: tl.tensor,
    rank: tl.tensor,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """A tile of v for `expand_tile`, all of the rank; nothing where it does not fit into one block."""
    v = tl.zeros((1, 1), dtype=tl.float32)
    if MAX_RANK <= BLOCK_R:
        v = _load_v(v_rows, v_part, tl.arange(0, BLOCK_R), is_row, rank, MAX_RANK, NUM_PARTS)
    return v


@jit
def expand_tile(
    whole_v: tl.tensor,
    v_rows: tl.tensor,
    v_part: tl.tensor,
    b_columns: tl.tensor,
    is_row: tl.tensor,
    is_n: tl.tensor,
    rank: tl.tensor,
    width: tl.tensor,
    DTYPE: tl.constexpr,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    SPLIT_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """``v B`` of one tile in fp32, v rounded to DTYPE before; 0 where the rank is 0 or below.

    `v_rows` [BLOCK_T, 1] point to rows of v's first part, `b_columns` [1, BLOCK_N] to the first row of B.
    """
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    r_block = tl.arange(0, BLOCK_R)
    if MAX_RANK <= BLOCK_R:
        b = _load_b(b_columns, r_block, is_n, rank, width)
        acc = _multiply(whole_v.to(DTYPE), b, acc, SPLIT_V)
    else:
        for r_start in range(0, rank, BLOCK_R):
            b = _load_b(b_columns, r_start + r_block, is_n, rank, width)
            v = _load_v(v_rows, v_part, r_start + r_block, is_row, rank, MAX_RANK, NUM_PARTS)
            acc = _multiply(v.to(DTYPE), b, acc, SPLIT_V)
    return acc


@jit
def add_product(y: tl.tensor, product: tl.tensor, rank: tl.tensor) -> tl.tensor:
    """``y + product`` in fp32, rounded to the dtype of y: y itself at rank 0, also if -0.0; NaN below."""
    total = tl.where(rank < 0, float("nan"), product + y.to(tl.float32)).to(y.dtype)
    return tl.where(rank == 0, y, total)


@jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_expand_kernel(
    y_ptr: tl.tensor,
    v_ptr: tl.tensor,
    arena_ptr: tl.tensor,
    b_offset_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_slots: tl.tensor,
    y_stride_t: tl.tensor,
    y_stride_o: tl.tensor,
    b_offset_stride_l: tl.tensor,
    b_offset_stride_s: tl.tensor,
    rank_stride_l: tl.tensor,
    rank_stride_s: tl.tensor,
    WIDTHS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    OFFSET_START: tl.constexpr,
    WIDTH_ALIGNMENT: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    ADD_INPUTS: tl.constexpr,
    V_AS_ARENA: tl.constexpr,
    LOADS_Y_FIRST: tl.constexpr,
    Y_EVICTION: tl.constexpr,
    SPLIT_V: tl.constexpr,
    B_ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    N_TILES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    RUN: tl.constexpr = N_TILES * BLOCK_N
    let_next_begin(EARLY)
    # Which slice, and which of its columns: all slices' runs of tiles are numbered one after the other.
    run = tl.program_id(0)
    slice_index, width, column = run * 0, run * 0 + WIDTHS[0], run * 0 + OFFSET_START
    for s in tl.static_range(1, NUM_SLICES):
        previous = (WIDTHS[s - 1] + RUN - 1) // RUN
        is_later = (slice_index == s - 1) & (run >= previous)
        run = tl.where(is_later, run - previous, run)
        slice_index = tl.where(is_later, s, slice_index)
        width = tl.where(is_later, WIDTHS[s], width)
        column = tl.where(is_later, column + WIDTHS[s - 1], column)
    width, column = tl.multiple_of(width, WIDTH_ALIGNMENT), tl.multiple_of(column, WIDTH_ALIGNMENT)
    v_part = num_tokens.to(tl.int64) * (NUM_SLICES * MAX_RANK)
    V_DTYPE: tl.constexpr = arena_ptr.dtype.element_ty if V_AS_ARENA else y_ptr.dtype.element_ty

    end = load_num_tiles(tiles_ptr, False)
    first, num_rows, slot = load_tile(tiles_ptr, tl.program_id(1), True)
    for tile in tl.range(tl.program_id(1), end, tl.num_programs(1), num_stages=1):
        table_row, rank = load_rank(
            slot, rank_ptr + slice_index * rank_stride_s, num_slots, rank_stride_l, MAX_RANK
        )
        b_start = tl.load(b_offset_ptr + table_row * b_offset_stride_l + slice_index * b_offset_stride_s)
        if (rank != 0) | (not ADD_INPUTS):
            index = tl.arange(0, BLOCK_T)
            is_row = index < num_rows
            rows = tl.load(order_ptr + first + index, mask=is_row, other=0).to(tl.int64)
            y_rows = y_ptr + rows[:, None] * y_stride_t
            b_block = arena_ptr + tl.multiple_of(b_start, B_ALIGNMENT)
            v_rows = v_ptr + (slice_index.to(tl.int64) * num_tokens + rows)[:, None] * MAX_RANK
            is_v = index < tl.where(rank > 0, num_rows, 0)
            wait_for_previous(EARLY)  # It may have written y and v.
            v = load_whole_v(v_rows, v_part, is_v, rank, MAX_RANK, NUM_PARTS, BLOCK_R)
            # No branch on the rank in the loop, so that the loads of the next tiles may be under way.
            for n_tile in tl.range(0, N_TILES, num_stages=NUM_STAGES):
                n = run * RUN + n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
                is_n = n < width
                y_ptrs = y_rows + (column + n)[None, :].to(tl.int64) * y_stride_o
                mask = is_row[:, None] & is_n[None, :]
                if LOADS_Y_FIRST:
                    y = tl.load(y_ptrs, mask=mask, other=0.0, eviction_policy=Y_EVICTION)
                acc = expand_tile(
                    *(v, v_rows, v_part, b_block + n[None, :], is_v, is_n, rank, width),
                    *(V_DTYPE, MAX_RANK, NUM_PARTS, SPLIT_V),
                    *(BLOCK_T, BLOCK_N, BLOCK_R),
                )
                # Ahead of y: of a sum right behind a product the compiler makes a product that begins
                # with y, and in fp32 all of it would be rounded at the size of y.
                acc = tl.where(rank < 0, float("nan"), acc)
                if ADD_INPUTS:
                    if not LOADS_Y_FIRST:
                        y = tl.load(y_ptrs, mask=mask, other=0.0, eviction_policy=Y_EVICTION)
                    acc += y.to(tl.float32)
                tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy=Y_EVICTION)
        next_tile = tile + tl.num_programs(1)
        first, num_rows, slot = load_tile(tiles_ptr, next_tile, next_tile < end)
    wait_for_previous(EARLY)


def triton_lora_expand(
    y: Tensor,
    v: Tensor,
    arena: Tensor,
    table: LoRASlotTable,
    metadata: LoRAMetadata,
    *,
    output_slices: tuple[int, ...],
    offset_start: int = 0,
    add_inputs: bool = True,
    rounds_v_as_arena: bool = False,
) -> None:
    """Project from rank to output features, in place: ``y[:, offset_s : offset_s + O_s] (+)= v[s] B[s]``.

    Parameters
    ----------
    y
        [T, O] of the arena's dtype, or fp32, O >= offset_start + sum(O_s), any strides; changed in place.
    v
        [P, S, T, R] as `triton_lora_shrink` or `triton_lora_lookup` gave it: fp32, or with P = 1 any dtype.
    arena
        [E], contiguous, the weights of all adapters.
    table, metadata
        Where they lie, for this layer; grouping of the T tokens. On the device of ``y``.
    output_slices
        Widths O_s of the S slices.
    offset_start
        Column of ``y`` where the first slice starts, >= 0; the others follow without gaps.
    add_inputs
        True: add to ``y``. False: overwrite the slices of rows with an adapter (with 0 where it has no
        module) without reading them.
    rounds_v_as_arena
        Round v to the dtype of the arena, not of ``y``: the product of two 16-bit numbers, kept in fp32.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit together, or ``offset_start`` is negative.

    Notes
    -----
    One launch on the current stream, no allocation. Rows whose slot holds no adapter become NaN. Up to 512
    rows it may begin while the kernels before still run; see `wait_for_previous` for what must be complete.
    """
    check_expand(y, v, arena, table, metadata, (output_slices, offset_start))
    num_parts, num_slices, num_tokens, max_rank = v.shape
    if num_tokens == 0:
        return
    layer = (sum(output_slices), max_rank, num_slices, num_parts, arena.element_size())
    tiles = choose_expand_tiles(token_class(num_tokens), *layer)
    num_runs = sum(ceil_div(width, tiles.n_tiles * tiles.block_n) for width in output_slices)
    num_bytes = tiles.num_buffered * arena.element_size()
    programs = choose_num_tile_programs(metadata, tiles.block_t, num_runs, num_bytes, tiles.num_warps)
    is_fp32 = y.dtype == torch.float32 and not rounds_v_as_arena
    _lora_expand_kernel[(num_runs, programs)](
        *(y, v, arena, table.b_offset, table.lora_rank),
        metadata.token_indices_sorted_by_lora_ids,
        metadata.tiles_of(tiles.block_t),
        *(num_tokens, len(table.lora_rank), *y.stride(), *table.b_offset.stride(), *table.lora_rank.stride()),
        WIDTHS=output_slices,
        NUM_SLICES=num_slices,
        OFFSET_START=offset_start,
        WIDTH_ALIGNMENT=gcd(16, offset_start, *output_slices),
        NUM_PARTS=num_parts,
        MAX_RANK=max_rank,
        ADD_INPUTS=add_inputs,
        V_AS_ARENA=rounds_v_as_arena,
        LOADS_Y_FIRST=add_inputs and tiles.loads_y_first,
        Y_EVICTION=_y_eviction(num_tokens, add_inputs),
        SPLIT_V=is_fp32 and arena.dtype == torch.bfloat16,
        B_ALIGNMENT=16 // arena.element_size(),
        BLOCK_T=tiles.block_t,
        BLOCK_N=tiles.block_n,
        BLOCK_R=tiles.block_r,
        N_TILES=tiles.n_tiles,
        NUM_STAGES=1 if is_fp32 else tiles.num_stages,  # Tiles of fp32 do not fit twice into 99 KB.
        num_warps=tiles.num_warps,
        num_stages=2,
        **early_launch(y, MOST_EARLY_LORA_ROWS),
    )


def _y_eviction(num_tokens: int, add_inputs: bool) -> str:
    """How y goes through the L2 cache: what is written beside a product is read behind it."""
    if num_tokens > _MOST_CACHED_TOKENS:
        return "evict_first"
    return "" if add_inputs else "evict_last"


def check_expand(
    y: Tensor,
    v: Tensor,
    arena: Tensor,
    table: LoRASlotTable,
    metadata: LoRAMetadata,
    columns: tuple[tuple[int, ...], int],
) -> None:
    """Raise ``ValueError`` unless all fit together; ``columns`` are output_slices and offset_start."""
    output_slices, offset_start = columns
    num_parts, num_slices, num_tokens, _ = v.shape
    columns_needed = offset_start + sum(output_slices)
    if offset_start < 0 or y.dim() != 2 or y.shape[0] != num_tokens or y.shape[1] < columns_needed:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, expected [{num_tokens}, O] with O >= {columns_needed}, which is "
            f"offset_start {offset_start} (0 or above) and slices {output_slices}"
        )
    if y.dtype not in (arena.dtype, torch.float32):
        raise ValueError(f"y is {y.dtype}, expected {arena.dtype} as the arena, or float32")
    if not len(output_slices) == num_slices == table.lora_rank.shape[1] or not v.is_contiguous():
        raise ValueError(
            f"v has shape {tuple(v.shape)} and strides {v.stride()}, expected contiguous [P, S, T, R] with S "
            f"= {len(output_slices)} slices of the layer and {table.lora_rank.shape[1]} of its table"
        )
    if num_parts > 1 and v.dtype != torch.float32:
        raise ValueError(f"v has {num_parts} parts of {v.dtype}, expected float32")
    check_metadata(metadata, y, "y")


@torch.library.custom_op("lora_serve::lora_expand", mutates_args=("y",))
def lora_expand_op(
    y: Tensor,
    v: Tensor,
    arena: Tensor,
    b_offset: Tensor,
    lora_rank: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    lora_tiles: Tensor,
    output_slices: list[int],
    offset_start: int,
    add_inputs: bool,
) -> None:
    """`triton_lora_expand` as a torch operator, over tensors alone; for compiled and traced models."""
    metadata = metadata_of_tensors(token_indices_sorted_by_lora_ids, lora_tiles)
    triton_lora_expand(
        y,
        v,
        arena,
        SlotTensors(b_offset, b_offset, lora_rank, lora_rank),
        metadata,
        output_slices=tuple(output_slices),
        offset_start=offset_start,
        add_inputs=add_inputs,
    )


@lora_expand_op.register_fake
def _lora_expand_fake(
    y: Tensor,
    v: Tensor,
    arena: Tensor,
    b_offset: Tensor,
    lora_rank: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    lora_tiles: Tensor,
    output_slices: list[int],
    offset_start: int,
    add_inputs: bool,
) -> None:
    """Nothing comes back: y is changed in place."""
