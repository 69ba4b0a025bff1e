"""Traces some steps of a workload, and says where the device's time goes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from lora_serve.cli.bench.bench_engine import BenchEngine
from lora_serve.cli.bench.open_loop import offer
from lora_serve.cli.bench.workloads import ClosedBatch, OpenLoop, Workload

NUM_STEPS = 20
_SETTLING_STEPS = 4
_OPEN_LOOP_S = 2.0
_SEED = 20_000
_NOTICEABLE_US = 5.0
_TABLE_ROWS = 40
_NAME_WIDTH = 100
_DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Span:
    """One thing that the device did.

    Parameters
    ----------
    name
        Of the kernel or copy.
    begin_us, end_us
        When, on the trace's clock.
    """

    name: str
    begin_us: float
    end_us: float


def profile_workload(engine: BenchEngine, workload: Workload, folder: Path, name: str) -> dict[str, Any]:
    """Trace a closed batch's decode steps (or all of a prefill), or some seconds of an open loop.

    Parameters
    ----------
    folder
        Gets `NAME.trace.json.gz`, for chrome://tracing or Perfetto, and `NAME.txt`, the tables.

    Returns
    -------
    dict
        'steps', 'span_ms' (from the first thing on the device to the last), 'busy_share' of it,
        'idle_share', and the part of the latter that gaps of 5 us and more make up,
        'idle_share_in_long_gaps'.

    Notes
    -----
    On CUDA only the device's side is traced: recording the host's operators would slow the host down and show
    gaps that are not there otherwise.
    """
    is_cuda = engine.core.config.is_cuda
    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU],
        experimental_config=None if is_cuda else _every_thread(),
        acc_events=True,  # There is one cycle; without this torch warns that each clears the one before.
    )
    first = engine.core.num_steps
    if isinstance(workload, ClosedBatch):
        num_steps = _trace_batch(engine, workload, profiler)
    else:
        _trace_open_loop(engine, workload, profiler)
        num_steps = engine.core.num_steps - first
    if num_steps == 0:  # Too few tokens.
        return {"steps": 0}
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{name}.trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    spans = read_spans(trace, _DEVICE_CATEGORIES if is_cuda else {"cpu_op"})
    found = {"steps": num_steps, **summarize(spans), "trace": trace.name}
    text = f"{name}: {workload.describe()}\n{json.dumps(found)}\n\n{kernel_table(spans)}\n{gap_table(spans)}"
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return found


def read_spans(trace: Path, categories: set[str]) -> list[Span]:
    """Give what a trace has of some categories, by begin."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    spans = [
        Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in events
        if event.get("cat") in categories and "dur" in event
    ]
    return sorted(spans, key=lambda span: span.begin_us)


def find_gaps(spans: list[Span]) -> list[tuple[Span, Span, float]]:
    """Give each time at which nothing ran: what had ended last before, what began after, microseconds.

    Parameters
    ----------
    spans
        By begin; they may overlap, on different streams.
    """
    gaps = []
    last = None
    for span in spans:
        if last is not None and span.begin_us > last.end_us:
            gaps.append((last, span, span.begin_us - last.end_us))
        if last is None or span.end_us > last.end_us:
            last = span
    return gaps


def summarize(spans: list[Span]) -> dict[str, float]:
    """Give span, busy and idle shares; see `profile_workload`."""
    if not spans:
        return {"span_ms": 0.0, "busy_share": 0.0, "idle_share": 0.0, "idle_share_in_long_gaps": 0.0}
    span_us = max(span.end_us for span in spans) - spans[0].begin_us
    gaps = np.array([gap for _, _, gap in find_gaps(spans)])
    idle = float(gaps.sum()) / span_us
    return {
        "span_ms": round(span_us / 1e3, 3),
        "busy_share": round(1 - idle, 4),
        "idle_share": round(idle, 4),
        "idle_share_in_long_gaps": round(float(gaps[gaps >= _NOTICEABLE_US].sum()) / span_us, 4),
    }


def kernel_table(spans: list[Span]) -> str:
    """Give kernels and copies by their total time."""
    return _table("on the device", ((span.name, span.end_us - span.begin_us) for span in spans))


def gap_table(spans: list[Span]) -> str:
    """Give what the device waits between, by total time."""
    half = _NAME_WIDTH // 2 - 2
    gaps = ((f"{one.name[:half]} -> {other.name[:half]}", gap) for one, other, gap in find_gaps(spans))
    return _table("idle between", gaps)


def _table(title: str, times: Iterable[tuple[str, float]]) -> str:
    by_name: dict[str, list[float]] = {}
    for name, time_us in times:
        by_name.setdefault(name, []).append(time_us)
    lines = [f"{'total ms':>10} {'number':>7} {'mean us':>9} {'max us':>9}  {title}"]
    ordered = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    for name, found in ordered[:_TABLE_ROWS]:
        total, number = sum(found), len(found)
        lines.append(
            f"{total / 1e3:10.3f} {number:7} {total / number:9.2f} {max(found):9.2f}  {name[:_NAME_WIDTH]}"
        )
    return "\n".join(lines) + "\n"


def _every_thread() -> Any:
    """On a CPU another thread runs the model than the one that traces."""
    from torch._C._profiler import _ExperimentalConfig

    return _ExperimentalConfig(profile_all_threads=True)


def _trace_batch(engine: BenchEngine, workload: ClosedBatch, profiler: torch.profiler.profile) -> int:
    """Trace steps once all have their first token and some steps have passed, or a prefill from its start."""
    num_running = 0 if workload.is_prefill else min(workload.num_requests, engine.core.config.max_num_seqs)
    num_to_settle = min(_SETTLING_STEPS, workload.num_output_tokens // 4)
    num_left = workload.num_requests
    has_token: set[int] = set()
    for request in engine.requests.make(workload, engine.names, _SEED):
        engine.core.add_request(request)
    num_traced = 0
    while num_left:
        if len(has_token) >= num_running:
            num_to_settle -= 1
        if num_to_settle < 0 and num_traced == 0:
            profiler.start()
        outputs = engine.step()
        if num_to_settle < 0:
            num_traced += 1
            if num_traced == NUM_STEPS:
                profiler.stop()
        for output in outputs:
            has_token.add(output.request_id)
            num_left -= output.finish_reason is not None
    if 0 < num_traced < NUM_STEPS:
        profiler.stop()
    engine.core.settle()
    return min(num_traced, NUM_STEPS)


def _trace_open_loop(engine: BenchEngine, workload: OpenLoop, profiler: torch.profiler.profile) -> None:
    num_requests = max(1, min(workload.num_requests, round(workload.rate * _OPEN_LOOP_S)))
    requests = engine.requests.make(workload, engine.names, _SEED)[:num_requests]
    profiler.start()
    offer(engine, requests, workload.rate, _SEED)
    profiler.stop()
