"""Where the texts of tokens start in the text that is shown."""

from __future__ import annotations

from collections.abc import Sequence

from lora_serve.engine.detokenizer import IncrementalDetokenizer
from lora_serve.engine.tokenizer import Tokenizer


class AnswerOffsets:
    """Where the texts of an answer's tokens start; they do not depend on how the tokens are cut into pieces.

    The tokens alone count: text that is held back for a stop string, or dropped with it, has its place too.
    A token without text of its own starts where the next text does, as does one that begins a character.

    Parameters
    ----------
    tokenizer : Tokenizer
        Decodes.
    prompt_token_ids : sequence of int
        What the answer continues.
    skip_special_tokens : bool
        Special tokens give no text.
    start : int
        Where the answer starts in the shown text, in characters.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        start: int,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._offset = start

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Give the offsets of the next tokens."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.feed(token_id))
        return offsets


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Give where the texts of a prompt's tokens start in the prompt's text.

    Special tokens count only where the text has them: not those that the tokenizer adds.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, [], skip_special_tokens=False)
    offsets = []
    offset = 0
    for token_id in token_ids:
        offsets.append(offset)
        piece = detokenizer.feed(token_id)
        if text.startswith(piece, offset) or tokenizer.decode([token_id], skip_special_tokens=True):
            offset = min(offset + len(piece), len(text))
    return offsets
