"""A linear layer of few rows on CUDA: as fast as the weights can be read.

Semantics
---------
For row t of M and output feature n::

    y[t, n] = round(sum_k x[t, k] * w[n, k] + b[n])

Products and the sum are in fp32, `round` is to the dtype of x. The order of the sum is fixed by the launch
parameters: the same inputs give the same bits, whatever the other rows, as long as M stays in one class of
the tuned table.

Layout: w is [N, K], rows of x, w and y are neighbouring elements with any distance between rows; 16-byte
loads where the distance is a multiple of 16 elements. Two kernels:

=====  ==============================================  ====================================================
 kind   a program                                       for
=====  ==============================================  ====================================================
 fma    `block_n` rows of w after each other, `tiles`   one row: products in registers, added up over the
        times; all of K; one row of x                   program's threads after the last of them
 dot    `block_n` rows of w; all of K, divided among    up to `MAX_ROWS` rows: matrix units, rows of x padded
        `splits` groups of warps; every row of x        to a power of two and at least 8
=====  ==============================================  ====================================================

No split of K among programs, so no second launch and no atomics. No row: nothing is launched. Padded rows are
rows like all others.

With `launches_early` a program may start while the kernel before it still runs: it asks for its weights,
which no kernel writes, to be brought to the second-level cache, and only then waits for x. The kernel before
must not write weights; every kernel of a chain that is launched so waits in its turn. With `waits_last` it
does so at its end: the shrink of an adapter, which reads the same x, then runs beside it.

Source: the split of K inside a block is "sliced K" of Thakkar et al., CUTLASS, 2017.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_serve.kernels._triton import ceil_div, jit, next_power_of_2, tl
from lora_serve.kernels.tuned_tables import int_of, read_tuned_rows

MAX_ROWS = 64
_SMALLEST_M = 8  # of the matrix units


@dataclass(frozen=True)
class SkinnyLaunch:
    """Launch parameters.

    Parameters
    ----------
    kind
        "fma" or "dot".
    block_n, block_k
        Rows and columns of the tile of w that is loaded at once; block_k of each split. Powers of two.
    num_warps, num_stages
        Of a program; tiles on their way at once. 1 = none before it is needed.
    splits
        Of K inside a program ("dot"); a power of two.
    tiles
        How many tiles of rows a program does one after the other ("fma").
    is_prefetched
        The program's weights are asked into the second-level cache first, where they have no gaps.
    """

    kind: str
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    splits: int = 1
    tiles: int = 1
    is_prefetched: bool = False


DEFAULT_ONE_ROW = SkinnyLaunch("fma", block_n=4, block_k=2048, num_warps=8)
DEFAULT_ROWS = SkinnyLaunch("dot", block_n=32, block_k=64, num_warps=4, num_stages=4, splits=2)


@jit
def _prefetch(start: tl.tensor, num_bytes: tl.tensor) -> None:
    """Ask for bytes to be brought to the second-level cache; one thread does. 16-byte multiples."""
    tl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0; "
        "@first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [start.to(tl.int64), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit
def _enter(
    weight: tl.tensor,
    first: tl.tensor,
    N: tl.tensor,
    w_stride: tl.tensor,
    ROWS: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,
    WAITS_LAST: tl.constexpr,
) -> None:
    """What a program does before it may read x."""
    if PREFETCH:
        num_rows = tl.minimum(ROWS, N - first)
        num_bytes = num_rows * w_stride.to(tl.int32) * (weight.dtype.element_ty.primitive_bitwidth // 8)
        _prefetch(weight + first.to(tl.int64) * w_stride, num_bytes)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if not WAITS_LAST:
            tl.extra.cuda.gdc_wait()


@jit
def _leave(EARLY: tl.constexpr, WAITS_LAST: tl.constexpr) -> None:
    """What a program does when it has written y: the next kernel takes its end for the end of all before."""
    if EARLY and WAITS_LAST:
        tl.extra.cuda.gdc_wait()


@jit
def _skinny_fma_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    out_stride: tl.tensor,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,
    WAITS_LAST: tl.constexpr,
) -> None:
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    t = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (TILES * BLOCK_N)
    _enter(weight, first, N, w_stride, TILES * BLOCK_N, PREFETCH, EARLY, WAITS_LAST)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    # Tiles and blocks of K are one loop, so that the loads of a tile are under way while the one before ends.
    for i in tl.range(0, TILES * K_BLOCKS, num_stages=STAGES):
        n = first + (i // K_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = (i % K_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * w_stride
        if K % BLOCK_K == 0:
            w = tl.load(rows + k[None, :], eviction_policy="evict_first")
            a = tl.load(x + t * x_stride + k)
        else:
            w = tl.load(rows + k[None, :], mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
            a = tl.load(x + t * x_stride + k, mask=k < K, other=0.0)
        acc += w.to(tl.float32) * a.to(tl.float32)[None, :]
        if i % K_BLOCKS == K_BLOCKS - 1:
            y = tl.sum(acc, axis=1)
            if bias is not None:
                y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(out + t * out_stride + n, y.to(out.dtype.element_ty), mask=n < N)
            acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    _leave(EARLY, WAITS_LAST)


@jit
def _sum_of_products(
    x: tl.tensor,
    rows: tl.tensor,
    m: tl.tensor,
    x_stride: tl.tensor,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N, BLOCK_M] of a program that does not split K."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        of_x = x + m[None, :] * x_stride + k[:, None]
        if K % BLOCK_K == 0:
            w = tl.load(rows[:, None] + k[None, :], eviction_policy="evict_first")
            a = tl.load(of_x)
        else:
            w = tl.load(
                rows[:, None] + k[None, :], mask=k[None, :] < K, other=0.0, eviction_policy="evict_first"
            )
            a = tl.load(of_x, mask=k[:, None] < K, other=0.0)
        acc = tl.dot(w, a, acc, input_precision="ieee")
    return acc


@jit
def _sum_of_split_products(
    x: tl.tensor,
    rows: tl.tensor,
    m: tl.tensor,
    x_stride: tl.tensor,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N, BLOCK_M] of a program whose warps share K: each split takes every SPLITS-th block of K."""
    STEP: tl.constexpr = SPLITS * BLOCK_K
    acc = tl.zeros((SPLITS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    own = tl.arange(0, SPLITS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    for start in tl.range(0, K, STEP, num_stages=STAGES):
        k = start + own
        of_x = x + m[None, None, :] * x_stride + k[:, :, None]
        of_w = rows[None, :, None] + k[:, None, :]
        if K % STEP == 0:
            w = tl.load(of_w, eviction_policy="evict_first")
            a = tl.load(of_x)
        else:
            w = tl.load(of_w, mask=k[:, None, :] < K, other=0.0, eviction_policy="evict_first")
            a = tl.load(of_x, mask=k[:, :, None] < K, other=0.0)
        acc = tl.dot(w, a, acc, input_precision="ieee")
    return tl.sum(acc, axis=0)


@jit(do_not_specialize=["num_rows"])
def _skinny_dot_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    N: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    out_stride: tl.tensor,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,
    WAITS_LAST: tl.constexpr,
) -> None:
    first = tl.program_id(0) * BLOCK_N
    _enter(weight, first, N, w_stride, BLOCK_N, PREFETCH, EARLY, WAITS_LAST)
    n = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    rows = weight + tl.minimum(n, N - 1).to(tl.int64) * w_stride
    # Rows behind the last are the last one again: that costs less than a mask.
    m_read = tl.minimum(m, num_rows - 1)
    if SPLITS == 1:
        y = _sum_of_products(x, rows, m_read, x_stride, K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    else:
        y = _sum_of_split_products(x, rows, m_read, x_stride, K, BLOCK_M, BLOCK_N, BLOCK_K, SPLITS, STAGES)
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (n[:, None] < N) & (m[None, :] < num_rows)
    tl.store(out + m[None, :] * out_stride + n[:, None], y.to(out.dtype.element_ty), mask=mask)
    _leave(EARLY, WAITS_LAST)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    launch: SkinnyLaunch | None = None,
    launches_early: bool = False,
    waits_last: bool = False,
) -> Tensor:
    """``y = x W^T + b`` for few rows.

    Parameters
    ----------
    x
        [M, K] on CUDA, fp32, fp16 or bf16, M at most `MAX_ROWS`; neighbouring elements of a row lie side by
        side.
    weight
        [N, K], the dtype of ``x``, rows as those of ``x``.
    bias
        [N] contiguous, the dtype of ``x``; None = 0.
    out
        [M, N], the dtype of ``x``, rows as those of ``x``; not ``x``. None = a new tensor.
    launch
        None = the tuned parameters, or a default.
    launches_early
        Programmatic dependent launch: may start while the kernel before it runs. Compute capability 9.0.
    waits_last
        With `launches_early`: wait for the kernel before only when y is written. It must let this one start
        when ``x`` is complete (`begin_after_wait`), and runs beside it.

    Returns
    -------
    Tensor
        ``out``, or [M, N] contiguous.

    Raises
    ------
    ValueError
        Shapes, dtypes or strides are not these.

    Notes
    -----
    Runs on the current stream.
    """
    num_rows, size = x.shape[0], weight.shape[0]
    result = torch.empty((num_rows, size), dtype=x.dtype, device=x.device) if out is None else out
    _check(x, weight, bias, result)
    if num_rows == 0:
        return result
    if launch is None:
        launch = tuned_launch(num_rows, weight) or (DEFAULT_ONE_ROW if num_rows == 1 else DEFAULT_ROWS)
    strides = (x.stride(0), weight.stride(0), result.stride(0))
    constants: dict[str, Any] = {
        "K": weight.shape[1],
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "STAGES": launch.num_stages,
        "PREFETCH": launch.is_prefetched and _can_prefetch(weight),
        "EARLY": launches_early,
        "WAITS_LAST": waits_last,
        "num_warps": launch.num_warps,
        **({"launch_pdl": True} if launches_early else {}),
    }
    if launch.kind == "fma":
        grid = (ceil_div(size, launch.block_n * launch.tiles), num_rows)
        _skinny_fma_kernel[grid](x, weight, bias, result, size, *strides, TILES=launch.tiles, **constants)
    else:
        _skinny_dot_kernel[(ceil_div(size, launch.block_n),)](
            *(x, weight, bias, result, num_rows, size, *strides),
            BLOCK_M=max(_SMALLEST_M, next_power_of_2(num_rows)),
            SPLITS=launch.splits,
            **constants,
        )
    return result


def _can_prefetch(weight: Tensor) -> bool:
    """Rows without gaps that begin at multiples of 16 bytes, as the copy engine wants them."""
    row_bytes = weight.shape[1] * weight.element_size()
    return weight.is_cuda and weight.is_contiguous() and row_bytes % 16 == 0 and weight.data_ptr() % 16 == 0


def tuned_launch(num_rows: int, weight: Tensor) -> SkinnyLaunch | None:
    """Give the parameters measured to be faster than the vendor's library on this GPU.

    Parameters
    ----------
    num_rows
        M.
    weight
        [N, K] on the device of the call.

    Returns
    -------
    SkinnyLaunch | None
        None = nothing was measured for this GPU, dtype and shape, or the library was faster.
    """
    if not weight.is_cuda or num_rows < 1 or not weight.is_contiguous():
        return None
    out_features, in_features = weight.shape
    table = _table(torch.cuda.get_device_name(weight.device))
    for max_rows, launch in table.get((out_features, in_features, weight.dtype), ()):
        if num_rows <= max_rows:
            return launch
    return None


_Key = tuple[int, int, torch.dtype]
_Table = dict[_Key, list[tuple[int, SkinnyLaunch | None]]]


@functools.cache
def _table(gpu: str) -> _Table:
    """The rows of ``tuning/*.json`` that were measured on this GPU, by shape, fewest rows first."""
    table: _Table = {}
    for key, max_rows, launch in read_tuned_rows(gpu, "skinny_linear", _read_row):
        table.setdefault(key, []).append((max_rows, launch))
    for rows in table.values():
        rows.sort(key=lambda row: row[0])
    return table


def _read_row(row: Mapping[str, Any]) -> tuple[_Key, int, SkinnyLaunch | None]:
    key = (int_of(row, "out_features"), int_of(row, "in_features"), getattr(torch, row["dtype"]))
    launch = None if row["launch"] is None else SkinnyLaunch(**row["launch"])
    return key, int_of(row, "max_rows"), launch


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    fit = x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1] and min(weight.shape) > 0
    fit = fit and x.shape[0] <= MAX_ROWS and out.shape == (x.shape[0], weight.shape[0])
    fit = fit and all(t.dtype == x.dtype for t in (weight, out))
    fit = fit and all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (x, weight, out))
    if bias is not None:
        fit = fit and bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.is_contiguous()
    if not fit:
        described = ", ".join(f"{tuple(t.shape)} {t.dtype} strides {t.stride()}" for t in (x, weight, out))
        raise ValueError(
            f"x, weight, out are {described}, bias {None if bias is None else tuple(bias.shape)}: expected "
            f"[M <= {MAX_ROWS}, K], [N, K], [M, N] of one dtype whose last axis is contiguous, and [N]"
        )
