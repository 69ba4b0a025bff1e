"""Root-mean-square normalisation over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis.

        Parameters
        ----------
        x
            [..., D], floating point, any strides.

        Returns
        -------
        Tensor
            [..., D], contiguous, the dtype of ``x``.
        """
        wide = x.float()
        mean_square = wide.square().mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
