"""A linear layer on CUDA: our kernel where it was measured to be faster, the vendor's library otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_serve.kernels._triton import launches_early
from lora_serve.kernels.lora_delta import FEW_TOKENS
from lora_serve.kernels.skinny_linear import DEFAULT_ONE_ROW, SkinnyLaunch, skinny_linear, tuned_launch

_LAUNCH_BESIDE_SHRINK = SkinnyLaunch("dot", block_n=64, block_k=128, num_warps=4, num_stages=5)
"""About as fast as the library for `FEW_TOKENS` rows, which cannot be launched early."""


def cuda_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
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

    Returns
    -------
    Tensor
        [T, O], contiguous.
    """
    launch = tuned_launch(len(x), weight)
    if launch is not None:
        return skinny_linear(x, weight, bias, out, launch=launch, launches_early=launches_early(x))
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def cuda_linear_beside_shrink(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Give ``x W^T + b`` while the shrink that was launched just before reads the same x.

    Parameters
    ----------
    x, weight, bias
        As for `cuda_linear`.

    Returns
    -------
    Tensor
        [T, O], contiguous. The shrink has ended, too, when it is complete.
    """
    if len(x) > FEW_TOKENS or not launches_early(x) or x.element_size() != 2:
        return cuda_linear(x, weight, bias)
    launch = tuned_launch(len(x), weight) or (DEFAULT_ONE_ROW if len(x) == 1 else _LAUNCH_BESIDE_SHRINK)
    return skinny_linear(x, weight, bias, launch=launch, launches_early=True, waits_last=True)
