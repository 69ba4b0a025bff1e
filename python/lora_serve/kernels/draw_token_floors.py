"""Where top_k and top_p cut the distributions of random rows on CUDA, found without sorting.

Semantics
---------
For entry m of M, ``row = rows[m]`` and ``best`` the row's largest logit::

    score[v] = (logits[row, v] - best) / temperature[m]
    t        = max {logits[row, u] : sum_{v : logits[row, v] >= logits[row, u]} value[v] >= wanted}
    floor[m] = max(floor[m], score of t)

``raise_floors_by_count``:  value = 1, wanted = counts[m]                                        (top_k)
``raise_floors_by_mass``:   value = exp(score) where score >= floor[m], else 0;
                            wanted = shares[m] * sum_v value[v]                                  (top_p)

So all tokens as good as the last one kept are kept. Entries whose wanted number is 0, and rows whose best
token is negative (they have failed), are left as they are.

The threshold is searched among the ordered integer images of fp32, 4 binary digits a round: 4 rounds for
bf16, 5 for fp16, 8 for fp32 end at a single logit, exactly. Grid of a round: (M, blocks of the vocabulary);
each program leaves its block's sums from each of the 16 digits on, having worked the digit before out of the
sums of the round before, as all programs of the entry do. At last one program an entry raises the floor.
Values are added in fp32 within a block, in fp64 across blocks, always in the same order: the same bits each
time, and a sum from a higher threshold on is never larger. No entry: nothing is launched.

Source: radix select; weighed, and with the digits' sums in place of a histogram's atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels._triton import ceil_div, jit, next_power_of_2, tl

_BLOCK = 4096
_NUM_WARPS = 4
_NUM_ROUNDS = {torch.bfloat16: 4, torch.float16: 5, torch.float32: 8}
"""Rounds until only one value is left: the fp32 images of 16-bit types end in equal binary digits."""
_NUM_DIGITS = 16


@jit
def _ordered_image(values: tl.tensor) -> tl.tensor:
    """int32 numbers in the order of fp32 numbers. That -0 comes before 0 is healed by their equal scores."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _next_image(
    images: tl.tensor,
    sums: tl.tensor,
    wanted: tl.tensor,
    m: tl.tensor,
    num_entries: tl.tensor,
    num_rounds: tl.tensor,
    BY_MASS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Leading binary digits of the threshold's image, 4 for each of the rounds (>= 1) that have run."""
    block = tl.arange(0, BLOCKS)
    last = num_rounds - 1
    at = ((last * num_entries + m).to(tl.int64) * NUM_BLOCKS + block) * 16
    digits = at[:, None] + tl.arange(0, 16)[None, :]
    parts = tl.load(sums + digits, mask=block[:, None] < NUM_BLOCKS, other=0.0)
    if BY_MASS:
        # The first round's first sum is that of all tokens.
        at = (m.to(tl.int64) * NUM_BLOCKS + block) * 16
        of_all = tl.load(sums + at, mask=block < NUM_BLOCKS, other=0.0)
        wanted *= tl.sum(of_all.to(tl.float64), axis=0)
    is_enough = tl.sum(parts.to(tl.float64), axis=0) >= wanted
    num_enough = tl.sum(is_enough.to(tl.int32), axis=0)
    return tl.load(images + last * num_entries + m) + tl.maximum(num_enough, 1) - 1


@jit(do_not_specialize=["rows", "wanted", "temperature", "floors", "num_entries", "num_before"])
def _sum_digits_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    best: tl.tensor,
    wanted: tl.tensor,
    temperature: tl.tensor,
    floors: tl.tensor,
    images: tl.tensor,
    sums: tl.tensor,
    logits_stride: tl.tensor,
    num_entries: tl.tensor,
    num_before: tl.tensor,
    BY_MASS: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    m = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.load(rows + m).to(tl.int64)
    token = tl.load(best + row)
    target = tl.load(wanted + m)
    if (token >= 0) & (target > 0):
        first = tl.full((), -8, tl.int32)
        if num_before > 0:
            image = _next_image(images, sums, target, m, num_entries, num_before, BY_MASS, NUM_BLOCKS, BLOCKS)
            first = image * 16
        if block == 0:
            tl.store(images + num_before * num_entries + m, first)
        v = block * BLOCK + tl.arange(0, BLOCK)
        mask = v < V
        x = tl.load(logits + row * logits_stride + v, mask=mask, other=float("-inf")).to(tl.float32)
        if BY_MASS:
            largest = tl.load(logits + row * logits_stride + token).to(tl.float32)
            score = tl.div_rn(x - largest, tl.load(temperature + m))
            value = tl.where(mask & (score >= tl.load(floors + m)), tl.exp(score), 0.0)
        else:
            value = tl.where(mask, 1.0, 0.0)
        leading = _ordered_image(x) >> (28 - 4 * num_before)
        # -1 = below all 16 digits, 16 = above them. Limited first: the difference may not fit.
        digit = tl.minimum(tl.maximum(leading, first - 1), first + 16) - first
        index = tl.arange(0, 16)
        lowest = tl.min(tl.where(digit < 0, 16, digit), axis=0)
        highest = tl.max(tl.where(digit > 15, -1, digit), axis=0)
        total = tl.sum(tl.where(digit >= lowest, value, 0.0), axis=0)
        from_digit = tl.zeros((16,), tl.float32) + total
        for d in range(lowest + 1, highest + 2):  # Only digits that occur in the block change the sum.
            total = tl.sum(tl.where(digit >= d, value, 0.0), axis=0)
            from_digit = tl.where(index >= d, total, from_digit)
        at = ((num_before * num_entries + m).to(tl.int64) * NUM_BLOCKS + block) * 16
        tl.store(sums + at + index, from_digit)


