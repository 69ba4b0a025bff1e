"""What becomes of requests, counted as their tokens arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from lora_serve.common.outputs import CompletionOutput, RequestOutput
from lora_serve.engine.request_stream import RequestStream
from lora_serve.server.metrics.histogram import (
    FIRST_TOKEN_S,
    INTER_TOKEN_S,
    REQUEST_S,
    TOKENS,
    Histogram,
)

FINISH_REASONS = ("stop", "length", "abort", "error")
"""vLLM's names; 'abort' is also an answer whose reader went away."""
UNLOADED_SERIES_S = 300.0
"""So long after its adapter is unloaded a series is shown: longer than any usual interval between scrapes."""
OTHER_ADAPTERS = "other adapters"
"""In place of the names of adapters without series of their own; no adapter can have this name."""


class RequestSeries:
    """The counts of the requests of one adapter, or of several."""

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN_S)
        self.inter_token = Histogram(INTER_TOKEN_S)
        self.latency = Histogram(REQUEST_S)
        self.queue = Histogram(REQUEST_S)
        self.prompt_tokens = Histogram(TOKENS)
        self.generation_tokens = Histogram(TOKENS)
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_finished = dict.fromkeys(FINISH_REASONS, 0)
        self.num_live = 0
        self.unloaded_at: float | None = None

    def add(self, other: RequestSeries) -> None:
        """Count what another one has counted."""
        for mine, its in zip(self._histograms(), other._histograms(), strict=True):
            mine.add(its)
        self.num_prompt_tokens += other.num_prompt_tokens
        self.num_generation_tokens += other.num_generation_tokens
        for reason, count in other.num_finished.items():
            self.num_finished[reason] = self.num_finished.get(reason, 0) + count

    def copy(self) -> RequestSeries:
        """Give what was counted so far."""
        twin = RequestSeries.__new__(RequestSeries)
        twin.__dict__.update(self.__dict__)
        twin.num_finished = self.num_finished.copy()
        for name, value in self.__dict__.items():
            if isinstance(value, Histogram):
                setattr(twin, name, value.copy())
        return twin

    def _histograms(self) -> list[Histogram]:
        return [value for value in self.__dict__.values() if isinstance(value, Histogram)]


class StreamWatch:
    """Counts one prompt's answers in a series, from its submission to their end.

    Parameters
    ----------
    series : RequestSeries
        Where they count.
    num_prompt_tokens : int
        Of the prompt.
    num_answers : int
        `n`.
    arrived_at : float
        When the prompt was submitted, on the clock's scale.
    clock : callable
        Gives seconds, never going back.
    """

    __slots__ = ("_arrived_at", "_clock", "_last_at", "_num_prompt_tokens", "_num_tokens", "_series")

    def __init__(
        self,
        series: RequestSeries,
        num_prompt_tokens: int,
        num_answers: int,
        arrived_at: float,
        clock: Callable[[], float],
    ) -> None:
        self._series = series
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived_at = arrived_at
        self._clock = clock
        self._last_at: list[float | None] = [None] * num_answers
        self._num_tokens: dict[int, int] = dict.fromkeys(
            range(num_answers), 0
        )  # Of those that have not ended.
        series.num_live += 1

    def on_output(self, output: RequestOutput) -> None:
        """Count a delta that has just arrived."""
        now = self._clock()
        series = self._series
        if output.queue_s is not None:
            series.queue.observe(output.queue_s)
        for answer in output.outputs:
            index = answer.index
            num_tokens = len(answer.token_ids)
            if num_tokens:
                last_at = self._last_at[index]
                if last_at is None:
                    series.first_token.observe(now - self._arrived_at)
                    series.num_prompt_tokens += self._num_prompt_tokens
                else:
                    series.inter_token.observe(now - last_at)
                self._last_at[index] = now
                series.num_generation_tokens += num_tokens
                self._num_tokens[index] += num_tokens
            if answer.finish_reason is not None:
                self._finish(answer, now)
        if not self._num_tokens:
            self._end()

    def on_failure(self) -> None:
        """Count the answers that an error has ended."""
        self._series.num_finished["error"] += len(self._num_tokens)
        self._end()

    def on_abandoned(self) -> None:
        """Count the answers whose reader went away."""
        self._series.num_finished["abort"] += len(self._num_tokens)
        self._end()

    def _finish(self, answer: CompletionOutput, now: float) -> None:
        num_tokens = self._num_tokens.pop(answer.index, 0)
        series = self._series
        reason = answer.finish_reason or "abort"
        series.num_finished[reason] = series.num_finished.get(reason, 0) + 1
        series.latency.observe(now - self._arrived_at)
        series.prompt_tokens.observe(self._num_prompt_tokens)
        series.generation_tokens.observe(num_tokens)

    def _end(self) -> None:
        self._num_tokens.clear()
        self._series.num_live -= 1


class RequestMetrics:
    """Counts what becomes of every request that the engine has accepted, by adapter.

    Not for several threads: the event loop's alone. The number of series is bounded: the base model, the
    first `max_adapters` adapters, and all others together. The series of an adapter goes some time after it
    was unloaded, and makes room for another; what it has counted stays in the totals.

    Parameters
    ----------
    base_name : str
        The base model's name, under which its requests are shown beside the adapters'.
    max_adapters : int
        Most adapters with series of their own, at least 0.
    clock : callable
        Gives seconds, never going back.
    """

    def __init__(
        self, base_name: str, max_adapters: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._base_name = base_name
        self._max_adapters = max_adapters
        self._clock = clock
        self._base = RequestSeries()
        self._others = RequestSeries()
        self._retired = RequestSeries()
        self._by_adapter: dict[str, RequestSeries] = {}

    def watch(self, stream: RequestStream, num_answers: int, arrived_at: float) -> StreamWatch:
        """Count a stream's answers from now on.

        Parameters
        ----------
        stream : RequestStream
            Accepted by the engine.
        num_answers : int
            `n`.
        arrived_at : float
            When it was submitted, on the clock's scale.
        """
        return StreamWatch(
            self._series_of(stream.lora_name),
            len(stream.prompt_token_ids),
            num_answers,
            arrived_at,
            self._clock,
        )

    def note_loaded(self, names: Iterable[str]) -> None:
        """Take the names that serve now: series of others go UNLOADED_SERIES_S after they were missed."""
        loaded = set(names)
        now = self._clock()
        for name, series in list(self._by_adapter.items()):
            if name in loaded or series.num_live:
                series.unloaded_at = None
            elif series.unloaded_at is None:
                series.unloaded_at = now
            elif now - series.unloaded_at >= UNLOADED_SERIES_S:
                del self._by_adapter[name]
                self._retired.add(series)

    def by_adapter(self) -> dict[str, RequestSeries]:
        """Give a copy of what was counted under each name: the base model's, adapters', OTHER_ADAPTERS."""
        series = {self._base_name: self._base, **self._by_adapter, OTHER_ADAPTERS: self._others}
        return {name: one.copy() for name, one in series.items()}

    def retired(self) -> RequestSeries:
        """Give a copy of what series that have gone had counted, which totals keep."""
        return self._retired.copy()

    def _series_of(self, lora_name: str | None) -> RequestSeries:
        if lora_name is None:
            return self._base
        series = self._by_adapter.get(lora_name)
        if series is None:
            if len(self._by_adapter) >= self._max_adapters:
                return self._others
            series = self._by_adapter[lora_name] = RequestSeries()
        return series
