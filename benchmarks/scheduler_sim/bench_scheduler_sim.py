"""Runs the scheduler's simulator over its scenarios and writes tables and plots (`make sim`).

Without options it appends rows to benchmarks/results/scheduler_sim.csv and rewrites the tables and plots of
docs/scheduling.md. README.md beside this file describes the simulator.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows
from sim_runner import Result, Runner, result_row
from sim_scenarios import OPEN_LOOP, OTHER, OWN_DEVICE, VLLM_DEVICE, Plan, make_plan
from sim_tables import (
    Results,
    large_table,
    many_adapters_table,
    ratio_table,
    replace_between_markers,
    system_table,
    validation_table,
)

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build/bench/benchmarks/scheduler_sim/scheduler_sim"
DOCUMENT = ROOT / "docs/scheduling.md"
IMAGES = ROOT / "docs/img"
SMALLEST_REQUESTS = 40


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", type=Path, default=PROGRAM, help="the built scheduler_sim")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    parser.add_argument("--requests", type=int, help="at most so many a run")
    parser.add_argument("--dry-run", action="store_true", help="print the tables, write nothing")
    parser.add_argument("--smallest", action="store_true", help="the smallest runs; writes nothing")
    return parser.parse_args()


def run_plan(plan: Plan, runner: Runner, num_jobs: int) -> tuple[list[Result], list[Result], list[Result]]:
    """Run everything: the results that are compared, those of the large runs, and of many adapters."""
    compared = runner.run_all(plan.table + plan.sweeps + plan.validation, num_jobs)
    large = runner.run_all(plan.large, 1)  # alone, because they are timed
    return compared, large, runner.run_all(plan.many, num_jobs)


def make_tables(
    plan: Plan, compared: list[Result], large: list[Result], many: list[Result]
) -> dict[str, str]:
    """Return the tables by the names of their markers."""
    num_table = len(plan.table) + len(plan.sweeps)
    results = Results(compared[:num_table])
    scenarios = OPEN_LOOP + OTHER
    return {
        "sim_ratios": ratio_table(results, scenarios),
        "sim_vllm_device": system_table(results, scenarios, VLLM_DEVICE),
        "sim_own_device": system_table(results, scenarios, OWN_DEVICE),
        "sim_validation": validation_table(compared[num_table:]),
        "sim_large": large_table(large),
        "sim_many": many_adapters_table(many),
    }


def write_document(tables: dict[str, str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = replace_between_markers(text, name, table)
    DOCUMENT.write_text(text, encoding="utf-8")


def write_plots(results: Results) -> None:
    from sim_plots import plot_distributions, plot_rates, plot_scenarios

    IMAGES.mkdir(parents=True, exist_ok=True)
    plot_scenarios(results, IMAGES / "scheduler_sim_ttft.png")
    plot_rates(results, IMAGES / "scheduler_sim_rates.png")
    plot_distributions(results, IMAGES / "scheduler_sim_distribution.png")


def main() -> int:
    args = parse_arguments()
    if not args.program.is_file():
        print(f"{args.program} is not built; `make build-bench` builds it", file=sys.stderr)
        return 1
    plan = make_plan(SMALLEST_REQUESTS if args.smallest else args.requests)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compared, large, many = run_plan(plan, Runner(args.program, Path(folder)), args.jobs)
        except subprocess.CalledProcessError as error:
            print(f"failed: {' '.join(error.cmd)}", file=sys.stderr)
            return 1
    tables = make_tables(plan, compared, large, many)
    if args.smallest:
        print(f"{len(plan.all())} simulated runs ended as they should")
        return 0
    for name, table in tables.items():
        print(f"\n{name}\n\n{table}")
    if not args.dry_run:
        rows = [result_row(result) for result in compared + large + many]
        print(f"appended to {append_rows('scheduler_sim', rows)}")
        write_document(tables)
        write_plots(Results(compared[: len(plan.table) + len(plan.sweeps)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
