"""Which tokens may come next in an answer that must have a form."""

from __future__ import annotations

import logging
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lora_serve.common.structured_outputs import ReasoningTokens
from lora_serve.executor.token_restriction import RestrictionError

if TYPE_CHECKING:
    import xgrammar


logger = logging.getLogger(__name__)


class _Phase(Enum):
    FIRST_TOKEN = "first token"
    """The answer may begin with its reasoning, or at once with its form."""
    REASONING = "reasoning"
    FORM = "form"
    ENDED = "ended"


class GrammarMatcher:
    """Implements `TokenRestriction`: follows one answer through its grammar.

    Owns xgrammar's matcher and the mask that it fills. Knows nothing of logits: the sampler masks them, with
    what `next_mask` gives, once every earlier token of the request was given to `accept`.

    Parameters
    ----------
    compiled : xgrammar.CompiledGrammar
        Of the engine's vocabulary; shared by many matchers.
    vocab_size : int
        Number of logits, V.
    reasoning : ReasoningTokens or None
        Tokens around the reasoning that may come first; there every token is allowed.
    """

    needs_outputs = True

    def __init__(
        self, compiled: xgrammar.CompiledGrammar, vocab_size: int, reasoning: ReasoningTokens | None = None
    ) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._mask = torch.zeros((1, -(-vocab_size // 32)), dtype=torch.int32)
        self._reasoning = reasoning
        self._phase = _Phase.FORM
        if reasoning is not None:
            self._phase = _Phase.REASONING if reasoning.is_open else _Phase.FIRST_TOKEN

    @property
    def restricts(self) -> bool:
        """True when not every token may come next. After the end no token counts any more."""
        return self._phase in (_Phase.FIRST_TOKEN, _Phase.FORM)

    def next_mask(self) -> npt.NDArray[np.int32]:
        """Give the tokens that may come next.

        Returns
        -------
        numpy.ndarray
            [ceil(V / 32)] int32, bit t % 32 of entry t // 32 set = token t may come; valid until the next
            call. All are set where nothing is restricted, none where the grammar fails: its row fails then.
        """
        mask: npt.NDArray[np.int32] = self._mask.numpy()[0]
        if not self.restricts:
            mask.fill(-1)
            return mask
        try:
            if not self._matcher.fill_next_token_bitmask(self._mask):
                mask.fill(-1)
        except Exception:
            logger.exception("a grammar cannot say which token may come next; its answer fails")
            mask.fill(0)
            return mask
        if self._phase is _Phase.FIRST_TOKEN and self._reasoning is not None:
            word, bit = divmod(self._reasoning.start_token_id, 32)
            mask.view(np.uint32)[word] |= np.uint32(1 << bit)
        return mask

    def accept(self, token_id: int) -> None:
        """Take the token that was sampled.

        Raises
        ------
        RestrictionError
            The grammar does not allow it: it was sampled without the mask. Or the grammar failed.
        """
        if self._phase is _Phase.ENDED:
            return
        reasoning = self._reasoning
        if reasoning is not None and self._phase is _Phase.FIRST_TOKEN:
            begins = token_id == reasoning.start_token_id
            self._phase = _Phase.REASONING if begins else _Phase.FORM
            if begins:
                return
        if reasoning is not None and self._phase is _Phase.REASONING:
            if token_id == reasoning.end_token_id:
                self._phase = _Phase.FORM
            return
        is_allowed, reason = False, "does not allow it"
        try:
            is_allowed = self._matcher.accept_token(token_id)
            is_over = not is_allowed or self._matcher.is_terminated()
        except Exception as error:
            logger.exception("a grammar cannot take token %d; its answer fails", token_id)
            is_allowed, is_over, reason = False, True, f"failed: {error}"
        if is_over:
            self._phase = _Phase.ENDED
        if not is_allowed:
            raise RestrictionError(f"token {token_id} was sampled but the grammar of its answer {reason}")
