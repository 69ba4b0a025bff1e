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
"""In place of the names of adapters without series of their own."""


class RequestSeries:
    """The counts of the requests of one adapter, or of several."""

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN_S)
        self.inter_token = Histogram(INTER_TOKEN_S)
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_finished = dict.fromkeys(FINISH_REASONS, 0)
        self.num_live = 0
        self.unloaded_at: float | None = None

    def add(self, other: RequestSeries) -> None:
        """Count what another one has counted."""
        self.first_token.add(other.first_token)
        self.inter_token.add(other.inter_token)
        self.num_prompt_tokens += other.num_prompt_tokens
        self.num_generation_tokens += other.num_generation_tokens
        for reason, count in other.num_finished.items():
            self.num_finished[reason] = self.num_finished.get(reason, 0) + count

    def copy(self) -> RequestSeries:
        """Give what was counted so far."""
        twin = RequestSeries()
        twin.add(self)
        return twin


class ModelSeries:
    """What is counted of all answers together, once for each, when they end."""

    def __init__(self) -> None:
        self.latency = Histogram(REQUEST_S)
        self.queue = Histogram(REQUEST_S)
        self.prefill = Histogram(REQUEST_S)
        self.decode = Histogram(REQUEST_S)
        self.inference = Histogram(REQUEST_S)
        self.time_per_token = Histogram(INTER_TOKEN_S)
        self.prompt_tokens = Histogram(TOKENS)
        self.generation_tokens = Histogram(TOKENS)
        self.most_generation_tokens = Histogram(TOKENS)

    def copy(self) -> ModelSeries:
        """Give what was counted so far."""
        twin = ModelSeries()
        for name, histogram in self.__dict__.items():
            setattr(twin, name, histogram.copy())
        return twin


class _AnswerWatch:
    """When an answer's first and last token came, and how many have."""

    __slots__ = ("first_at", "last_at", "num_tokens")

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.last_at = 0.0
        self.num_tokens = 0


class StreamWatch:
    """Counts one prompt's answers, from its submission to their end.

    Parameters
    ----------
    series : RequestSeries
        Of its adapter.
    model : ModelSeries
        Of all.
    num_prompt_tokens : int
        Of the prompt.
    num_answers : int
        `n`.
    arrived_at : float
        When the prompt was submitted, on the clock's scale.
    clock : callable
        Gives seconds, never going back.
    """

    __slots__ = (
        "_answers",
        "_arrived_at",
        "_clock",
        "_model",
        "_most_tokens",
        "_num_prompt_tokens",
        "_queue_s",
        "_series",
    )

    def __init__(
        self,
        series: RequestSeries,
        model: ModelSeries,
        *,
        num_prompt_tokens: int,
        num_answers: int,
        arrived_at: float,
        clock: Callable[[], float],
    ) -> None:
        self._series = series
        self._model = model
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived_at = arrived_at
        self._clock = clock
        self._queue_s = 0.0
        self._most_tokens = 0
        self._answers = {index: _AnswerWatch() for index in range(num_answers)}  # Those that have not ended.
        series.num_live += 1

    def on_output(self, output: RequestOutput) -> None:
        """Count a delta that has just arrived."""
        now = self._clock()
        series = self._series
        if output.queue_s is not None:
            self._queue_s = output.queue_s
            self._model.queue.observe(output.queue_s)
        for answer in output.outputs:
            watch = self._answers.get(answer.index)
            if watch is None:
                continue  # It has ended.
            num_tokens = len(answer.token_ids)
            if num_tokens:
                if watch.first_at is None:
                    watch.first_at = now
                    series.first_token.observe(now - self._arrived_at)
                    series.num_prompt_tokens += self._num_prompt_tokens
                else:
                    series.inter_token.observe(now - watch.last_at)
                watch.last_at = now
                watch.num_tokens += num_tokens
                series.num_generation_tokens += num_tokens
            if answer.finish_reason is not None:
                self._finish(answer, watch, now)
        if not self._answers:
            self._model.most_generation_tokens.observe(self._most_tokens)
            self._end()

    def on_failure(self) -> None:
        """Count the answers that an error has ended."""
        self._series.num_finished["error"] += len(self._answers)
        self._end()

    def on_abandoned(self) -> None:
        """Count the answers whose reader went away."""
        self._series.num_finished["abort"] += len(self._answers)
        self._end()

    def _finish(self, answer: CompletionOutput, watch: _AnswerWatch, now: float) -> None:
        del self._answers[answer.index]
        self._most_tokens = max(self._most_tokens, watch.num_tokens)
        reason = answer.finish_reason or "abort"
        self._series.num_finished[reason] = self._series.num_finished.get(reason, 0) + 1
        model = self._model
        model.latency.observe(now - self._arrived_at)
        model.prompt_tokens.observe(self._num_prompt_tokens)
        model.generation_tokens.observe(watch.num_tokens)
        if watch.first_at is not None:
            prefill_s = max(watch.first_at - self._arrived_at - self._queue_s, 0.0)
            decode_s = watch.last_at - watch.first_at
            model.prefill.observe(prefill_s)
            model.decode.observe(decode_s)
            model.inference.observe(prefill_s + decode_s)
            if watch.num_tokens > 1:
                model.time_per_token.observe(decode_s / (watch.num_tokens - 1))

    def _end(self) -> None:
        self._answers.clear()
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
        self._model = ModelSeries()
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
            self._model,
            num_prompt_tokens=len(stream.prompt_token_ids),
            num_answers=num_answers,
            arrived_at=arrived_at,
            clock=self._clock,
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

    def model(self) -> ModelSeries:
        """Give a copy of what was counted of all answers together."""
        return self._model.copy()

    def retired(self) -> RequestSeries:
        """Give a copy of what series that have gone had counted, which totals keep."""
        return self._retired.copy()

    def _series_of(self, lora_name: str | None) -> RequestSeries:
        if lora_name is None:
            return self._base
        series = self._by_adapter.get(lora_name)
        if series is None:
            is_taken = lora_name in (self._base_name, OTHER_ADAPTERS)  # As the path of an adapter may be.
            if is_taken or len(self._by_adapter) >= self._max_adapters:
                return self._others
            series = self._by_adapter[lora_name] = RequestSeries()
        return series
