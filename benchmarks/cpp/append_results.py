"""Runs a C++ benchmark program with repetitions and appends its figures to benchmarks/results.

A row's times are percentiles over the repetitions, each of them a mean over at least `--min-time` seconds.
They are CPU times of the benchmark's one thread.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows

NANOSECONDS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}
# What Google Benchmark adds to a name to say how it was run.
RUN_SUFFIX = re.compile(r"/(iterations|repeats|min_time):[^/]*|/(manual|real)_time")


def run(program: Path, min_time: float, repetitions: int, name_filter: str) -> dict[str, Any]:
    """Run the program, with its table on the terminal, and return its JSON output."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            str(program),
            f"--benchmark_min_time={min_time}",
            f"--benchmark_repetitions={repetitions}",
            "--benchmark_display_aggregates_only=true",
            f"--benchmark_filter={name_filter}",
            f"--benchmark_out={out}",
            "--benchmark_out_format=json",
        ]
        subprocess.run(command, check=True)
        output: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return output


def percentile(values: list[float], percent: int) -> float:
    """Interpolated between the nearest two; the value itself when there is one."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def nanoseconds(run: dict[str, Any]) -> float:
    """CPU time of a run; what a benchmark has measured itself stands in the other column."""
    measured_itself = run["run_name"].endswith("/manual_time")
    return float(run["real_time" if measured_itself else "cpu_time"]) * NANOSECONDS[run["time_unit"]]


def cache_columns(first: dict[str, Any], p50: float) -> dict[str, object]:
    """Columns of the KV prefix cache's rows only."""
    return {
        "p50_ns_per_token": round(p50 / first["tokens"], 3) if "tokens" in first else "",
        "p50_ns_per_page": round(p50 / first["pages"], 2) if "pages" in first else "",
        "p50_requests_per_s": round(1e9 / p50) if "items_per_second" in first else "",
        "tree_bytes_per_page": round(first["bytes_per_page"], 1) if "bytes_per_page" in first else "",
    }


def step_columns(first: dict[str, Any], p50: float) -> dict[str, object]:
    """Columns of the scheduler's rows only."""
    return {"p50_us_per_request": round(p50 / first["requests"] / 1e3, 4) if "requests" in first else ""}


def rate_columns(first: dict[str, Any], p50: float) -> dict[str, object]:
    """Columns of the adapter weights' rows only."""
    return {"p50_gb_per_s": round(first["stored_bytes"] / p50, 2)}


COLUMNS_OF = {"scheduler_step": step_columns, "adapter_weights": rate_columns}


def row_of(name: str, runs: list[dict[str, Any]], compiler: str, subject: str) -> dict[str, object]:
    """One row for all repetitions of one benchmark."""
    first = runs[0]
    times = [nanoseconds(run) for run in runs]
    p50 = percentile(times, 50)
    columns = COLUMNS_OF.get(subject, cache_columns)
    row: dict[str, object] = {
        "benchmark": name,
        "p20_us": round(percentile(times, 20) / 1e3, 4),
        "p50_us": round(p50 / 1e3, 4),
        "p80_us": round(percentile(times, 80) / 1e3, 4),
        **columns(first, p50),
        "repetitions": len(runs),
        "compiler": compiler,
    }
    if "bytes_per_page" in first:  # how long it took to fill the cache says nothing
        row |= {"p20_us": "", "p50_us": "", "p80_us": ""}
    return row


def rows_of(output: dict[str, Any], subject: str) -> list[dict[str, object]]:
    """Gather the repetitions of each benchmark, in the order of the program."""
    runs_by_name: dict[str, list[dict[str, Any]]] = {}
    for run in output["benchmarks"]:
        if run["run_type"] == "iteration":
            runs_by_name.setdefault(RUN_SUFFIX.sub("", run["run_name"]), []).append(run)
    compiler = output["context"]["compiler"]
    return [row_of(name, runs, compiler, subject) for name, runs in runs_by_name.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path, help="e.g. build/bench/benchmarks/cpp/kv_prefix_cache_bench")
    parser.add_argument("--min-time", type=float, default=0.1, help="seconds of a repetition (default: 0.1)")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--filter", default=".", help="regular expression of the benchmarks to run")
    parser.add_argument("--subject", help="name of the result file (default: the program's, without _bench)")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, write nothing")
    args = parser.parse_args()
    subject = args.subject or args.program.name.removesuffix("_bench")
    rows = rows_of(run(args.program, args.min_time, args.repetitions, args.filter), subject)
    if not rows:
        print(f"no benchmark matches {args.filter!r}", file=sys.stderr)
        return 1
    if args.dry_run:
        for row in rows:
            print(row)
        return 0
    print(f"appended to {append_rows(subject, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
