"""From a plan's block on the device to the tensors that the model and attention read, without the host.

Semantics
---------
``apply_page_table_deltas``, for delta d of D and j in [0, offsets[d + 1] - offsets[d])::

    page_table[rows[d], starts[d] + j] = pages[offsets[d] + j]

``prepare_step``, for row b of P, r = page_table_rows[b], and its token t in [query_start_loc[b],
query_start_loc[b] + num_scheduled_tokens[b])::

    position       = num_computed_tokens[b] + t - query_start_loc[b]
    positions[t]   = position
    slots[t]       = page_table[r, position // G] * G + position % G
    tokens[t]      = token_ids[t], or last_tokens[r] where token_ids[t] is -1
    page_indices[page_indptr[b] + j] = page_table[r, j]          j in [0, page_indptr[b + 1] - page_indptr[b])
    row_failed[b]  = 1 if a token of the row is unknown and last_tokens[r] < 0 (its token is 0 then), else 0

A row without tokens is padded: its page indices are 0. Tokens behind those of the last row, up to T, are
padded: token 0, position 0, slot -1. So everything that a captured graph of P rows and T tokens reads is
written in every step; page indices behind page_indptr[P] are read by nobody and stay.

All plan arrays are int32, 1-D, contiguous. Grids: one program a delta; two a row (tokens, page indices) and
two more, of which one writes the padded tokens. Both are safe in a captured graph: sizes come from shapes,
the rest from the device.
"""

from __future__ import annotations

from torch import Tensor

from lora_serve.kernels._triton import jit, tl

_BLOCK = 1024
_NUM_WARPS = 4

# Views of the plan's block and of what follows it: their places depend on the plan's sizes.
_DELTA_ARRAYS = ["delta_rows", "delta_starts", "delta_offsets", "delta_pages"]
_PLAN_ARRAYS = [
    "num_scheduled_tokens",
    "num_computed_tokens",
    "query_start_loc",
    "page_table_rows",
    "token_ids",
    "page_indptr",
]