@jit(do_not_specialize=["rows", "wanted", "temperature", "floors", "num_entries"])
def _raise_floors_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    best: tl.tensor,
    wanted: tl.tensor,
    temperature: tl.tensor,
    floors: tl.tensor,
    images: tl.tensor,
    sums: tl.tensor,
    logits_stride: tl.tensor,
    num_entries: tl.tensor,
    BY_MASS: tl.constexpr,
    NUM_ROUNDS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    m = tl.program_id(0)
    row = tl.load(rows + m).to(tl.int64)
    token = tl.load(best + row)
    target = tl.load(wanted + m)
    if (token >= 0) & (target > 0):
        image = _next_image(images, sums, target, m, num_entries, NUM_ROUNDS, BY_MASS, NUM_BLOCKS, BLOCKS)
        shift: tl.constexpr = 32 - 4 * NUM_ROUNDS
        # The digits left out are zeros in a number above 0, which makes them ones in the image of one below.
        image = (image << shift) + tl.where(image < 0, (1 << shift) - 1, 0)
        bits = image ^ ((image >> 31) & 0x7FFFFFFF)
        largest = tl.load(logits + row * logits_stride + token).to(tl.float32)
        score = tl.div_rn(bits.to(tl.float32, bitcast=True) - largest, tl.load(temperature + m))
        tl.store(floors + m, tl.maximum(tl.load(floors + m), score))


def raise_floors_by_count(
    logits: Tensor, rows: Tensor, best: Tensor, counts: Tensor, temperature: Tensor, floors: Tensor
) -> None:
    """Raise each entry's floor to the score of its row's k-th best token.

    Parameters
    ----------
    logits
        [N, V] on CUDA, fp32, fp16 or bf16; neighbouring elements of a row lie side by side. Not changed.
    rows
        [M] int32 in [0, N): each entry's row.
    best
        [N] int32: each row's best token; negative = the row has failed.
    counts
        [M] fp64, k below V; 0 = nothing is cut.
    temperature
        [M] fp32, above 0.
    floors
        [M] fp32, changed: tokens of a lower score are dropped.

    Raises
    ------
    ValueError
        The shapes or dtypes do not fit together.

    Notes
    -----
    Runs on the current stream. Allocates 64 bytes an entry for each 4096 logits and round.
    """
    _raise_floors(logits, rows, best, counts, temperature, floors, by_mass=False)


def raise_floors_by_mass(
    logits: Tensor, rows: Tensor, best: Tensor, shares: Tensor, temperature: Tensor, floors: Tensor
) -> None:
    """Raise each entry's floor so far that the tokens left have the share of probability that is wanted.

    Parameters
    ----------
    logits, rows, best, temperature, floors
        As in :func:`raise_floors_by_count`. Tokens below the floor have no probability.
    shares
        [M] fp64 in [0, 1); 0 = nothing is cut.

    Raises
    ------
    ValueError
        The shapes or dtypes do not fit together.

    Notes
    -----
    As in :func:`raise_floors_by_count`.
    """
    _raise_floors(logits, rows, best, shares, temperature, floors, by_mass=True)


def check_entries(logits: Tensor, rows: Tensor, best: Tensor, entries: dict[str, Tensor]) -> None:
    """Refuse logits that cannot be read, or arrays that are not one number an entry.

    Raises
    ------
    ValueError
        Names what does not fit.
    """
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.stride(1) != 1 or logits.dtype not in _NUM_ROUNDS:
        raise ValueError(
            f"logits are {tuple(logits.shape)} of {logits.dtype} with strides {logits.stride()}, expected "
            "[N, V] of bfloat16, float16 or float32 with a contiguous last axis"
        )
    if best.shape != logits.shape[:1]:
        raise ValueError(f"for {len(logits)} rows of logits, best is {tuple(best.shape)}")
    shapes = {name: tuple(array.shape) for name, array in entries.items()}
    if any(shape != (rows.numel(),) for shape in shapes.values()):
        raise ValueError(f"rows are {tuple(rows.shape)}, but {shapes}")


def _raise_floors(
    logits: Tensor,
    rows: Tensor,
    best: Tensor,
    wanted: Tensor,
    temperature: Tensor,
    floors: Tensor,
    *,
    by_mass: bool,
) -> None:
    check_entries(logits, rows, best, {"wanted": wanted, "temperature": temperature, "floors": floors})
    num_entries = len(rows)
    if num_entries == 0:
        return
    size = logits.shape[1]
    num_rounds, num_blocks = _NUM_ROUNDS[logits.dtype], ceil_div(size, _BLOCK)
    shape = (num_rounds, num_entries, num_blocks, _NUM_DIGITS)
    sums = torch.empty(shape, dtype=torch.float32, device=logits.device)
    images = torch.empty((num_rounds, num_entries), dtype=torch.int32, device=logits.device)
    arrays = (logits, rows, best, wanted, temperature, floors, images, sums, logits.stride(0), num_entries)
    blocks = {"NUM_BLOCKS": num_blocks, "BLOCKS": next_power_of_2(num_blocks)}
    for num_before in range(num_rounds):
        _sum_digits_kernel[(num_entries, num_blocks)](
            *arrays, num_before, BY_MASS=by_mass, V=size, BLOCK=_BLOCK, num_warps=_NUM_WARPS, **blocks
        )
    _raise_floors_kernel[(num_entries,)](
        *arrays, BY_MASS=by_mass, NUM_ROUNDS=num_rounds, num_warps=1, **blocks
    )
