"""Root-mean-square normalisation over the last axis, with or without an addition before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_serve.layers import ops


class RMSNorm(nn.Module):
    """``y = w * x / sqrt(mean(x^2) + eps)``, with the mean and the division in fp32.

    The quotient is rounded to the input's dtype before it is multiplied by the weight, as transformers does:
    in 16-bit types the other order gives other bits.

    Parameters
    ----------
    size
        D, the width of the last axis.
    eps
        Added to the mean square.
    dtype, device
        Of the weight, which is initialised to 1.

    Notes
    -----
    Source: Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization".
    """

    weight: Tensor

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise the last axis of ``x``, or of ``x + residual``.

        Parameters
        ----------
        x
            [T, D], floating point; any strides of rows.
        residual
            [T, D], contiguous, same dtype: becomes ``x + residual`` in place. None = ``x`` alone.

        Returns
        -------
        Tensor
            [T, D], contiguous, the dtype of ``x``.
        """
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.add_rms_norm(x, residual, self.weight, self.eps)

    def add_and_normalise(self, added: Tensor | None, residual: Tensor) -> Tensor:
        """Normalise the residual stream after adding what a part of the model left to add; None = nothing."""
        return self.forward(residual) if added is None else self.forward(added, residual)
