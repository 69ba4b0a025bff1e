"""One call at a time for all who ask for the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class SharedCall(Generic[_Result]):
    """Makes a call for everybody who asks, never two at a time, whoever asks how often.

    Who asks while a call is under way shares the next one with all who do: what a call gives is never older
    than the question. Nobody waits for more than two calls. A caller that goes away ends nobody's call.

    Parameters
    ----------
    call : callable
        Makes the call; all who share it get the same result, or its error.
    """

    def __init__(self, call: Callable[[], Awaitable[_Result]]) -> None:
        self._call = call
        self._current: asyncio.Task[_Result] | None = None
        self._next: asyncio.Task[_Result] | None = None

    async def __call__(self) -> _Result:
        """Give what the call gives that begins next."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._begin_after(self._current))
            self._next.add_done_callback(_take_error)
        return await asyncio.shield(self._next)

    async def _begin_after(self, current: asyncio.Task[_Result] | None) -> _Result:
        if current is not None:
            await asyncio.wait({current})
        self._current, self._next = self._next, None
        return await self._call()


def _take_error(task: asyncio.Task[_Result]) -> None:
    """Note that the error was seen: those who wait get it, and there may be none left."""
    if not task.cancelled():
        task.exception()
