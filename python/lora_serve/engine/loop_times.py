"""How long the step loop itself takes in each step, without the model."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

WINDOW_STEPS = 8192
"""Steps that are remembered: a minute or more of a busy engine."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LoopTimeQuantiles:
    """What the loop itself took in recent steps, in microseconds; 0 before the first step."""

    p50_us: int
    p99_us: int
    max_us: int


class LoopTimes:
    """Measures what a step takes without the wait for the executor's result.

    What is left is what delays the device when the loop is slow: planning, taking results, adapter life
    cycle. So a loop that is held up by anything but the model shows here, by the interpreter lock as well.

    Parameters
    ----------
    clock_ns
        Gives nanoseconds, never going back.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock_ns = clock_ns
        self._recent_ns: deque[int] = deque(maxlen=WINDOW_STEPS)
        self._waited_ns = 0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measure one step: what is inside, without its waits; a step that raises does not count."""
        self._waited_ns = 0
        begin_ns = self._clock_ns()
        yield
        self._recent_ns.append(self._clock_ns() - begin_ns - self._waited_ns)

    def wait_for(self, wait: Callable[[], _Result]) -> _Result:
        """Give what `wait` gives; the time that it takes is not the loop's own."""
        begin_ns = self._clock_ns()
        try:
            return wait()
        finally:
            self._waited_ns += self._clock_ns() - begin_ns

    def clear(self) -> None:
        """Forget the steps so far."""
        self._recent_ns.clear()

    def recent_us(self) -> npt.NDArray[np.float64]:
        """[steps] float64: microseconds of the last `WINDOW_STEPS` steps, oldest first."""
        return np.fromiter(self._recent_ns, np.float64, len(self._recent_ns)) / 1000

    def quantiles(self) -> LoopTimeQuantiles:
        """Over the same steps."""
        if not self._recent_ns:
            return LoopTimeQuantiles(0, 0, 0)
        values = np.quantile(self.recent_us(), (0.5, 0.99, 1.0))
        return LoopTimeQuantiles(*(round(value) for value in values))
