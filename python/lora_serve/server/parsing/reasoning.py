"""The reasoning of an answer, as Qwen3 writes it: `<think>...</think>` before the content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.structured_outputs import ReasoningTokens
from lora_serve.engine.tokenizer import Tokenizer
from lora_serve.server.parsing.parts import num_held_back

OPEN, CLOSE = "<think>", "</think>"


class ReasoningStart(Enum):
    """What a prompt leaves to the answer."""

    OPEN = "the answer begins within the reasoning"
    MAY_OPEN = "the answer may begin with reasoning"
    CLOSED = "the answer is content"


def find_start(prompt_token_ids: Sequence[int], tokenizer: Tokenizer) -> ReasoningStart:
    """Tell from a prompt's last tokens how its answer begins.

    Notes
    -----
    Templates open the reasoning for models that always reason, and write an empty one where reasoning is
    switched off.
    """
    open_id, close_id = tokenizer.token_id(OPEN), tokenizer.token_id(CLOSE)
    for position in range(len(prompt_token_ids) - 1, -1, -1):
        if prompt_token_ids[position] == open_id:
            return ReasoningStart.OPEN
        if prompt_token_ids[position] == close_id:
            after = tokenizer.decode(prompt_token_ids[position + 1 :], skip_special_tokens=False)
            return ReasoningStart.MAY_OPEN if after.strip() else ReasoningStart.CLOSED
    return ReasoningStart.MAY_OPEN


def reasoning_tokens(start: ReasoningStart, tokenizer: Tokenizer) -> ReasoningTokens | None:
    """Give the tokens around the reasoning, for answers that take a form after it; None = none may come."""
    open_id, close_id = tokenizer.token_id(OPEN), tokenizer.token_id(CLOSE)
    if start is ReasoningStart.CLOSED or open_id is None or close_id is None:
        return None
    return ReasoningTokens(
        start_token_id=open_id, end_token_id=close_id, is_open=start is ReasoningStart.OPEN
    )


def check_reasoning_tokens(parser: str, tokenizer: Tokenizer) -> None:
    """Require that the words around the reasoning are tokens.

    Raises
    ------
    InvalidArgumentError
        They are not.
    """
    for word in (OPEN, CLOSE):
        if tokenizer.token_id(word) is None:
            raise InvalidArgumentError(
                f"--reasoning-parser is {parser!r} but the model's tokenizer has no token {word}; leave the "
                "option out, or serve a model that reasons"
            )


@dataclass(frozen=True)
class Split:
    """What a piece of text has brought.

    Parameters
    ----------
    reasoning, content : str
        Each may be empty.
    """

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """Splits one answer's text into reasoning and content, whatever pieces it comes in.

    White space around the words is part of neither.

    Parameters
    ----------
    start : ReasoningStart
        What the prompt leaves to the answer.
    """

    def __init__(self, start: ReasoningStart) -> None:
        self._start = start
        self._text = ""
        self._has_content = False
        self._has_reasoning = False
        self._was_closed = False

    def feed(self, text: str) -> Split:
        """Take the next piece."""
        self._text += text
        if self._start is ReasoningStart.MAY_OPEN:
            stripped = self._text.lstrip()
            if OPEN.startswith(stripped) and stripped != OPEN:
                return Split()
            if stripped.startswith(OPEN):
                self._start, self._text = ReasoningStart.OPEN, stripped.removeprefix(OPEN)
            else:
                self._start = ReasoningStart.CLOSED
        if self._start is ReasoningStart.CLOSED:
            return Split(content=self._take_content())
        reasoning, found, after = self._text.partition(CLOSE)
        if found:
            self._start, self._text, self._was_closed = ReasoningStart.CLOSED, after, True
            return Split(self._take_reasoning(reasoning.rstrip()), self._take_content())
        keep = len(reasoning) - num_held_back(reasoning, CLOSE)
        keep = len(reasoning[:keep].rstrip())
        self._text = reasoning[keep:]
        return Split(reasoning=self._take_reasoning(reasoning[:keep]))

    def flush(self) -> Split:
        """Give what was held back; the text has ended."""
        text, self._text = self._text, ""
        if self._start is ReasoningStart.OPEN:
            return Split(reasoning=self._take_reasoning(text.rstrip()))
        return Split(content=text if self._start is ReasoningStart.MAY_OPEN else "")

    def _take_reasoning(self, text: str) -> str:
        if not self._has_reasoning:
            text = text.lstrip()
        self._has_reasoning = self._has_reasoning or bool(text)
        return text

    def _take_content(self) -> str:
        text, self._text = self._text, ""
        if self._was_closed and not self._has_content:
            text = text.lstrip()
        self._has_content = self._has_content or bool(text)
        return text
