"""Queries, keys and values between their projection and attention, whose deltas are still to be added.

Semantics
---------
For token t with adapter slot l, and slice s of queries (0), keys (1) or values (2), whose columns of qkv
start at ``offset_s``::

    x[t, offset_s + o] = round(qkv[t, offset_s + o] + sum_r round(sum_p v[p, s, t, r]) * B[l, s][r, o])

with r < rank[l, s]; and then all that `rotary_store` says, for x in place of qkv. This is
`triton_lora_expand` followed by `norm_rotary_store`, with the same roundings. Sums are in fp32; the order of
those over the rank and over a head may differ from theirs where tiles do.

- Slot -1, and a slice without a module (rank 0): x is qkv, bit for bit; v is not read.
- A slot that holds no adapter (rank -1), or one that cannot be: its queries, keys and values become NaN.
- Columns of v at or above the rank are dropped, whatever they hold.
- Rows in no group, as padded ones are: nothing is read or written. An empty step launches nothing.
- Slot of the mapping -1: the key and the value are not stored.

Layouts: those of `norm_rotary_store`; v [P, 3, T, R] contiguous; B [R, O_s] in the arena, at a multiple of 16
bytes.

Grid: (blocks of heads of one kind, programs that share the tiles of tokens), see `triton_lora_tiles`; tokens
without an adapter are a group like others. A head is a tile of two halves, each a product of its own, so that
the rotation needs no exchange between them; the heads of a program share v, cosines and sines. Where
kernels are launched early, a program finds its rows, their angles and pages, and its B before it waits, see
`wait_for_previous`.

Source: an expand in front of the operation that reads its result, as epilogues of matrix products have it;
the rest is `rotary_store`'s.
"""

from __future__ import annotations

from math import gcd

from torch import Tensor

from lora_serve.kernels._triton import (
    MOST_EARLY_LORA_ROWS,
    ceil_div,
    early_launch,
    jit,
    let_next_begin,
    next_power_of_2,
    tl,
    wait_for_previous,
)
from lora_serve.kernels.lora_delta import LoRADelta
from lora_serve.kernels.rotary_store import (
    check_queries,
    check_rotary_store,
    norm_rotary_store,
    rotate_planes,
)
from lora_serve.kernels.triton_lora_expand import add_product, check_expand, expand_tile, load_whole_v
from lora_serve.kernels.triton_lora_tiles import (
    NOT_SPECIALIZED,
    choose_num_tile_programs,
    choose_rotary_store_launch,
    load_num_tiles,
    load_rank,
    load_tile,
    token_class,
)
from lora_serve.kernels.tuned_lora_tiles import LoRARotaryStoreLaunch


@jit
def _find_heads(HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr) -> tl.tensor:
    """The program's slice, its first head, how many heads the slice has, and the column where it starts.

    Blocks of queries, keys and values are numbered one after the other.
    """
    Q_BLOCKS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    KV_BLOCKS: tl.constexpr = (HKV + HEADS - 1) // HEADS
    block = tl.program_id(0)
    slice_index = (block >= Q_BLOCKS).to(tl.int32) + (block >= Q_BLOCKS + KV_BLOCKS).to(tl.int32)
    first_block = tl.where(slice_index == 0, 0, Q_BLOCKS + (slice_index - 1) * KV_BLOCKS)
    num_heads = tl.where(slice_index == 0, HQ, HKV)
    column = tl.where(slice_index == 0, 0, (HQ + (slice_index - 1) * HKV) * D)
    return slice_index, (block - first_block) * HEADS, num_heads, column


