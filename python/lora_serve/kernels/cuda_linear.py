"""A linear layer on CUDA: our kernel where it was measured to be faster, the vendor's library otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_serve.kernels._triton import launches_early
from lora_serve.kernels.lora_delta import FEW_TOKENS
from lora_serve.kernels.skinny_linear import DEFAULT_ONE_ROW, SkinnyLaunch, skinny_linear, tuned_launch

_LAUNCH_BESIDE_SHRINK = SkinnyLaunch("dot", block_n=64, block_k=128, num_warps=4, num_stages=5)
"""About as fast as the library for `FEW_TOKENS` rows, which cannot be launched early."""


def cuda_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    multiprocessors_left: int = 0,
) -> Tensor:
    """Give ``x W^T + b``.

    Parameters
    ----------
    x
        [T, H] on CUDA; the last axis is contiguous.
    weight
        [O, H] of the dtype of ``x``.
    bias
        [O] of the dtype of ``x``, or None.
    out
        [T, O] contiguous, to write to; None = a new tensor.
    multiprocessors_left
        How many the library's product leaves to other kernels; ours takes none for itself alone.

    Returns
    -------
    Tensor
        [T, O], contiguous.
    """
    launch = tuned_launch(len(x), weight)
    if launch is not None:
        return skinny_linear(x, weight, bias, out, launch=launch, launches_early=launches_early(x))
    if not multiprocessors_left:
        return _library_linear(x, weight, bias, out)
    with _leaving(multiprocessors_left):
        return _library_linear(x, weight, bias, out)


def _library_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


@contextmanager
def _leaving(multiprocessors: int) -> Iterator[None]:
    """Let the library choose kernels that leave so many multiprocessors free, for the whole process.

    cuBLASLt alone can be told so. torch calls both settings experimental, and says so once on stderr.
    """
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(multiprocessors)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(None)
        torch.backends.cuda.preferred_blas_library(library)


def cuda_linear_beside_shrink(
    x: Tensor, weight: Tensor, bias: Tensor | None, multiprocessors_left: int = 0
) -> Tensor:
    """Give ``x W^T + b`` while the shrink that was launched just before reads the same x.

    Parameters
    ----------
    x, weight, bias, multiprocessors_left
        As for `cuda_linear`.

    Returns
    -------
    Tensor
        [T, O], contiguous. The shrink has ended, too, when it is complete.
    """
    if len(x) > FEW_TOKENS or not launches_early(x) or x.element_size() != 2:
        return cuda_linear(x, weight, bias, None, multiprocessors_left)
    launch = tuned_launch(len(x), weight) or (DEFAULT_ONE_ROW if len(x) == 1 else _LAUNCH_BESIDE_SHRINK)
    return skinny_linear(x, weight, bias, launch=launch, launches_early=True, waits_last=True)
