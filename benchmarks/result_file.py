"""Appends benchmark rows, each with the machine and the versions it was measured with."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine_name() -> str:
    """The GPU's name, or the CPU's and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [
        line.split(":", 1)[1].strip() for line in cpu_info.splitlines() if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


def append_rows(subject: str, rows: list[dict[str, object]]) -> Path:
    """Add `rows` to benchmarks/results/<subject>.csv and return its path."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS).stdout.strip()
    common = {
        "machine": machine_name(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    path = RESULTS / f"{subject}.csv"
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *common])
        if is_new:
            writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    return path
