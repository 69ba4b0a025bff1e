"""The gated activation of an MLP whose adapters' deltas are still to be added, in one kernel on CUDA.

Semantics
---------
For token t with adapter slot l, feature i of I, and the slices gate (0) and up (1) of B::

    gate[t, i] = round(gate_up[t, i]     + sum_r round(sum_p v[p, 0, t, r]) * B[l, 0][r, i])
    up[t, i]   = round(gate_up[t, I + i] + sum_r round(sum_p v[p, 1, t, r]) * B[l, 1][r, i])
    y[t, i]    = round(round(silu(gate[t, i])) * up[t, i])

with r < rank[l, s]. This is `triton_lora_expand` followed by `silu_mul`, with the same roundings, all to the
dtype of gate_up. The products are accumulated in fp32; their order may differ from that of
`triton_lora_expand` where tiles do.

- Slot -1, and a slice without a module (rank 0): gate or up is that of gate_up, bit for bit; v is not read.
- A slot that holds no adapter (rank -1), or one that cannot be: the row becomes NaN.
- Columns of v at or above the rank are dropped, whatever they hold.
- Rows in no group, as padded ones are, are neither read nor written. An empty step launches nothing.

Layouts: rows of gate_up and out at any distance; v [P, 2, T, R] contiguous; B [R, I] in the arena, at a
multiple of 16 bytes.

Grid: (tiles of features, programs that share the tiles of tokens), see `triton_lora_tiles`; tokens without an
adapter are a group like others. Neighbouring programs take the same tokens: gate_up is read once and in
order, while v and B come from the L2 cache. Where kernels are launched early, a program finds its rows and
its B before it waits, see `wait_for_previous`.

Source: an expand in front of the operation that reads its result, as epilogues of matrix products have it;
the activation is `silu_mul`'s.
"""

from __future__ import annotations

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
from lora_serve.kernels.lora_delta import LoRADelta
from lora_serve.kernels.silu_mul import check_silu_mul, silu_mul, silu_times
from lora_serve.kernels.triton_lora_expand import add_product, check_expand, expand_tile, load_whole_v
from lora_serve.kernels.triton_lora_tiles import (
    NOT_SPECIALIZED,
    choose_num_tile_programs,
    choose_silu_mul_launch,
    load_num_tiles,
    load_rank,
    load_tile,
    token_class,
)
from lora_serve.kernels.tuned_lora_tiles import LoRASiluMulLaunch


