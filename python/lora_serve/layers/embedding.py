"""Token embedding and the projection to logits, which may share one matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """Rows of a matrix by token id.

    Parameters
    ----------
    vocab_size, hidden_size
        Shape of the matrix.
    dtype, device
        Of the weight, which is left uninitialised.
    """

    weight: Tensor

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look up tokens.

        Parameters
        ----------
        token_ids
            [T] int32 or int64, in [0, vocab_size).

        Returns
        -------
        Tensor
            [T, H] of the weight's dtype.

        Raises
        ------
        IndexError
            A token id is out of range (on the CPU; an accelerator does not check).
        """
        return F.embedding(token_ids, self.weight)


class LogitsProjection(nn.Module):
    """Hidden states to logits.

    Parameters
    ----------
    weight
        [V, H]; the embedding's own parameter where the model ties both.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Give logits.

        Parameters
        ----------
        hidden
            [N, H] of the weight's dtype.

        Returns
        -------
        Tensor
            [N, V] float32; the product itself is in the weight's dtype.
        """
        return F.linear(hidden, self.weight).float()
