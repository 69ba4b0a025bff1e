"""Runs every Python benchmark once at its smallest size, so that none of them can rot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    scripts = sorted(Path(__file__).resolve().parent.glob("*/bench_*.py"))
    if not scripts:
        print("no benchmark found beside this script", file=sys.stderr)
        return 1
    for script in scripts:
        print(f"== {script.name}", flush=True)
        subprocess.run([sys.executable, str(script), "--smallest"], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
