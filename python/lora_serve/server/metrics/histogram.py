"""Values counted by size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Upper bounds as vLLM's histograms have them, so that panels can add up servers of both; steps below its
# smallest bound are ours.
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_S = (
    *(0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(step * 10.0**exponent for exponent in range(6) for step in (1, 2, 5))
"""1, 2, 5, 10 and so on; vLLM's end at the longest prompt that the model takes."""


class Histogram:
    """Counts values by size, in plain lists: one value costs less than a microsecond.

    prometheus_client's own histograms take a lock for each of two numbers and look for the bucket one by one,
    which costs several times as much; nothing here is shared between threads.

    Parameters
    ----------
    bounds : sequence of float
        Upper bounds of the buckets, ascending, each included in its own; what is larger has a bucket too.

    Attributes
    ----------
    counts : list of int
        [len(bounds) + 1] values in each bucket.
    total : float
        The values, added up.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Count what another one of the same bounds has counted."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def copy(self) -> Histogram:
        """Give what was counted so far."""
        twin = Histogram(())
        twin.bounds, twin.counts, twin.total = self.bounds, self.counts.copy(), self.total
        return twin

    def buckets(self, *, every: int = 1) -> list[tuple[str, float]]:
        """Give bounds, as Prometheus writes them, with the number of values up to each.

        Parameters
        ----------
        every : int
            Only each bound of this number is given: fewer lines, with the same truth.
        """
        result = []
        num_values = 0
        for number, (bound, count) in enumerate(zip(self.bounds, self.counts, strict=False), 1):
            num_values += count
            if number % every == 0:
                result.append((str(bound), float(num_values)))
        return [*result, ("+Inf", float(num_values + self.counts[-1]))]
