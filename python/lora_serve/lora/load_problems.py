"""Collects what is wrong with one adapter, so that its owner reads every problem at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from lora_serve.common.errors import InvalidArgumentError

MAX_LISTED_PROBLEMS = 10


class AdapterProblemsError(InvalidArgumentError):
    """An adapter cannot be loaded; the message lists some of its problems.

    Parameters
    ----------
    message
        For the user.
    problems
        All of them, however many the message lists.
    """

    def __init__(self, message: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class LoadProblems:
    """The problems of one adapter directory, in the order in which they were found.

    Parameters
    ----------
    adapter
        How messages name the adapter: its name, or its path where it has no name yet.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._sentences: list[str] = []
        self._texts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add_sentence(self, text: str) -> None:
        """Note a problem that other checks can go on after; the text completes "adapter 'x' ..."."""
        self._sentences.append(text)
        self._add(text)

    def add_in_file(self, file: str, text: str) -> None:
        """Note a problem with a file of the adapter that other checks can go on after."""
        self._add(f"{file}: {text}")

    def fail(self, text: str) -> NoReturn:
        """Note a problem that makes further checks pointless, and raise.

        Raises
        ------
        InvalidArgumentError
            Always, with every problem noted so far.
        """
        self._add(text)
        raise self._error()

    def raise_if_any(self) -> None:
        """Raise if a problem was noted.

        Raises
        ------
        InvalidArgumentError
            Lists up to ``MAX_LISTED_PROBLEMS`` problems and says how many more there are.
        """
        if self._texts:
            raise self._error()

    def _add(self, text: str) -> None:
        if text not in self._texts:
            self._texts.append(text)

    def _error(self) -> AdapterProblemsError:
        return AdapterProblemsError(self._message(), self._texts)

    def _message(self) -> str:
        if len(self._texts) == 1:
            (text,) = self._texts
            verb = "" if text in self._sentences else "cannot be loaded: "
            return f"adapter '{self.adapter}' {verb}{text}"
        listed = [f"({i}) {text}" for i, text in enumerate(self._texts[:MAX_LISTED_PROBLEMS], 1)]
        left_out = len(self._texts) - len(listed)
        if left_out:
            listed.append(f"and {left_out} more")
        return f"adapter '{self.adapter}' cannot be loaded, it has {len(self._texts)} problems: " + "; ".join(
            listed
        )
