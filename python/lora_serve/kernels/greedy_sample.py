"""The best token of each row on CUDA, and the record of each row's last token.

Semantics
---------
``greedy_sample``, for row b of B and r = page_table_rows[b]::

    best   = max_v logits[b, v]                          NaN counts as more than any number
    token  = min {v : logits[b, v] = best}               if best is finite and row_failed[b] is 0, else -2
    out[b] = last_tokens[r] = token

``set_last_tokens`` does the last line for tokens that were chosen elsewhere; negative ones count as failed.

Values are compared in fp32, where those of 16-bit types are exact. -0 equals 0. Rows with the same r (padded
rows, which all have the table's last row) leave any of their tokens there. Grid: (rows, blocks of the
vocabulary), then one program a row over the blocks' results: two stages and no atomics, so the same bits each
time. No row: nothing is launched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels._triton import ceil_div, jit, next_power_of_2, tl

_BLOCK = 4096
_NUM_WARPS = 4
_SET_BLOCK = 256


@jit
def _best_of_block_kernel(
    logits: tl.tensor,
    best: tl.tensor,
    best_id: tl.tensor,
    logits_stride: tl.tensor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + b * logits_stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    # NaN becomes infinity: both are refused, and infinity can be compared. The compiler knows no isnan.
    values = tl.where(values != values, float("inf"), values)  # noqa: PLR0124
    largest = tl.max(values, axis=0)
    first = tl.min(tl.where(values == largest, v, V), axis=0)
    at = b * tl.num_programs(1) + block
    tl.store(best + at, largest)
    tl.store(best_id + at, first)


@jit(do_not_specialize=["page_table_rows", "row_failed", "out"])
def _best_of_row_kernel(
    best: tl.tensor,
    best_id: tl.tensor,
    page_table_rows: tl.tensor,
    row_failed: tl.tensor,
    last_tokens: tl.tensor,
    out: tl.tensor,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    b = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    mask = block < NUM_BLOCKS
    at = b.to(tl.int64) * NUM_BLOCKS + block
    values = tl.load(best + at, mask=mask, other=float("-inf"))
    ids = tl.load(best_id + at, mask=mask, other=0x7FFFFFFF)
    row = tl.load(page_table_rows + b).to(tl.int64)
    has_failed = tl.load(row_failed + b) != 0
    largest = tl.max(values, axis=0)
    first = tl.min(tl.where(values == largest, ids, 0x7FFFFFFF), axis=0)
    is_bad = has_failed | (largest == float("inf")) | (largest == float("-inf"))
    token = tl.where(is_bad, -2, first)
    tl.store(out + b, token)
    tl.store(last_tokens + row, token)


@jit(do_not_specialize=["tokens", "page_table_rows", "row_failed", "out", "num_rows"])
def _set_last_tokens_kernel(
    tokens: tl.tensor,
    page_table_rows: tl.tensor,
    row_failed: tl.tensor,
    last_tokens: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = b < num_rows
    token = tl.load(tokens + b, mask=mask, other=0)
    has_failed = tl.load(row_failed + b, mask=mask, other=0) != 0
    row = tl.load(page_table_rows + b, mask=mask, other=0).to(tl.int64)
    token = tl.where(has_failed | (token < 0), -2, token)
    tl.store(out + b, token, mask=mask)
    tl.store(last_tokens + row, token, mask=mask)


def greedy_sample(
    logits: Tensor, page_table_rows: Tensor, row_failed: Tensor, last_tokens: Tensor, out: Tensor
) -> None:
    """Choose the best token of each row, the lowest id among equals.

    Parameters
    ----------
    logits
        [B, V] on CUDA, fp32, fp16 or bf16; neighbouring elements of a row lie side by side. Not changed.
    page_table_rows
        [B] int32, each in [0, N].
    row_failed
        [B] int32; not 0 = the row had no input token.
    last_tokens
        [N + 1] int32, written at ``page_table_rows``.
    out
        [B] int32, written: the token; -2 where the row has failed, a logit is NaN or the largest
        is not finite.

    Raises
    ------
    ValueError
        The shapes do not fit together.

    Notes
    -----
    Runs on the current stream. Allocates 8 bytes for each 4096 logits.
    """
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise ValueError(
            f"logits are {tuple(logits.shape)} with strides {logits.stride()}, expected [B, V] with a "
            "contiguous last axis"
        )
    num_rows, size = logits.shape
    _check_rows(num_rows, page_table_rows, row_failed, out)
    if num_rows == 0:
        return
    num_blocks = ceil_div(size, _BLOCK)
    best = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
    best_id = torch.empty((num_rows, num_blocks), dtype=torch.int32, device=logits.device)
    _best_of_block_kernel[(num_rows, num_blocks)](
        logits, best, best_id, logits.stride(0), V=size, BLOCK=_BLOCK, num_warps=_NUM_WARPS
    )
    _best_of_row_kernel[(num_rows,)](
        best,
        best_id,
        page_table_rows,
        row_failed,
        last_tokens,
        out,
        NUM_BLOCKS=num_blocks,
        BLOCK=next_power_of_2(num_blocks),
        num_warps=1,
    )


def set_last_tokens(
    tokens: Tensor, page_table_rows: Tensor, row_failed: Tensor, last_tokens: Tensor, out: Tensor
) -> None:
    """Record tokens that were chosen elsewhere, as `greedy_sample` records its own.

    Parameters
    ----------
    tokens
        [B] int32; negative = none could be chosen. May be ``out``.
    page_table_rows, row_failed, last_tokens, out
        As in :func:`greedy_sample`; rows that failed, before or now, get -2.

    Raises
    ------
    ValueError
        The shapes do not fit together.

    Notes
    -----
    Runs on the current stream.
    """
    num_rows = tokens.shape[0]
    _check_rows(num_rows, page_table_rows, row_failed, out)
    if num_rows:
        _set_last_tokens_kernel[(ceil_div(num_rows, _SET_BLOCK),)](
            tokens,
            page_table_rows,
            row_failed,
            last_tokens,
            out,
            num_rows,
            BLOCK=_SET_BLOCK,
            num_warps=_NUM_WARPS,
        )


def _check_rows(num_rows: int, page_table_rows: Tensor, row_failed: Tensor, out: Tensor) -> None:
    arrays = (page_table_rows, row_failed, out)
    if any(array.shape != (num_rows,) for array in arrays):
        raise ValueError(
            f"for {num_rows} rows, page_table_rows, row_failed and out are "
            f"{[tuple(array.shape) for array in arrays]}"
        )
