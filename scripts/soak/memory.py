"""What the process and the device hold over time, and whether it grows."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

_MIB = 2**20

BOUNDS: dict[str, tuple[float, float]] = {
    "device_in_use": (64 * _MIB, 512 * _MIB),
    "torch_reserved": (64 * _MIB, 512 * _MIB),
    "torch_allocated": (32 * _MIB, 256 * _MIB),
    "torch_pinned": (8 * _MIB, 64 * _MIB),
    "page_locked": (8 * _MIB, 64 * _MIB),
    "host_rss": (64 * _MIB, 384 * _MIB),
    "threads": (4.0, 8.0),
    "open_files": (4.0, 16.0),  # A load in the moment of the sample has some.
}
"""For each series: by how much the line of least squares may rise from the end of the warm-up to the last
sample, and how far the largest may be above the least in that time. Bytes, but for the last two."""


class MemoryRecord:
    """Samples of all series.

    Parameters
    ----------
    device
        The engine's.
    """

    def __init__(self, device: str) -> None:
        self._is_cuda = device.startswith("cuda")
        self.samples: list[dict[str, float]] = []

    def sample(self, at_s: float) -> dict[str, float]:
        """Take a sample of everything at `at_s` seconds, rising, and keep it."""
        status = read_status("self")
        found = {
            "at_s": round(at_s, 2),
            "host_rss": status["VmRSS"],
            "page_locked": status.get("VmLck", 0) + status.get("VmPin", 0),
            "threads": threading.active_count(),
            "open_files": len(os.listdir("/proc/self/fd")),
        }
        if self._is_cuda:
            free_bytes, total_bytes = torch.cuda.mem_get_info()
            found["device_in_use"] = total_bytes - free_bytes
            found["torch_reserved"] = torch.cuda.memory_reserved()
            found["torch_allocated"] = torch.cuda.memory_allocated()
            found["torch_pinned"] = _torch_pinned_bytes()
        self.samples.append(found)
        return found

    def growth(self, warm_up_s: float) -> dict[str, dict[str, float]]:
        """What `growth_of` says of the samples."""
        return growth_of(self.samples, warm_up_s, BOUNDS)


def growth_of(
    samples: Sequence[Mapping[str, float]], warm_up_s: float, bounds: Mapping[str, tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """For each series: rise of the fitted line, and the spread, from `warm_up_s` on; and both bounds."""
    kept = [sample for sample in samples if sample["at_s"] >= warm_up_s]
    times = np.array([sample["at_s"] for sample in kept])
    figures: dict[str, dict[str, float]] = {}
    for name, (most_rise, most_spread) in bounds.items():
        if len(kept) < 3 or name not in kept[0]:
            continue
        values = np.array([sample[name] for sample in kept])
        slope = np.polyfit(times - times[0], values, 1)[0]
        figures[name] = {
            "rise": round(float(slope * (times[-1] - times[0])), 1),
            "most_rise": most_rise,
            "spread": float(values.max() - values.min()),
            "most_spread": most_spread,
            "last": float(values[-1]),
        }
    return figures


def find_growth(growth: dict[str, dict[str, float]]) -> list[str]:
    """One line for each series out of its bounds, and one where there were too few samples to tell."""
    if not growth:
        return ["there are not three samples after the warm-up: run longer"]
    problems = []
    for name, figures in growth.items():
        for what in ("rise", "spread"):
            if figures[what] > figures[f"most_{what}"]:
                problems.append(f"{name}: {what} {figures[what]:.0f}, at most {figures[f'most_{what}']:.0f}")
    return problems


def read_status(process: int | str) -> dict[str, float]:
    """The fields of a process's /proc/N/status that are memory, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): float(number) * 1024 for name, number, _ in fields}


def _torch_pinned_bytes() -> float:
    """What torch's own allocator of pinned memory holds; the engine's slabs are not from there."""
    stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    return float(stats.get("allocated_bytes.current", 0))
