"""The obvious linear layer, and how far a correct one may be from it. Only for tests and tuners."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels.reference import ReferenceResult, unit_roundoff

_CHUNK = 8192  # Rows of the weight that are widened at once.


def skinny_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> ReferenceResult:
    """``y = x W^T + b`` in fp64.

    Parameters
    ----------
    x
        [M, K], the dtype that the implementation is run in: it decides the bound.
    weight
        [N, K] on the same device.
    bias
        [N], or None.

    Returns
    -------
    ReferenceResult
        [M, N] on the device of ``x``. The bound covers K products and additions in fp32 in any order, and one
        rounding to the dtype of ``x``.
    """
    wide = x.double()
    chunks = torch.split(weight, _CHUNK)
    value = torch.cat([wide @ rows.double().t() for rows in chunks], dim=-1)
    magnitude = torch.cat([wide.abs() @ rows.double().abs().t() for rows in chunks], dim=-1)
    if bias is not None:
        value, magnitude = value + bias.double(), magnitude + bias.double().abs()
    bound = (x.shape[1] + 2) * unit_roundoff(torch.float32) * magnitude
    # Subnormal numbers included.
    rounding = unit_roundoff(x.dtype) * (value.abs() + bound + torch.finfo(x.dtype).tiny)
    return ReferenceResult(value, bound + rounding)
