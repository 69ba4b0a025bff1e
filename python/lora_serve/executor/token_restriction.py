"""Which tokens may come next in an answer that may not have every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InternalError


class RestrictionError(InternalError):
    """An answer cannot go on, because it is not known any more which tokens may come. Others can."""


class TokenRestriction(Protocol):
    """Says which tokens of one answer may come next; the sampler masks the others' logits."""

    @property
    def needs_outputs(self) -> bool:
        """True when the answer depends on the tokens so far: `accept` comes before `next_mask`."""
        ...

    @property
    def restricts(self) -> bool:
        """True when not every token may come next."""
        ...

    def next_mask(self) -> npt.NDArray[np.int32]:
        """Give the tokens that may come next.

        Returns
        -------
        numpy.ndarray
            [ceil(V / 32)] int32, bit t % 32 of entry t // 32 set = token t may come; valid until the next
            call.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take the token that was sampled.

        Raises
        ------
        RestrictionError
            The answer cannot go on. What comes later for it restricts nothing and raises nothing.
        """
        ...


class AllowedTokens:
    """Implements `TokenRestriction`: the same tokens at every position.

    Parameters
    ----------
    token_ids : sequence of int
        In [0, vocab_size).
    vocab_size : int
        Number of logits.
    """

    needs_outputs = False
    restricts = True

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
        bits[list(token_ids)] = 1
        self._mask = np.packbits(bits, bitorder="little").view(np.int32)

    def next_mask(self) -> npt.NDArray[np.int32]:
        """See `TokenRestriction.next_mask`."""
        return self._mask

    def accept(self, token_id: int) -> None:
        """Nothing depends on it."""
