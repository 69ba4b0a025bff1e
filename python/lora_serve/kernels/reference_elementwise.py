"""Obvious versions of the kernels around the matrix products, and how far a correct one may be from them.

Only for tests and tuners. Numbers are carried as intervals in fp64: each fp32 operation widens the interval
by what it may be off, each rounding to the model's dtype rounds both ends. Where both ends round to the same
number a correct implementation has no choice, so most elements of a 16-bit result must be exact, and an
implementation that rounds in other places than the semantics say is found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.kernels.reference import ReferenceResult, unit_roundoff

_FP32 = unit_roundoff(torch.float32)
# Of exp, rsqrt and division together, in units of the last place of fp32.
_FUNCTION_ERROR = 12 * _FP32
# Below this a 32-bit division by a huge number may give 0.
_FP32_UNDERFLOW = 4e-36
# The smallest value of silu, and where it is.
_SILU_LOWEST_AT, _SILU_LOWEST = -1.2784645427610738, -0.27846454276107385


@dataclass(frozen=True)
class StepInputs:
    """What `prepare_step` writes; see there.

    Parameters
    ----------
    token_ids, positions, slot_mapping
        [T] int64.
    page_indices
        [page_indptr[P]] int32.
    row_failed
        [P] int32.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    page_indices: Tensor
    row_failed: Tensor


class Interval:
    """Where a number may lie: the ends, fp64.

    Parameters
    ----------
    low, high
        The ends, of one shape.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    def widened(self, by: Tensor) -> Interval:
        """The interval and all that is at most ``by`` away from it."""
        return Interval(self.low - by, self.high + by)

    def rounded(self, dtype: torch.dtype) -> Interval:
        """What its numbers may be after rounding."""
        return Interval(self.low.to(dtype).double(), self.high.to(dtype).double())

    def times(self, factor: Tensor) -> Interval:
        """The product with an exact number."""
        return self.times_interval(exactly(factor))

    def times_interval(self, factor: Interval) -> Interval:
        """The product with any number of another interval."""
        low, high = factor.low, factor.high
        ends = torch.stack([self.low * low, self.low * high, self.high * low, self.high * high])
        return Interval(ends.amin(0), ends.amax(0))

    def plus(self, other: Interval) -> Interval:
        """The sum with any number of another interval."""
        return Interval(self.low + other.low, self.high + other.high)

    def magnitude(self) -> Tensor:
        """The largest absolute value in it."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def result(self) -> ReferenceResult:
        """The middle, and how far the ends are from it."""
        return ReferenceResult((self.low + self.high) / 2, (self.high - self.low) / 2)


def exactly(x: Tensor) -> Interval:
    """A number that is known."""
    return Interval(x.double(), x.double())


