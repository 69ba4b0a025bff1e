"""Tokens a second of requests that are all there at the start."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lora_serve.cli.bench.bench_engine import BenchEngine
from lora_serve.cli.bench.step_counts import Counts, StepCounts
from lora_serve.cli.bench.workloads import ClosedBatch

WARM_UP_SEED = 10_000


@dataclass(frozen=True)
class ClosedResult:
    """What one run of a closed batch gave.

    Parameters
    ----------
    tokens_per_s
        Output tokens, or prompt tokens of a workload with one output token, from the first request handed
        over to the last token received.
    first_token_ms, took_ms
        Until the first of all tokens, and until the last.
    counts
        As `StepCounts` gives them.
    """

    tokens_per_s: float
    first_token_ms: float
    took_ms: float
    counts: Counts


def run_closed_batch(engine: BenchEngine, workload: ClosedBatch, seed: int) -> ClosedResult:
    """Run a closed batch once."""
    requests = engine.requests.make(workload, engine.names, seed)
    counts = StepCounts(engine.core)
    first_token_at = 0.0
    num_live = len(requests)
    begin = time.perf_counter()
    for request in requests:
        engine.core.add_request(request)
    while num_live:
        outputs = engine.step()
        if outputs and not first_token_at:
            first_token_at = time.perf_counter()
        for output in outputs:
            if output.finish_reason is not None:
                num_live -= 1
    end = time.perf_counter()
    figures = counts.figures()
    engine.core.settle()
    tokens = workload.num_prompt_tokens if workload.is_prefill else workload.num_output_tokens
    return ClosedResult(
        tokens_per_s=workload.num_requests * tokens / (end - begin),
        first_token_ms=(first_token_at - begin) * 1e3,
        took_ms=(end - begin) * 1e3,
        counts=figures,
    )


def best_closed_batch(
    engine: BenchEngine, workload: ClosedBatch, repeats: int
) -> tuple[ClosedResult, list[float]]:
    """Give the best of some runs after a warm-up, and the tokens/s of all of them in their order."""
    run_closed_batch(engine, workload, WARM_UP_SEED)
    runs = [run_closed_batch(engine, workload, seed) for seed in range(repeats)]
    best = max(runs, key=lambda run: run.tokens_per_s)
    return best, [run.tokens_per_s for run in runs]
