"""Loops that leave the interpreter lock to other threads often enough."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")

MAX_HOLD_S = 200e-6
_PAUSE_S = 20e-6


def sharing_lock(items: Iterable[_T]) -> Iterator[_T]:
    """Iterate, and sleep for a moment whenever the loop has run for ``MAX_HOLD_S`` seconds.

    Parameters
    ----------
    items
        What to iterate over; the work on one item should take far less than ``MAX_HOLD_S``.

    Notes
    -----
    A thread that only runs Python code keeps the interpreter lock for five milliseconds before another one
    gets it, and the step loop is such another one. Sleeping for no time is not enough: the thread that gave
    the lock up usually takes it again before the one that waits has woken up.
    """
    due = time.perf_counter() + MAX_HOLD_S
    for item in items:
        yield item
        if time.perf_counter() >= due:
            time.sleep(_PAUSE_S)
            due = time.perf_counter() + MAX_HOLD_S