def _norm(x: Interval, weight: Tensor, eps: float) -> Interval:
    """RMS norm over the last axis, rounded as the kernels do; the sum of squares is taken in any order."""
    size = x.low.shape[-1]
    largest = x.magnitude().square()
    smallest = torch.where(x.low * x.high <= 0, 0.0, torch.minimum(x.low.abs(), x.high.abs()).square())
    scales = (1 / torch.sqrt(square.mean(-1, keepdim=True) + eps) for square in (largest, smallest))
    exact = x.times_interval(Interval(*scales))
    off = exact.magnitude() * (size * _FP32 / 2 + _FUNCTION_ERROR)
    quotient = exact.widened(off).rounded(weight.dtype)
    return quotient.times(weight.double()).rounded(weight.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> ReferenceResult:
    """``round(w * round(x / sqrt(mean(x^2) + eps)))`` over the last axis, in fp64 between the roundings.

    Parameters
    ----------
    x
        [..., H], the dtype that the implementation is run in.
    weight
        [H] of the same dtype.
    eps
        Added to the mean square.

    Returns
    -------
    ReferenceResult
        The shape of ``x``, on its device.
    """
    return _norm(exactly(x), weight, eps).result()


def silu_mul_reference(gate_up: Tensor) -> ReferenceResult:
    """``round(round(silu(gate)) * up)`` for gate and up side by side.

    Parameters
    ----------
    gate_up
        [T, 2 I], the dtype that the implementation is run in.

    Returns
    -------
    ReferenceResult
        [T, I]. The bound knows that the error of a 32-bit exp grows with its argument.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return silu_mul_interval(exactly(gate), exactly(up), gate_up.dtype).result()


def silu_mul_interval(gate: Interval, up: Interval, dtype: torch.dtype) -> Interval:
    """`silu_mul_reference` of numbers that are not known exactly."""
    at_low, at_high = (end / (1 + torch.exp(-end)) for end in (gate.low, gate.high))
    # silu falls below its smallest value, and rises above.
    has_lowest = (gate.low < _SILU_LOWEST_AT) & (gate.high > _SILU_LOWEST_AT)
    low = torch.where(has_lowest, _SILU_LOWEST, torch.minimum(at_low, at_high))
    silu = Interval(low, torch.maximum(at_low, at_high))
    off = silu.magnitude() * (2 * gate.magnitude() * _FP32 + _FUNCTION_ERROR) + _FP32_UNDERFLOW
    return silu.widened(off).rounded(dtype).times_interval(up).rounded(dtype)


def norm_rotary_reference(
    heads: Tensor, positions: Tensor, cos_sin: Tensor, weight: Tensor | None, eps: float
) -> ReferenceResult:
    """Norm and rotation of single heads.

    Parameters
    ----------
    heads
        [T, heads, D], the dtype that the implementation is run in.
    positions
        [T] int64.
    cos_sin
        [M, D] fp32: D/2 cosines, then D/2 sines, of each position.
    weight
        [D] of the dtype of ``heads``, or None: no norm.
    eps
        Added to the mean square.

    Returns
    -------
    ReferenceResult
        [T, heads, D].
    """
    return norm_rotary_interval(exactly(heads), heads.dtype, positions, cos_sin, weight, eps).result()


def norm_rotary_interval(
    heads: Interval,
    dtype: torch.dtype,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor | None,
    eps: float,
) -> Interval:
    """`norm_rotary_reference` of numbers that are not known exactly."""
    x = heads if weight is None else _norm(heads, weight, eps)
    half = heads.low.shape[-1] // 2
    cos, sin = cos_sin.double()[positions][:, None, :].chunk(2, dim=-1)
    first = Interval(x.low[..., :half], x.high[..., :half])
    second = Interval(x.low[..., half:], x.high[..., half:])
    planes = []
    for one, other, sine in ((first, second, -sin), (second, first, sin)):
        products = one.times(cos), other.times(sine)
        off = 3 * _FP32 * (products[0].magnitude() + products[1].magnitude())
        planes.append(products[0].plus(products[1]).widened(off).rounded(dtype))
    low = torch.cat([plane.low for plane in planes], dim=-1)
    return Interval(low, torch.cat([plane.high for plane in planes], dim=-1))


def apply_page_table_deltas_reference(
    page_table: Tensor, delta_rows: Tensor, delta_starts: Tensor, delta_offsets: Tensor, delta_pages: Tensor
) -> Tensor:
    """The page table after a plan's deltas, one after the other; arguments as the kernel's, not changed."""
    table = page_table.clone()
    offsets = delta_offsets.tolist()
    for d, (row, start) in enumerate(zip(delta_rows.tolist(), delta_starts.tolist(), strict=True)):
        pages = delta_pages[offsets[d] : offsets[d + 1]]
        table[row, start : start + len(pages)] = pages
    return table


def prepare_step_reference(
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
) -> StepInputs:
    """What `prepare_step` must write, token by token; arguments as the kernel's."""
    tokens = torch.zeros(len(token_ids), dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    slots = torch.full_like(tokens, -1)
    indptr = page_indptr.tolist()
    indices = torch.zeros(indptr[-1], dtype=torch.int32)
    failed = torch.zeros(len(page_table_rows), dtype=torch.int32)
    for b, row in enumerate(page_table_rows.tolist()):
        num_tokens = int(num_scheduled_tokens[b])
        for j in range(num_tokens):
            t, position = int(query_start_loc[b]) + j, int(num_computed_tokens[b]) + j
            token = int(token_ids[t]) if token_ids[t] >= 0 else int(last_tokens[row])
            failed[b] = max(int(failed[b]), int(token < 0))
            tokens[t], positions[t] = max(token, 0), position
            slots[t] = int(page_table[row, position // page_size]) * page_size + position % page_size
        if num_tokens:
            indices[indptr[b] : indptr[b + 1]] = page_table[row, : indptr[b + 1] - indptr[b]]
    return StepInputs(tokens, positions, slots, indices, failed)


def greedy_sample_reference(logits: Tensor, row_failed: Tensor) -> list[int]:
    """The token of each row: the lowest id among the largest; -2 where there is none.

    Parameters
    ----------
    logits
        [B, V].
    row_failed
        [B]; not 0 = the row had no input token.
    """
    tokens = []
    for row, failed in zip(logits.double(), row_failed.tolist(), strict=True):
        best = row.max()
        is_bad = failed or bool(row.isnan().any()) or not bool(best.isfinite())
        tokens.append(-2 if is_bad else int((row == best).nonzero()[0]))
    return tokens
