"""The parts of an answer's text, and the interface of what finds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Content:
    """Text for the reader.

    Parameters
    ----------
    text : str
        Not empty.
    """

    text: str


@dataclass(frozen=True)
class Call:
    """The beginning of a tool call, or all of it.

    Parameters
    ----------
    name : str
        The function.
    arguments : str
        A JSON object as text, or its beginning: `MoreArguments` follow.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class MoreArguments:
    """The next piece of the last call's arguments.

    Parameters
    ----------
    text : str
        Not empty.
    """

    text: str


Part = Content | Call | MoreArguments


class ToolParser(Protocol):
    """Finds the tool calls of one answer, whose text comes in pieces of any length.

    What is no call is content: nothing of the text is lost but the words around calls.
    """

    def feed(self, text: str) -> list[Part]:
        """Take the next piece, and give the parts that are complete."""
        ...

    def flush(self) -> list[Part]:
        """Give what was held back; the text has ended."""
        ...


def content_of(text: str) -> list[Part]:
    """Give the text as a part, none where it is empty."""
    return [Content(text)] if text else []


def num_held_back(text: str, word: str) -> int:
    """How many characters at the end of `text` may be the beginning of `word`."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
