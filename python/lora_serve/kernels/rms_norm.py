"""Root-mean-square normalisation of rows on CUDA, alone or behind the addition to the residual stream.

Semantics
---------
For row t::

    r[t, h]   = round(x[t, h] + residual[t, h])       (add_rms_norm; stored to residual)
                x[t, h]                               (rms_norm)
    y[t, h]   = round(w[h] * round(r[t, h] / sqrt(mean_h(r[t, h]^2) + eps)))

`round` is to the dtype of x: the sum is rounded before its square is taken, and the quotient before it is
multiplied by the weight, as transformers does. Everything between is in fp32.

Layout: rows of H neighbouring elements with any distance between rows. Grid: one program a row, the whole row
in registers. No row: nothing is launched. Rows do not see each other, so padded rows need no care. The same
inputs give the same bits, whatever the other rows.

Source: Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels._triton import begin_early, early_launch, jit, next_power_of_2, tl

_ELEMENTS_OF_A_THREAD = 8  # one load of 16 bytes in a 16-bit type
_MAX_WARPS = 16


def _num_warps(block: int) -> int:
    return max(1, min(_MAX_WARPS, block // (32 * _ELEMENTS_OF_A_THREAD)))


@jit
def _normalise(row: tl.tensor, w: tl.tensor, H: tl.constexpr, eps: tl.tensor) -> tl.tensor:
    """The norm of one row, which is rounded to its dtype already; elements behind H are 0."""
    wide = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / H + eps)
    quotient = (wide * scale).to(row.dtype)
    # The product of two 16-bit numbers is exact in fp32, so this rounds once, as their own product does.
    return (w.to(tl.float32) * quotient.to(tl.float32)).to(row.dtype)


@jit
def _rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    mask = h < H
    w = tl.load(weight + h, mask=mask, other=0.0)  # before the sum: nothing is loaded behind its barriers
    begin_early(EARLY)
    row = tl.load(x + t * x_stride + h, mask=mask, other=0.0)
    tl.store(out + t * out_stride + h, _normalise(row, w, H, eps), mask=mask)


@jit
def _add_rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    mask = h < H
    residual_row = residual + t * residual_stride + h
    w = tl.load(weight + h, mask=mask, other=0.0)
    begin_early(EARLY)
    added = tl.load(x + t * x_stride + h, mask=mask, other=0.0)
    before = tl.load(residual_row, mask=mask, other=0.0)
    row = (added.to(tl.float32) + before.to(tl.float32)).to(added.dtype)
    tl.store(residual_row, row, mask=mask)
    tl.store(out + t * out_stride + h, _normalise(row, w, H, eps), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """``y = w * x / sqrt(mean(x^2) + eps)`` row by row.

    Parameters
    ----------
    x
        [T, H] on CUDA, fp32, fp16 or bf16; neighbouring elements of a row lie side by side.
    weight
        [H], the dtype of ``x``.
    eps
        Added to the mean square.
    out
        [T, H], the dtype of ``x``, rows as those of ``x``; may be ``x``. None = a new tensor.

    Returns
    -------
    Tensor
        ``out``, or [T, H] contiguous.

    Raises
    ------
    ValueError
        Shapes, dtypes or strides are not these.

    Notes
    -----
    Runs on the current stream.
    """
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check(x, weight, result)
    num_rows, size = x.shape
    if num_rows:
        block = next_power_of_2(size)
        _rms_norm_kernel[(num_rows,)](
            x,
            weight,
            result,
            x.stride(0),
            result.stride(0),
            eps,
            H=size,
            BLOCK=block,
            num_warps=_num_warps(block),
            **early_launch(x),
        )
    return result


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """``residual += x``, then its norm.

    Parameters
    ----------
    x
        [T, H] on CUDA, fp32, fp16 or bf16: what the last part of the model gave; not changed.
    residual
        [T, H], the dtype of ``x``: the residual stream; changed in place to the rounded sum.
    weight
        [H], the dtype of ``x``.
    eps
        Added to the mean square.
    out
        [T, H], the dtype of ``x``; may be ``x``, not ``residual``. None = a new tensor.

    Returns
    -------
    Tensor
        ``out``, or [T, H] contiguous: the norm of the new ``residual``.

    Raises
    ------
    ValueError
        Shapes, dtypes or strides are not these.

    Notes
    -----
    Runs on the current stream.
    """
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check(x, weight, result, residual)
    num_rows, size = x.shape
    if num_rows:
        block = next_power_of_2(size)
        _add_rms_norm_kernel[(num_rows,)](
            x,
            residual,
            weight,
            result,
            x.stride(0),
            residual.stride(0),
            result.stride(0),
            eps,
            H=size,
            BLOCK=block,
            num_warps=_num_warps(block),
            **early_launch(x),
        )
    return result


def _check(x: Tensor, weight: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
    rows = [x, out] if residual is None else [x, out, residual]
    fit = x.dim() == 2 and weight.shape == x.shape[1:] and weight.is_contiguous()
    for tensor in rows:
        fit = fit and tensor.shape == x.shape and tensor.dtype == weight.dtype
        fit = fit and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)
    if not fit:
        described = ", ".join(f"{tuple(r.shape)} {r.dtype} strides {r.stride()}" for r in rows)
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} with rows (x, out, residual) {described}: expected "
            "[H] with rows [T, H] of one dtype whose last axis is contiguous"
        )
