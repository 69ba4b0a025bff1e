"""What a figure was measured on and with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

_TIMEOUT_S = 10


def describe_machine(device: str, commit: str | None) -> dict[str, str]:
    """Give card or CPU, driver, versions, commit and date.

    Parameters
    ----------
    device
        The engine's.
    commit
        Of the sources; None = as git says, or 'unknown' where it does not know.
    """
    is_cuda = device.startswith("cuda")
    found = {
        "card": torch.cuda.get_device_name(torch.device(device)) if is_cuda else _cpu_name(),
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        if is_cuda
        else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return {name: value for name, value in found.items() if value}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def _commit() -> str:
    folder = str(Path(__file__).resolve().parent)
    commit = _first_line(["git", "-C", folder, "rev-parse", "--short", "HEAD"])
    if not commit:
        return "unknown"
    return commit + (
        "+changes" if _first_line(["git", "-C", folder, "status", "--porcelain", "-uno"]) else ""
    )


def _first_line(command: list[str]) -> str:
    """What a command prints first; empty where there is no such command or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if lines else ""