@jit
def _load_gate_up(gate_ptrs: tl.tensor, mask: tl.tensor, I: tl.constexpr) -> tl.tensor:  # noqa: E741
    """Both tiles; they are read once and should not push B and v out of the L2 cache."""
    gate = tl.load(gate_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    up = tl.load(gate_ptrs + I, mask=mask, other=0.0, eviction_policy="evict_first")
    return gate, up


@jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_silu_mul_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    v_ptr: tl.tensor,
    arena_ptr: tl.tensor,
    b_offset_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_slots: tl.tensor,
    gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
    b_offset_stride_l: tl.tensor,
    b_offset_stride_s: tl.tensor,
    rank_stride_l: tl.tensor,
    rank_stride_s: tl.tensor,
    I: tl.constexpr,  # noqa: E741
    NUM_PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    B_ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    N_TILES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    first_n = tl.program_id(0) * (N_TILES * BLOCK_N)
    v_slice = num_tokens.to(tl.int64) * MAX_RANK
    let_next_begin(EARLY)
    end = load_num_tiles(tiles_ptr, True)
    first, num_rows, slot = load_tile(tiles_ptr, tl.program_id(1), True)
    for tile in tl.range(tl.program_id(1), end, tl.num_programs(1), num_stages=1):
        table_row, rank0 = load_rank(slot, rank_ptr, num_slots, rank_stride_l, MAX_RANK)
        _, rank1 = load_rank(slot, rank_ptr + rank_stride_s, num_slots, rank_stride_l, MAX_RANK)
        index = tl.arange(0, BLOCK_T)
        is_row = index < num_rows
        rows = tl.load(order_ptr + first + index, mask=is_row, other=0).to(tl.int64)
        in_rows = gate_up + rows[:, None] * gate_up_stride
        out_rows = out + rows[:, None] * out_stride
        b_offset = b_offset_ptr + table_row * b_offset_stride_l
        b0 = arena_ptr + tl.multiple_of(tl.load(b_offset), B_ALIGNMENT)
        b1 = arena_ptr + tl.multiple_of(tl.load(b_offset + b_offset_stride_s), B_ALIGNMENT)
        wait_for_previous(EARLY)  # It may have written gate_up and v.
        if slot < 0:
            for n_tile in range(N_TILES):
                i = first_n + n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
                mask = is_row[:, None] & (i < I)[None, :]
                gate, up = _load_gate_up(in_rows + i[None, :], mask, I)
                tl.store(out_rows + i[None, :], silu_times(gate, up), mask=mask)
        else:
            v_part = 2 * v_slice
            v0_rows = v_ptr + rows[:, None] * MAX_RANK
            v1_rows = v0_rows + v_slice
            # No branch on the ranks from here on, so that all loads of a tile are under way at once:
            # at rank 0 nothing of B and v is read.
            is_v0 = index < tl.where(rank0 > 0, num_rows, 0)
            is_v1 = index < tl.where(rank1 > 0, num_rows, 0)
            v0 = load_whole_v(v0_rows, v_part, is_v0, rank0, MAX_RANK, NUM_PARTS, BLOCK_R)
            v1 = load_whole_v(v1_rows, v_part, is_v1, rank1, MAX_RANK, NUM_PARTS, BLOCK_R)
            for n_tile in tl.range(0, N_TILES, num_stages=NUM_STAGES):
                i = first_n + n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
                is_i = i < I
                mask = is_row[:, None] & is_i[None, :]
                gate, up = _load_gate_up(in_rows + i[None, :], mask, I)
                product0 = expand_tile(
                    *(v0, v0_rows, v_part, b0 + i[None, :], is_v0, is_i, rank0, I),
                    *(gate_up.dtype.element_ty, MAX_RANK, NUM_PARTS, False),
                    *(BLOCK_T, BLOCK_N, BLOCK_R),
                )
                product1 = expand_tile(
                    *(v1, v1_rows, v_part, b1 + i[None, :], is_v1, is_i, rank1, I),
                    *(gate_up.dtype.element_ty, MAX_RANK, NUM_PARTS, False),
                    *(BLOCK_T, BLOCK_N, BLOCK_R),
                )
                gate, up = add_product(gate, product0, rank0), add_product(up, product1, rank1)
                tl.store(out_rows + i[None, :], silu_times(gate, up), mask=mask)
        next_tile = tile + tl.num_programs(1)
        first, num_rows, slot = load_tile(tiles_ptr, next_tile, next_tile < end)
    wait_for_previous(EARLY)


def lora_silu_mul(
    gate_up: Tensor,
    delta: LoRADelta,
    out: Tensor | None = None,
    *,
    launch: LoRASiluMulLaunch | None = None,
) -> Tensor:
    """``silu(gate) * up`` for gate and up side by side, after the adapters' deltas.

    Parameters
    ----------
    gate_up
        [T, 2 I] on CUDA, fp16 or bf16, or fp32, of the arena's dtype: the base product, with bias where the
        layer has one. Neighbouring elements of a row lie side by side. Not changed.
    delta
        What is still to be added to it: slices (I, I), v [P, 2, T, R]. Expanded already: `silu_mul` adds it.
    out
        [T, I], the dtype of ``gate_up``. None = a new tensor.
    launch
        None = `choose_silu_mul_launch`.

    Returns
    -------
    Tensor
        ``out``, or [T, I] contiguous. Rows of padded tokens are not written.

    Raises
    ------
    ValueError
        Shapes, dtypes or strides are not these.

    Notes
    -----
    One launch on the current stream. Rows whose slot holds no adapter become NaN. Up to 512 rows it may begin
    while the kernels before still run; see `wait_for_previous` for what must be complete.
    """
    out = check_silu_mul(gate_up, out)
    table, metadata, v = delta.table, delta.metadata, delta.v
    size = out.shape[1]
    if table.output_slices != (size, size) or table.arena.dtype != gate_up.dtype:
        raise ValueError(
            f"gate_up is {tuple(gate_up.shape)} {gate_up.dtype}, the adapters' slices {table.output_slices} "
            f"{table.arena.dtype}, expected twice {size} of {gate_up.dtype}"
        )
    check_expand(gate_up, v, table.arena, table, metadata, (table.output_slices, 0))
    if delta.expanded is not None:
        return silu_mul(gate_up, out, delta)
    num_parts, _, num_tokens, max_rank = v.shape
    if num_tokens == 0:
        return out
    launch = launch or choose_silu_mul_launch(token_class(num_tokens), max_rank, gate_up.element_size())
    num_n_tiles = ceil_div(size, launch.n_tiles * launch.block_n)
    num_bytes = launch.num_buffered * gate_up.element_size()
    programs = choose_num_tile_programs(metadata, launch.block_t, num_n_tiles, num_bytes, launch.num_warps)
    _lora_silu_mul_kernel[(num_n_tiles, programs)](
        *(gate_up, out, v, table.arena, table.b_offset, table.lora_rank),
        metadata.token_indices_sorted_by_lora_ids,
        metadata.tiles_of(launch.block_t),
        *(num_tokens, table.lora_rank.shape[0]),
        *(gate_up.stride(0), out.stride(0), *table.b_offset.stride(), *table.lora_rank.stride()),
        I=size,
        NUM_PARTS=num_parts,
        MAX_RANK=max_rank,
        B_ALIGNMENT=16 // gate_up.element_size(),
        BLOCK_T=launch.block_t,
        BLOCK_N=launch.block_n,
        BLOCK_R=launch.block_r,
        N_TILES=launch.n_tiles,
        NUM_STAGES=launch.num_stages,
        num_warps=launch.num_warps,
        num_stages=2,
        **early_launch(gate_up, MOST_EARLY_LORA_ROWS),
    )
    return out
