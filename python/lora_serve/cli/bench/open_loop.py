"""Waits of requests that come at random times."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from lora_serve.cli.bench.bench_engine import BenchEngine
from lora_serve.cli.bench.closed_batch import WARM_UP_SEED
from lora_serve.cli.bench.step_counts import Counts, StepCounts
from lora_serve.cli.bench.workloads import OpenLoop
from lora_serve.engine.messages import EngineRequest

WARM_UP_REQUESTS = 64
_LONGEST_SLEEP_S = 1e-3


@dataclass(frozen=True)
class OpenResult:
    """What one run of an open loop gave.

    Parameters
    ----------
    figures
        In milliseconds `ttft_p50_ms`, `_p99_ms`, `_max_ms` (from a request's arrival to its first token),
        `itl_...` (between two tokens of a request), `e2e_...` (from its arrival to its last token); and
        `completed_per_s`, `output_tokens_per_s`, from the first arrival to the last token.
    counts
        As `StepCounts` gives them.
    """

    figures: dict[str, float]
    counts: Counts


@dataclass
class _Progress:
    arrived_at: float
    last_token_at: float = 0.0


@dataclass
class RequestTimes:
    """Milliseconds of each kind, and the requests that are under way.

    Attributes
    ----------
    ttft, itl, e2e : list of float
        From arrival to first token, between tokens, from arrival to last token.
    live : dict
        Requests without their last token.
    """

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    live: dict[int, _Progress] = field(default_factory=dict)

    def note_token(self, request_id: int, now: float, *, is_last: bool) -> None:
        """Count a token that came at `now`."""
        progress = self.live[request_id]
        if progress.last_token_at:
            self.itl.append((now - progress.last_token_at) * 1e3)
        else:
            self.ttft.append((now - progress.arrived_at) * 1e3)
        progress.last_token_at = now
        if is_last:
            self.e2e.append((now - progress.arrived_at) * 1e3)
            del self.live[request_id]

    def figures(self) -> dict[str, float]:
        """p50, p99 and the maximum of each kind, as `OpenResult` has them."""
        found: dict[str, float] = {}
        for name, times in (("ttft", self.ttft), ("itl", self.itl), ("e2e", self.e2e)):
            values = np.quantile(times, (0.5, 0.99, 1.0)) if times else np.zeros(3)
            for part, value in zip(("p50", "p99", "max"), values.tolist(), strict=True):
                found[f"{name}_{part}_ms"] = round(value, 2)
        return found


def run_open_loop(engine: BenchEngine, workload: OpenLoop, seed: int) -> OpenResult:
    """Run the open loop once, after some of the same traffic that does not count."""
    warm_up = engine.requests.make(workload, engine.names, WARM_UP_SEED)[:WARM_UP_REQUESTS]
    offer(engine, warm_up, workload.rate, WARM_UP_SEED)
    requests = engine.requests.make(workload, engine.names, seed)
    counts = StepCounts(engine.core)
    times, took_s = offer(engine, requests, workload.rate, seed)
    return OpenResult(
        figures={
            **times.figures(),
            "completed_per_s": round(len(requests) / took_s, 3),
            "output_tokens_per_s": round(len(requests) * workload.num_output_tokens / took_s, 1),
        },
        counts=counts.figures(),
    )


def offer(
    engine: BenchEngine, requests: list[EngineRequest], rate: float, seed: int
) -> tuple[RequestTimes, float]:
    """Send requests at random times, and step until all are answered.

    Parameters
    ----------
    rate
        Arrivals a second, Poisson.
    seed
        Of the arrivals.

    Returns
    -------
    tuple of RequestTimes and float
        Their times, and the seconds from the beginning to the last token.
    """
    gaps = np.random.default_rng(seed + 1).exponential(1 / rate, len(requests))
    times = RequestTimes()
    begin = time.perf_counter()
    _send_and_step(engine, requests, (begin + np.cumsum(gaps)).tolist(), times)
    took_s = time.perf_counter() - begin
    engine.core.settle()
    return times, took_s


def _send_and_step(
    engine: BenchEngine, requests: list[EngineRequest], arrivals: list[float], times: RequestTimes
) -> None:
    num_sent = 0
    while num_sent < len(requests) or times.live:
        while num_sent < len(requests) and arrivals[num_sent] <= time.perf_counter():
            engine.core.add_request(requests[num_sent])
            times.live[requests[num_sent].request_id] = _Progress(arrivals[num_sent])
            num_sent += 1
        until_next_s = _LONGEST_SLEEP_S
        if num_sent < len(requests):
            until_next_s = max(0.0, arrivals[num_sent] - time.perf_counter())
        if not engine.core.has_work:
            engine.core.wait_for_news(min(_LONGEST_SLEEP_S, until_next_s))
            continue
        outputs = engine.step(until_next_s)
        now = time.perf_counter()
        for output in outputs:
            if output.new_token_ids:
                times.note_token(output.request_id, now, is_last=output.finish_reason is not None)
