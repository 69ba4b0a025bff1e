"""Stops early, with the command that helps, when no C++20 compiler is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("no C++ compiler found; install one: sudo apt-get install build-essential", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cc"
        source.write_text("#include <compare>\n#include <span>\nint main() { return (1 <=> 1) != 0; }\n")
        command = [compiler, "-std=c++20", "-fsyntax-only", str(source)]
        probe = subprocess.run(command, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        print(f"{compiler} cannot compile C++20; install GCC 12 or newer, or set CXX", file=sys.stderr)
        print(probe.stderr, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
