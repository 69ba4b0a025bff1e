"""How fast recent steps were, to tell clients when another try is worth it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

WINDOW_S = 5.0
"""Steps of the last seconds of work count; older ones are forgotten little by little."""
MAX_WAIT_S = 60


class Throughput:
    """Tokens a second of recent steps; time without work does not count.

    Parameters
    ----------
    clock : callable
        Seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._num_tokens = 0.0
        self._seconds = 0.0

    def resume(self) -> None:
        """Begin to measure: there was no work until now."""
        self._last = self._clock()

    def add(self, num_tokens: int) -> None:
        """Note that a step with so many tokens has ended."""
        now = self._clock()
        elapsed, self._last = now - self._last, now
        kept = math.exp(-elapsed / WINDOW_S)
        self._num_tokens = kept * self._num_tokens + num_tokens
        self._seconds = kept * self._seconds + elapsed

    def seconds_for(self, num_tokens: int) -> int:
        """Estimate how long so many tokens take: whole seconds in [1, 60]; 1 before the first step."""
        if self._num_tokens <= 0:
            return 1
        return min(MAX_WAIT_S, max(1, math.ceil(num_tokens * self._seconds / self._num_tokens)))
