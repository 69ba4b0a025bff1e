"""A broken or incomplete installation is refused by name, never discovered later."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cmake() -> str:
    beside_python = Path(sys.executable).with_name("cmake")
    found = str(beside_python) if beside_python.exists() else shutil.which("cmake")
    assert found is not None, "cmake is one of the project's requirements"
    return found


def test_wheel_without_the_extension_is_refused(tmp_path: Path) -> None:
    command = [
        cmake(),
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        "-DSKBUILD=2",
        "-DLORA_SERVE_BUILD_EXTENSION=OFF",
    ]
    configured = subprocess.run(command, capture_output=True, text=True, check=False)
    assert configured.returncode != 0
    assert "cannot serve anything" in configured.stderr


def test_tests_without_googletest_name_the_package_to_install(tmp_path: Path) -> None:
    options = ["-DLORA_SERVE_BUILD_TESTS=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_GTest=ON"]
    command = [cmake(), "-S", str(ROOT), "-B", str(tmp_path), *options]
    configured = subprocess.run(command, capture_output=True, text=True, check=False)
    assert configured.returncode != 0
    assert "apt-get install libgtest-dev" in " ".join(configured.stderr.split())


def test_benchmarks_without_google_benchmark_name_the_package_to_install(tmp_path: Path) -> None:
    options = ["-DLORA_SERVE_BUILD_BENCHMARKS=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_benchmark=ON"]
    command = [cmake(), "-S", str(ROOT), "-B", str(tmp_path), *options]
    configured = subprocess.run(command, capture_output=True, text=True, check=False)
    assert configured.returncode != 0
    assert "apt-get install libbenchmark-dev" in " ".join(configured.stderr.split())
