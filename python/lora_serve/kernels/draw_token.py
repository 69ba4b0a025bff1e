"""Random tokens on CUDA, one for each uniform number.

Semantics
---------
For entry m of M, ``row = rows[m]`` and ``best`` the row's largest logit::

    score[v]    = (logits[row, v] - best) / temperature[m]
    weight[v]   = floor(exp(score[v]) * 2**B)      where score[v] >= floors[m], else 0
    tokens[row] = min {v : weight[0] + ... + weight[v] > floor(uniforms[m] * sum of all weights)}

This is the inverse of the cumulative distribution in token order. Weights are integers of 64 bits, with B so
large that their sum just fits (2**44 for 152,000 tokens): sums are exact whatever their order, so the same
token comes each time, and one of weight 0 never does. Before the call ``tokens[row]`` is the row's best
token; where it is negative, the row has failed and nothing is drawn. Floors are the row's truncation (see
``draw_token_floors``); the best token has the score 0 and must be above the floor.

Grid: (M, blocks of the vocabulary) for the blocks' sums, then one program an entry, which looks into the
block that the number falls into. No entry: nothing is launched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels._triton import ceil_div, jit, next_power_of_2, tl
from lora_serve.kernels.draw_token_floors import check_entries

_BLOCK = 4096
_NUM_WARPS = 4
_SUM_BITS = 62


@jit
def _weights(
    logits: tl.tensor,
    row_start: tl.tensor,
    v: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    floors: tl.tensor,
    m: tl.tensor,
    V: tl.constexpr,
    SCALE: tl.constexpr,
) -> tl.tensor:
    x = tl.load(logits + row_start + v, mask=v < V, other=float("-inf")).to(tl.float32)
    largest = tl.load(logits + row_start + best).to(tl.float32)
    score = tl.div_rn(x - largest, tl.load(temperature + m))
    weights = tl.where((v < V) & (score >= tl.load(floors + m)), tl.exp(score), 0.0)
    return (weights * SCALE).to(tl.int64)


@jit(do_not_specialize=["rows", "temperature", "floors"])
def _sum_weights_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    temperature: tl.tensor,
    floors: tl.tensor,
    sums: tl.tensor,
    logits_stride: tl.tensor,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    m = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.load(rows + m).to(tl.int64)
    best = tl.load(tokens + row)
    if best >= 0:
        v = block * BLOCK + tl.arange(0, BLOCK)
        weights = _weights(logits, row * logits_stride, v, best, temperature, floors, m, V, SCALE)
        tl.store(sums + m.to(tl.int64) * tl.num_programs(1) + block, tl.sum(weights, axis=0))


@jit(do_not_specialize=["rows", "temperature", "floors", "uniforms"])
def _draw_token_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    temperature: tl.tensor,
    floors: tl.tensor,
    sums: tl.tensor,
    logits_stride: tl.tensor,
    uniforms: tl.tensor,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    m = tl.program_id(0)
    row = tl.load(rows + m).to(tl.int64)
    best = tl.load(tokens + row)
    if best >= 0:
        block = tl.arange(0, BLOCKS)
        parts = tl.load(sums + m.to(tl.int64) * NUM_BLOCKS + block, mask=block < NUM_BLOCKS, other=0)
        total = tl.sum(parts, axis=0)
        target = (tl.load(uniforms + m) * total.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, total - 1)  # The product may be rounded up.
        chosen = tl.sum((tl.cumsum(parts, axis=0) <= target).to(tl.int32), axis=0)
        target -= tl.sum(tl.where(block < chosen, parts, 0), axis=0)
        v = chosen * BLOCK + tl.arange(0, BLOCK)
        weights = _weights(logits, row * logits_stride, v, best, temperature, floors, m, V, SCALE)
        is_before = tl.cumsum(weights, axis=0) <= target
        tl.store(tokens + row, chosen * BLOCK + tl.sum(is_before.to(tl.int32), axis=0))


def draw_token(
    logits: Tensor, rows: Tensor, tokens: Tensor, temperature: Tensor, floors: Tensor, uniforms: Tensor
) -> None:
    """Draw a token for some of the rows.

    Parameters
    ----------
    logits
        [N, V] on CUDA, fp32, fp16 or bf16; neighbouring elements of a row lie side by side. Not changed. The
        largest of each row that has not failed is finite, none is NaN.
    rows
        [M] int32 in [0, N), no two alike.
    tokens
        [N] int32; at ``rows``: the row's best token, which is replaced; negative = the row has failed.
    temperature
        [M] fp32, above 0.
    floors
        [M] fp32, at most 0: tokens of a lower score are dropped; -inf = none is.
    uniforms
        [M] fp64 in [0, 1).

    Raises
    ------
    ValueError
        The shapes or dtypes do not fit together.

    Notes
    -----
    Runs on the current stream. Allocates 8 bytes an entry for each 4096 logits.
    """
    entries = {"temperature": temperature, "floors": floors, "uniforms": uniforms}
    check_entries(logits, rows, tokens, entries)
    num_entries, size = len(rows), logits.shape[1]
    if num_entries == 0:
        return
    num_blocks = ceil_div(size, _BLOCK)
    sums = torch.empty((num_entries, num_blocks), dtype=torch.int64, device=logits.device)
    arrays = (logits, rows, tokens, temperature, floors, sums, logits.stride(0))
    constants = {"V": size, "SCALE": 2.0 ** (_SUM_BITS - size.bit_length()), "BLOCK": _BLOCK}
    _sum_weights_kernel[(num_entries, num_blocks)](*arrays, num_warps=_NUM_WARPS, **constants)
    _draw_token_kernel[(num_entries,)](
        *arrays,
        uniforms,
        NUM_BLOCKS=num_blocks,
        BLOCKS=next_power_of_2(num_blocks),
        num_warps=_NUM_WARPS,
        **constants,
    )
