"""Runs every benchmark once at its smallest size, so that none of them can rot. Writes no results.

Usage: run_smallest.py [folder with the C++ benchmark programs]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python_scripts() -> list[Path]:
    """All benchmarks in Python; tests/python/test_benchmarks.py runs them, too."""
    return sorted(Path(__file__).resolve().parent.glob("*/bench_*.py"))


def run_python_scripts() -> int:
    """Run all scripts and return how many there are."""
    scripts = python_scripts()
    for script in scripts:
        print(f"== {script.name}", flush=True)
        subprocess.run([sys.executable, str(script), "--smallest"], check=True)
    return len(scripts)


def run_cpp_programs(folder: Path) -> int:
    """Run all programs `<subject>_bench` of the folder and return how many there are."""
    programs = sorted(path for path in folder.glob("*_bench") if os.access(path, os.X_OK))
    environment = {**os.environ, "LORA_SERVE_BENCH_SMALLEST": "1"}
    for program in programs:
        print(f"== {program.name}", flush=True)
        subprocess.run([str(program), "--benchmark_min_time=0"], check=True, env=environment)
    return len(programs)


def main() -> int:
    if run_python_scripts() == 0:
        print("no benchmark found beside this script", file=sys.stderr)
        return 1
    if len(sys.argv) > 1 and run_cpp_programs(Path(sys.argv[1])) == 0:
        print(f"no C++ benchmark program found in {sys.argv[1]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
