"""Finds stop strings in text that arrives in pieces, and holds back what could still become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """Text that may be shown, and the stop string that was found, if any.

    Parameters
    ----------
    text : str
        What may be shown now.
    stop_string : str or None
        The stop string that was completed; text after it is dropped.
    """

    text: str
    stop_string: str | None = None


class StopStringMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back what could still become one.

    The answer does not depend on where the pieces are cut: it is the stop string that is completed first, as
    if characters came one by one; of several that end at the same character, the longest.

    Parameters
    ----------
    stop_strings : sequence of str
        None of them empty.
    include_stop_string : bool
        Show the stop string itself.

    Notes
    -----
    A piece costs O((held-back + piece) * stop strings); what is held back is shorter than the longest stop
    string.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_stop_string: bool) -> None:
        self._stop_strings = sorted(set(stop_strings), key=lambda stop: (-len(stop), stop))
        self._include = include_stop_string
        self._held_back = ""

    def feed(self, text: str) -> StopMatch:
        """Take the next piece."""
        if not self._stop_strings:
            return StopMatch(text)
        text = self._held_back + text
        ends = [(text.find(stop) + len(stop), stop) for stop in self._stop_strings if stop in text]
        if ends:
            # min() keeps the first of equal ends, and the stop strings are sorted longest first.
            end, stop = min(ends, key=lambda found: found[0])
            self._held_back = ""
            return StopMatch(text[: end if self._include else end - len(stop)], stop)
        shown = len(text) - self._num_held_back(text)
        self._held_back = text[shown:]
        return StopMatch(text[:shown])

    def flush(self) -> str:
        """Give what was held back: no stop string can come any more."""
        text, self._held_back = self._held_back, ""
        return text

    def _num_held_back(self, text: str) -> int:
        longest = min(len(text), len(self._stop_strings[0]) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0
