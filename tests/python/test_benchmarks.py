"""Every benchmark in Python runs once at its smallest size, so that none of them can rot."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = runpy.run_path(str(BENCHMARKS / "run_smallest.py"))["python_scripts"]()
SIMULATOR_BENCHMARK = "bench_scheduler_sim.py"


def simulator() -> Path:
    """The built simulator; where nobody has built it, its benchmark has nothing to run."""
    program = Path("benchmarks/scheduler_sim/scheduler_sim")
    builds = [ROOT / "build" / preset / program for preset in ("release", "bench", "dev")]
    for path in builds:
        if path.exists():
            return path
    reason = f"{builds[0]} is missing; build it with 'make test-cpp'"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_benchmark_runs_at_its_smallest_size_and_leaves_the_results_alone(script: Path) -> None:
    command = [sys.executable, str(script), "--smallest"]
    if script.name == SIMULATOR_BENCHMARK:
        command += ["--program", str(simulator())]
    results = {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()} == results


def test_a_run_that_is_held_up_until_all_its_requests_are_due_ends_well() -> None:
    """As happens to short runs on a busy machine: nothing is completed before the last request comes."""
    program = "import bench_many_adapters as bench; bench.LOAD_SHARE = 1e6; bench.main()"
    paths = os.pathsep.join([str(BENCHMARKS / "serving"), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-c", program, "--smallest"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.count("of_few_adapters=None") == 2


def test_benchmarks_are_found_in_every_folder_that_has_them() -> None:
    assert {script.parent.name for script in SCRIPTS} == {"kernels", "scheduler_sim", "serving"}
