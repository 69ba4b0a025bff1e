"""A lock whose waits are counted."""

from __future__ import annotations

import threading
from types import TracebackType


class CountedLock:
    """A way to take a lock, for callers that should never have to wait for it: it counts when they did.

    Other users of the lock, whose waits are of no interest, take it directly.

    Parameters
    ----------
    lock
        What is taken.

    Attributes
    ----------
    num_waits : int
        How often somebody else held it.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self.num_waits = 0

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._lock.acquire()
            self.num_waits += 1  # With the lock, so that no count is lost.

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