@jit
def _find_in_pages(
    pages: tl.tensor, kv_slot: tl.tensor, page_stride: tl.tensor, G: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """Where the tokens' WIDTH elements start, [tokens, 1]."""
    page = kv_slot // G
    return (pages + page * page_stride + (kv_slot - page * G) * WIDTH)[:, None]


@jit
def _load_weight(
    q_weight: tl.tensor, k_weight: tl.tensor, slice_index: tl.tensor, i: tl.tensor, HALF: tl.constexpr
) -> tl.tensor:
    of_queries = tl.load(q_weight + i, mask=i < HALF, other=0.0)
    of_keys = tl.load(k_weight + i, mask=i < HALF, other=0.0)
    return tl.where(slice_index == 0, of_queries, of_keys).to(tl.float32)[None, :]


@jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_rotary_store_kernel(
    qkv: tl.tensor,
    v_ptr: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    slot_mapping: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    query: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    arena_ptr: tl.tensor,
    b_offset_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_slots: tl.tensor,
    eps: tl.tensor,
    qkv_stride: tl.tensor,
    query_stride: tl.tensor,
    k_page_stride: tl.tensor,
    v_page_stride: tl.tensor,
    b_offset_stride_l: tl.tensor,
    b_offset_stride_s: tl.tensor,
    rank_stride_l: tl.tensor,
    rank_stride_s: tl.tensor,
    G: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    D_ALIGNMENT: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    B_ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    HALF: tl.constexpr = D // 2
    slice_index, first_n, num_heads, column = _find_heads(HQ, HKV, D, HEADS)
    column = tl.multiple_of(column, D_ALIGNMENT)
    i = tl.arange(0, HALF_BLOCK)
    v_slice = num_tokens.to(tl.int64) * MAX_RANK

    let_next_begin(EARLY)
    w1 = None
    w2 = None
    if q_weight is not None:
        w1 = _load_weight(q_weight, k_weight, slice_index, i, HALF)
        w2 = _load_weight(q_weight + HALF, k_weight + HALF, slice_index, i, HALF)
    end = load_num_tiles(tiles_ptr, True)
    first_row, num_rows, adapter_slot = load_tile(tiles_ptr, tl.program_id(1), True)
    for tile in tl.range(tl.program_id(1), end, tl.num_programs(1), num_stages=1):
        table_row, rank = load_rank(
            adapter_slot, rank_ptr + slice_index * rank_stride_s, num_slots, rank_stride_l, MAX_RANK
        )
        rank = tl.where(adapter_slot < 0, 0, rank)
        b_start = tl.load(b_offset_ptr + table_row * b_offset_stride_l + slice_index * b_offset_stride_s)
        index = tl.arange(0, BLOCK_T)
        is_row = index < num_rows
        rows = tl.load(order_ptr + first_row + index, mask=is_row, other=0).to(tl.int64)
        # At rank 0 nothing of v and B is read, and no angle for values. Masks, not branches: loads
        # inside of one would not be under way together with others.
        is_v = index < tl.where(rank > 0, num_rows, 0)
        is_turned = index < tl.where(slice_index < 2, num_rows, 0)
        position = tl.load(positions + rows, mask=is_turned, other=0)
        cos_row = cos_sin + position[:, None] * D + i[None, :]
        has_angle = is_turned[:, None] & (i < HALF)[None, :]
        cos = tl.load(cos_row, mask=has_angle, other=0.0)
        sin = tl.load(cos_row + HALF, mask=has_angle, other=0.0)
        if slice_index == 0:
            to_rows = query + rows[:, None] * query_stride
            is_stored = is_row
        else:
            kv_slot = tl.load(slot_mapping + rows, mask=is_row, other=-1)
            is_stored = kv_slot >= 0
            if slice_index == 1:
                to_rows = _find_in_pages(k_pages, kv_slot, k_page_stride, G, HKV * D)
            else:
                to_rows = _find_in_pages(v_pages, kv_slot, v_page_stride, G, HKV * D)
        from_rows = qkv + rows[:, None] * qkv_stride + column
        b_block = arena_ptr + tl.multiple_of(b_start, B_ALIGNMENT)
        v_rows = v_ptr + slice_index * v_slice + rows[:, None] * MAX_RANK
        wait_for_previous(EARLY)  # It may have written qkv and v.
        v = load_whole_v(v_rows, 3 * v_slice, is_v, rank, MAX_RANK, NUM_PARTS, BLOCK_R)
        for head in tl.range(0, HEADS, num_stages=NUM_STAGES):
            n = first_n + head
            is_i = i < tl.where(n < num_heads, HALF, 0)
            at = (n * D + i)[None, :]
            mask = is_row[:, None] & is_i[None, :]
            first = tl.load(from_rows + at, mask=mask, other=0.0)
            second = tl.load(from_rows + at + HALF, mask=mask, other=0.0)
            product1 = expand_tile(
                *(v, v_rows, 3 * v_slice, b_block + at, is_v, is_i, rank, num_heads * D),
                *(qkv.dtype.element_ty, MAX_RANK, NUM_PARTS, False, BLOCK_T, HALF_BLOCK, BLOCK_R),
            )
            product2 = expand_tile(
                *(v, v_rows, 3 * v_slice, b_block + at + HALF, is_v, is_i, rank, num_heads * D),
                *(qkv.dtype.element_ty, MAX_RANK, NUM_PARTS, False, BLOCK_T, HALF_BLOCK, BLOCK_R),
            )
            first, second = add_product(first, product1, rank), add_product(second, product2, rank)
            turned1, turned2 = rotate_planes(first, second, w1, w2, cos, sin, eps, D)
            mask = is_stored[:, None] & is_i[None, :]
            tl.store(to_rows + at, tl.where(slice_index < 2, turned1, first), mask=mask)
            tl.store(to_rows + at + HALF, tl.where(slice_index < 2, turned2, second), mask=mask)
        next_tile = tile + tl.num_programs(1)
        first_row, num_rows, adapter_slot = load_tile(tiles_ptr, next_tile, next_tile < end)
    wait_for_previous(EARLY)


def lora_norm_rotary_store(
    qkv: Tensor,
    delta: LoRADelta,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    out: Tensor | None = None,
    *,
    launch: LoRARotaryStoreLaunch | None = None,
) -> Tensor:
    """Add the adapters' deltas, normalise and rotate queries and keys, and store keys and values.

    Parameters
    ----------
    qkv
        [T, (Hq + 2 Hkv) * D] on CUDA, fp16 or bf16, or fp32, of the arena's dtype: the base product, with
        bias where the layer has one. Its query part is changed, unless ``out`` is given; nothing else is.
    delta
        What is still to be added to it: slices (Hq * D, Hkv * D, Hkv * D), v [P, 3, T, R]. Expanded already:
        `norm_rotary_store` adds it.
    positions, cos_sin, slot_mapping, k_pages, v_pages, q_weight, k_weight, eps, out
        See `norm_rotary_store`.
    launch
        None = `choose_rotary_store_launch`.

    Returns
    -------
    Tensor
        [T, Hq, D], the queries: ``out``, or a view of ``qkv``. Rows of padded tokens are not written.

    Raises
    ------
    ValueError
        Shapes, dtypes or strides are not these.

    Notes
    -----
    One launch on the current stream. Rows whose slot holds no adapter become NaN, in the pages too. Up to 512
    rows it may begin while the kernels before still run; see `wait_for_previous` for what must be complete.
    """
    num_tokens, _, num_kv_heads, head_dim, num_heads = check_rotary_store(
        qkv, positions, cos_sin, slot_mapping, k_pages, v_pages, q_weight, k_weight
    )
    out = check_queries(qkv, out, (num_tokens, num_heads, head_dim))
    table, metadata, v = delta.table, delta.metadata, delta.v
    widths = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    if table.output_slices != widths or table.arena.dtype != qkv.dtype:
        raise ValueError(
            f"the adapters' slices are {table.output_slices} of {table.arena.dtype}, expected {widths} of "
            f"{qkv.dtype} as qkv"
        )
    check_expand(qkv, v, table.arena, table, metadata, (table.output_slices, 0))
    if delta.expanded is not None:
        inputs = (positions, cos_sin, slot_mapping, k_pages, v_pages)
        return norm_rotary_store(qkv, *inputs, q_weight, k_weight, eps, out, delta)
    if num_tokens:
        max_rank, element_size = v.shape[-1], qkv.element_size()
        launch = launch or choose_rotary_store_launch(
            token_class(num_tokens), head_dim, max_rank, element_size
        )
        places = (positions, cos_sin, slot_mapping, k_pages, v_pages, out)
        _launch(qkv, delta, places, (q_weight, k_weight, eps), launch)
    return out


def _launch(
    qkv: Tensor,
    delta: LoRADelta,
    places: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None, float],
    launch: LoRARotaryStoreLaunch,
) -> None:
    """All was checked."""
    table, metadata, v = delta.table, delta.metadata, delta.v
    k_pages, v_pages, out = places[3:]
    num_tokens, num_heads, head_dim = out.shape
    _, page_size, num_kv_heads, _ = k_pages.shape
    num_parts, _, _, max_rank = v.shape
    blocks = ceil_div(num_heads, launch.heads) + 2 * ceil_div(num_kv_heads, launch.heads)
    num_bytes = launch.num_buffered(head_dim) * qkv.element_size()
    programs = choose_num_tile_programs(metadata, launch.block_t, blocks, num_bytes, launch.num_warps)
    _lora_rotary_store_kernel[(blocks, programs)](
        qkv,
        v,
        *places,
        *norms[:2],
        table.arena,
        table.b_offset,
        table.lora_rank,
        metadata.token_indices_sorted_by_lora_ids,
        metadata.tiles_of(launch.block_t),
        *(num_tokens, table.lora_rank.shape[0]),
        norms[2],
        *(qkv.stride(0), out.stride(0), k_pages.stride(0), v_pages.stride(0)),
        *(*table.b_offset.stride(), *table.lora_rank.stride()),
        G=page_size,
        HQ=num_heads,
        HKV=num_kv_heads,
        D=head_dim,
        D_ALIGNMENT=gcd(16, head_dim),
        NUM_PARTS=num_parts,
        MAX_RANK=max_rank,
        B_ALIGNMENT=16 // qkv.element_size(),
        BLOCK_T=launch.block_t,
        HALF_BLOCK=max(next_power_of_2(head_dim // 2), 16),
        BLOCK_R=launch.block_r,
        HEADS=launch.heads,
        NUM_STAGES=launch.num_stages,
        num_warps=launch.num_warps,
        num_stages=2,
        **early_launch(qkv, MOST_EARLY_LORA_ROWS),
    )
