"""Plant single-line faults in a copy of the sources, one at a time, and see the tests find each.

A test suite that passes says little until it has been seen to fail. What faults, in which folder,
and which tests must fail, is a Campaign; the scripts ``mutate_*.py`` hold one each. That of the
kernels, which are not built, has its own way to run tests and shares the rest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "tests/cpp", "benchmarks/scheduler_sim", "CMakeLists.txt", "CMakePresets.json")


@dataclass(frozen=True)
class Fault:
    """One line of one file, and what it is replaced by."""

    file: str
    line: str
    replacement: str


@dataclass(frozen=True)
class Campaign:
    """Faults in the files of ``folder``, each of which must make the program ``target`` fail."""

    folder: str
    target: str
    script: str
    faults: tuple[Fault, ...]
    environment: dict[str, str] = field(default_factory=dict)


def build(tree: Path, cmake: str, target: str) -> subprocess.CompletedProcess[str]:
    """Bring the test program in ``tree`` up to date."""
    return subprocess.run(
        [cmake, "--build", str(tree / "build"), "--target", target, "-j", str(os.cpu_count() or 1)],
        capture_output=True,
        text=True,
        check=False,
    )


def run_tests(tree: Path, campaign: Campaign, timeout_s: float) -> str:
    """Return what failed first; empty when all tests passed."""
    command = [str(tree / "build/tests/cpp" / campaign.target), "--gtest_fail_fast", "--gtest_brief=1"]
    environment = {**os.environ, **campaign.environment}
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {timeout_s:.0f} s"
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stdout.splitlines() if line.startswith("[  FAILED  ]")]
    return lines[0].removeprefix("[  FAILED  ] ") if lines else f"exit status {result.returncode}"


def check_fault(tree: Path, campaign: Campaign, fault: Fault, arguments: argparse.Namespace) -> str:
    """Plant the fault, build, test, repair; return the name of the test that failed, or ''."""
    with planted(tree / campaign.folder, fault, campaign.script):
        built = build(tree, arguments.cmake, campaign.target)
        if built.returncode != 0:
            raise SystemExit(f"{fault.file}: {fault.replacement!r} does not compile:\n{built.stdout[-3000:]}")
        return run_tests(tree, campaign, arguments.timeout)


@contextmanager
def planted(folder: Path, fault: Fault, script: str) -> Iterator[None]:
    """Have the fault in its file, which must hold the line once."""
    path = folder / fault.file
    source = read_source(folder, fault, script)
    path.write_text(source.replace(fault.line, fault.replacement))
    try:
        yield
    finally:
        path.write_text(source)


def read_source(folder: Path, fault: Fault, script: str) -> str:
    """Text of the fault's file; exits where the line is not there once."""
    source = (folder / fault.file).read_text()
    if source.count(fault.line) != 1:
        raise SystemExit(
            f"{fault.file}: found {source.count(fault.line)} places that read {fault.line!r}, "
            f"expected 1; bring the fault in {script} up to date"
        )
    return source


def make_parser(description: str, timeout_s: float) -> argparse.ArgumentParser:
    """What all campaigns can be asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the faults to check")
    parser.add_argument("--timeout", type=float, default=timeout_s, help="seconds for one run of the tests")
    return parser


def list_faults(faults: Sequence[Fault], numbers: Sequence[int]) -> int:
    """Print the faults; 0, the exit status."""
    for number in numbers:
        fault = faults[number - 1]
        print(f"{number:3} {fault.file}: {fault.line} -> {fault.replacement or 'nothing'}")
    return 0


def check_faults(faults: Sequence[Fault], numbers: Sequence[int], check: Callable[[int], str]) -> int:
    """Check each and print a line for it; 1 when one survives. `check` gives the test that failed, or ''."""
    survivors = []
    for number in numbers:
        start = time.monotonic()
        killer = check(number)
        verdict = f"killed by {killer}" if killer else "SURVIVED"
        seconds = time.monotonic() - start
        print(f"{number:3} {faults[number - 1].file}: {verdict} ({seconds:.0f} s)", flush=True)
        if not killer:
            survivors.append(number)
    print(f"{len(numbers) - len(survivors)} of {len(numbers)} faults killed")
    return 1 if survivors else 0


def copy_sources(tree: Path) -> None:
    """Bring what the tests are built from into ``tree``."""
    for name in SOURCES:
        source, copy = ROOT / name, tree / name
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            # With new times: what an earlier run built of its last fault must not pass for up to date.
            shutil.copytree(source, copy, copy_function=shutil.copy)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    # A fault may leave a variable unused: that is not what is to be found.
    lists = tree / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace(" -Werror", ""))


def main(campaign: Campaign, description: str) -> int:
    """Check all faults and print one line for each; 1 when one survives."""
    parser = make_parser(description, 300.0)
    parser.add_argument("--tree", type=Path, default=ROOT / "build/mutants", help="where to build")
    parser.add_argument("--cmake", default=shutil.which("cmake") or str(ROOT / ".venv/bin/cmake"))
    arguments = parser.parse_args()
    numbers = arguments.only or range(1, len(campaign.faults) + 1)
    if arguments.list:
        return list_faults(campaign.faults, numbers)

    tree: Path = arguments.tree
    copy_sources(tree)
    options = ["-DLORA_SERVE_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]
    subprocess.run(
        [arguments.cmake, "-S", str(tree), "-B", str(tree / "build"), *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    is_built = build(tree, arguments.cmake, campaign.target).returncode == 0
    if not is_built or run_tests(tree, campaign, arguments.timeout):
        raise SystemExit("the tests do not build and pass without a fault; nothing can be learned")

    def check(number: int) -> str:
        return check_fault(tree, campaign, campaign.faults[number - 1], arguments)

    return check_faults(campaign.faults, numbers, check)
