"""Wall times of a benchmark's repetitions, and what a row tells of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def wall_times_ms(
    run: Callable[[], object], repetitions: int, before: Callable[[], object] | None = None
) -> list[float]:
    """Wall times of `run` after two runs that do not count. `before` runs ahead of each and is not timed."""
    times: list[float] = []
    for _ in range(repetitions + 2):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times[2:]


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, interpolated."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], statistics.median(values), tenths[7]