@jit(do_not_specialize=_DELTA_ARRAYS)
def _apply_deltas_kernel(
    page_table: tl.tensor,
    delta_rows: tl.tensor,
    delta_starts: tl.tensor,
    delta_offsets: tl.tensor,
    delta_pages: tl.tensor,
    table_rows: tl.tensor,
    table_width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    d = tl.program_id(0)
    row = tl.load(delta_rows + d)
    start = tl.load(delta_starts + d)
    begin = tl.load(delta_offsets + d)
    end = tl.load(delta_offsets + d + 1)
    to_row = page_table + row.to(tl.int64) * table_width
    # What lies outside the table is dropped: plans are the scheduler's, but memory must never be another's.
    end = tl.where((row >= 0) & (row < table_rows), end, begin)
    for first in range(begin, end, BLOCK):
        source = first + tl.arange(0, BLOCK)
        pages = tl.load(delta_pages + source, mask=source < end)
        entry = start + source - begin
        tl.store(to_row + entry, pages, mask=(source < end) & (entry >= 0) & (entry < table_width))


@jit
def _write_tokens(
    b: tl.tensor,
    row: tl.tensor,
    num_tokens: tl.tensor,
    num_computed_tokens: tl.tensor,
    query_start_loc: tl.tensor,
    token_ids: tl.tensor,
    page_table: tl.tensor,
    last_tokens: tl.tensor,
    token_ids_out: tl.tensor,
    positions_out: tl.tensor,
    slots_out: tl.tensor,
    row_failed_out: tl.tensor,
    table_width: tl.tensor,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first_token = tl.load(query_start_loc + b)
    first_position = tl.load(num_computed_tokens + b)
    last_token = tl.load(last_tokens + row)
    has_no_last = (last_token < 0).to(tl.int32)
    failed = tl.full((), 0, tl.int32)
    for first in range(0, num_tokens, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mask = j < num_tokens
        token = tl.load(token_ids + first_token + j, mask=mask, other=0)
        failed = tl.maximum(failed, tl.max(tl.where(token < 0, has_no_last, 0), axis=0))
        token = tl.where(token < 0, tl.maximum(last_token, 0), token)
        position = first_position + j
        page = tl.load(page_table + row * table_width + position // G, mask=mask, other=0)
        slot = page.to(tl.int64) * G + position % G
        tl.store(token_ids_out + first_token + j, token.to(tl.int64), mask=mask)
        tl.store(positions_out + first_token + j, position.to(tl.int64), mask=mask)
        tl.store(slots_out + first_token + j, slot, mask=mask)
    tl.store(row_failed_out + b, failed)


@jit
def _write_page_indices(
    b: tl.tensor,
    row: tl.tensor,
    num_tokens: tl.tensor,
    page_table: tl.tensor,
    page_indptr: tl.tensor,
    page_indices_out: tl.tensor,
    table_width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    begin = tl.load(page_indptr + b)
    num_pages = tl.load(page_indptr + b + 1) - begin
    num_real = tl.where(num_tokens > 0, tl.minimum(num_pages, table_width), 0)
    for first in range(0, num_pages, BLOCK):
        j = first + tl.arange(0, BLOCK)
        pages = tl.load(page_table + row * table_width + j, mask=j < num_real, other=0)
        tl.store(page_indices_out + begin + j, pages, mask=j < num_pages)


@jit(do_not_specialize=[*_PLAN_ARRAYS, "num_rows", "num_padded_tokens"])
def _prepare_step_kernel(
    num_scheduled_tokens: tl.tensor,
    num_computed_tokens: tl.tensor,
    query_start_loc: tl.tensor,
    page_table_rows: tl.tensor,
    token_ids: tl.tensor,
    page_table: tl.tensor,
    last_tokens: tl.tensor,
    page_indptr: tl.tensor,
    token_ids_out: tl.tensor,
    positions_out: tl.tensor,
    slots_out: tl.tensor,
    page_indices_out: tl.tensor,
    row_failed_out: tl.tensor,
    num_rows: tl.tensor,
    num_padded_tokens: tl.tensor,
    table_width: tl.tensor,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    b = tl.program_id(0)
    part = tl.program_id(1)
    if b == num_rows:
        if part == 0:
            first_padded = tl.load(query_start_loc + num_rows)
            for first in range(first_padded, num_padded_tokens, BLOCK):
                t = first + tl.arange(0, BLOCK)
                zero = tl.zeros((BLOCK,), tl.int64)
                tl.store(token_ids_out + t, zero, mask=t < num_padded_tokens)
                tl.store(positions_out + t, zero, mask=t < num_padded_tokens)
                tl.store(slots_out + t, zero - 1, mask=t < num_padded_tokens)
    else:
        row = tl.load(page_table_rows + b).to(tl.int64)
        num_tokens = tl.load(num_scheduled_tokens + b)
        if part == 0:
            _write_tokens(
                b,
                row,
                num_tokens,
                num_computed_tokens,
                query_start_loc,
                token_ids,
                page_table,
                last_tokens,
                token_ids_out,
                positions_out,
                slots_out,
                row_failed_out,
                table_width,
                G,
                BLOCK,
            )
        else:
            _write_page_indices(
                b, row, num_tokens, page_table, page_indptr, page_indices_out, table_width, BLOCK
            )


def apply_page_table_deltas(
    page_table: Tensor, delta_rows: Tensor, delta_starts: Tensor, delta_offsets: Tensor, delta_pages: Tensor
) -> None:
    """Write a plan's changes into the page table, in place.

    Parameters
    ----------
    page_table
        [N + 1, W] int32 on CUDA, contiguous; the last row is that of padded rows.
    delta_rows, delta_starts
        [D] int32: row, all different, and its first entry that changes.
    delta_offsets
        [D + 1] int32: the entries' values are ``delta_pages[offsets[d] : offsets[d + 1]]``.
    delta_pages
        [pages] int32.

    Raises
    ------
    ValueError
        The shapes do not fit together.

    Notes
    -----
    Runs on the current stream, O(changed entries). Entries outside the table are not written.
    """
    num_deltas = delta_rows.shape[0]
    if delta_starts.shape[0] != num_deltas or delta_offsets.shape[0] != num_deltas + 1:
        raise ValueError(
            f"{num_deltas} delta rows with {delta_starts.shape[0]} starts and {delta_offsets.shape[0]} "
            "offsets, expected as many starts and one offset more"
        )
    if page_table.dim() != 2 or not page_table.is_contiguous():
        raise ValueError(f"page_table is {tuple(page_table.shape)}, expected [rows, entries] contiguous")
    if num_deltas:
        table_rows, table_width = page_table.shape
        _apply_deltas_kernel[(num_deltas,)](
            page_table,
            delta_rows,
            delta_starts,
            delta_offsets,
            delta_pages,
            table_rows,
            table_width,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )


def prepare_step(
    num_scheduled_tokens: Tensor,
    num_computed_tokens: Tensor,
    query_start_loc: Tensor,
    page_table_rows: Tensor,
    token_ids: Tensor,
    page_table: Tensor,
    last_tokens: Tensor,
    page_indptr: Tensor,
    *,
    page_size: int,
    token_ids_out: Tensor,
    positions_out: Tensor,
    slot_mapping_out: Tensor,
    page_indices_out: Tensor,
    row_failed_out: Tensor,
) -> None:
    """Write token ids, positions, slots, page indices and failed rows of a step.

    Parameters
    ----------
    num_scheduled_tokens, num_computed_tokens, page_table_rows
        [P] int32 on CUDA, padded rows included: 0 tokens, and a row of the table that no request has.
    query_start_loc
        [P + 1] int32; the last entry is the number of tokens that are not padded, at most T.
    token_ids
        [T] int32, padded tokens included; -1 = the token that the row sampled last.
    page_table
        [N + 1, W] int32, contiguous; the step's deltas are in it.
    last_tokens
        [N + 1] int32 by row of the table: last sampled token; -1 = none, -2 = sampling failed.
    page_indptr
        [P + 1] int32, ascending from 0: where each row's page indices go.
    page_size
        G.
    token_ids_out, positions_out
        [T] int64, written: every token is valid input; padded ones are 0.
    slot_mapping_out
        [T] int64, written; -1 = padded.
    page_indices_out
        [at least page_indptr[P]] int32, written up to there; 0 for padded rows.
    row_failed_out
        [P] int32, written: 1 = the row has no input token, runs with token 0 and must not sample.

    Raises
    ------
    ValueError
        The shapes do not fit together.

    Notes
    -----
    Runs on the current stream.
    """
    num_rows, num_padded_tokens = page_table_rows.shape[0], token_ids.shape[0]
    _check_step(
        num_rows,
        of_rows=(num_scheduled_tokens, num_computed_tokens, row_failed_out),
        of_row_ends=(query_start_loc, page_indptr),
        num_tokens=num_padded_tokens,
        of_tokens=(token_ids_out, positions_out, slot_mapping_out),
    )
    if page_table.dim() != 2 or not page_table.is_contiguous() or last_tokens.shape != page_table.shape[:1]:
        raise ValueError(
            f"page_table is {tuple(page_table.shape)}, last_tokens {tuple(last_tokens.shape)}, expected "
            "[rows, entries] contiguous and [rows]"
        )
    arrays = (num_scheduled_tokens, num_computed_tokens, query_start_loc, page_table_rows, token_ids)
    tables = (page_table, last_tokens, page_indptr)
    outputs = (token_ids_out, positions_out, slot_mapping_out, page_indices_out, row_failed_out)
    _prepare_step_kernel[(num_rows + 1, 2)](
        *arrays,
        *tables,
        *outputs,
        num_rows,
        num_padded_tokens,
        page_table.shape[1],
        G=page_size,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


def _check_step(
    num_rows: int,
    *,
    of_rows: tuple[Tensor, ...],
    of_row_ends: tuple[Tensor, ...],
    num_tokens: int,
    of_tokens: tuple[Tensor, ...],
) -> None:
    if (
        any(array.shape != (num_rows,) for array in of_rows)
        or any(array.shape != (num_rows + 1,) for array in of_row_ends)
        or any(array.shape != (num_tokens,) for array in of_tokens)
    ):
        raise ValueError(
            f"for {num_rows} rows and {num_tokens} tokens: num_scheduled_tokens, num_computed_tokens, "
            f"row_failed_out are {[tuple(array.shape) for array in of_rows]}, query_start_loc and "
            f"page_indptr {[tuple(array.shape) for array in of_row_ends]}, token_ids_out, positions_out, "
            f"slot_mapping_out {[tuple(array.shape) for array in of_tokens]}"
        )
