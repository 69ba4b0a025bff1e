"""What the benchmarks of small kernels share: graph replays over rotating buffers, rows, options.

A case is one call at one size by several providers. Each provider is captured once into a CUDA graph that
calls it on many sets of buffers, one after the other, so that what it reads has left the caches. Launches
from the host are not timed; the distance between two kernels of a graph is. The time of a call is that of the
replay over the number of calls. The floor is the bytes that a call must move, at the rate of a large copy in
the same run.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows
from timing import percentiles

RESULT_FILE = "elementwise_kernels"
_ROTATED_BYTES = 192 << 20  # several times the second-level cache
_MAX_CALLS = 400


@dataclass(frozen=True)
class Case:
    """One call at one size.

    Parameters
    ----------
    kernel, shape
        Names for the row, the shape in the axis letters of the conventions.
    num_bytes
        What a call must read and write at least.
    make_call
        Makes one call on buffers of its own, given a provider's name; None = the provider has none.
    """

    kernel: str
    shape: str
    num_bytes: int
    make_call: Callable[[str], Callable[[], object] | None]


class Bench:
    """Options, the device, and the rows of one benchmark.

    Parameters
    ----------
    description
        Of the benchmark's file.
    """

    def __init__(self, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--smallest", action="store_true", help="the first case, once; no rows")
        parser.add_argument("--dry-run", action="store_true", help="print the rows, do not append them")
        parser.add_argument("--repetitions", type=int, default=30)
        self._options = parser.parse_args()
        self._rows: list[dict[str, object]] = []
        self.is_smallest = self._options.smallest
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # The interpreter takes bfloat16 wrongly in places.
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float16

    def sizes(self, *sizes: int) -> tuple[int, ...]:
        """All sizes, or the first one only."""
        return sizes[:1] if self.is_smallest else sizes

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def run(self, cases: list[Case], providers: tuple[str, ...] = ("ours", "torch")) -> int:
        """Measure all cases and append the rows; the exit status."""
        if self.is_smallest or self.device == "cpu":
            return self._run_once(cases[0], providers)
        gb_per_s = copy_rate_gb_per_s()
        for case in cases:
            for provider in providers:
                self._measure(case, provider, gb_per_s)
        if not self._options.dry_run:
            print(f"appended to {append_rows(RESULT_FILE, self._rows)}")
        return 0

    def _run_once(self, case: Case, providers: tuple[str, ...]) -> int:
        for provider in providers:
            call = case.make_call(provider)
            if call is not None:
                call()
        if not self.is_smallest:
            print("without a GPU there is nothing to time: ran the first case once", file=sys.stderr)
        return 0

    def _measure(self, case: Case, provider: str, gb_per_s: float) -> None:
        num_calls = max(20, min(_MAX_CALLS, _ROTATED_BYTES // case.num_bytes))
        made = [case.make_call(provider) for _ in range(num_calls)]
        calls = [call for call in made if call is not None]
        if not calls:
            return
        times_us = graph_times_us(calls, self._options.repetitions)
        p20, p50, p80 = percentiles(times_us)
        row: dict[str, object] = {
            "kernel": case.kernel,
            "provider": provider,
            "shape": case.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_bytes": case.num_bytes,
            "floor_us": round(case.num_bytes / gb_per_s / 1e3, 3),
            "p20_us": round(p20, 3),
            "p50_us": round(p50, 3),
            "p80_us": round(p80, 3),
            "copy_gb_per_s": round(gb_per_s),
            "repetitions": self._options.repetitions,
            "triton": triton_version(),
            "driver": driver_version(),
        }
        self._rows.append(row)
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)


def graph_times_us(calls: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Time of one call in each of `repetitions` replays of a graph of all calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()  # compiles; a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times_us = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3 / len(calls))
    return times_us


def copy_rate_gb_per_s() -> float:
    """Bytes read and written by a large copy, best of ten."""
    source = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / min(graph_times_us([lambda: target.copy_(source)], 10)) / 1e3


def matmul_tflops() -> float:
    """Operations of a large product in bfloat16, best of ten."""
    size = 8192
    x, y = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(x)
    return 2 * size**3 / min(graph_times_us([lambda: torch.mm(x, y, out=out)], 10)) / 1e6


def triton_version() -> str:
    import triton

    return str(triton.__version__)


def driver_version() -> str:
    """The kernel driver's version; empty where the system does not tell."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.read_text(encoding="ascii")) if file.exists() else None
    return found.group(0) if found else ""
