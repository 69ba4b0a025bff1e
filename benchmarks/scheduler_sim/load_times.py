"""The measured times of adapter loads, and the load paths of the simulated devices."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nonnegative_fit import nonnegative_least_squares

LOADS_FILE = Path(__file__).resolve().parents[1] / "results" / "adapter_load.csv"
ADAPTER_BYTES_PER_RANK = 5_455_872  # bf16, all seven projections of 36 layers


@dataclass
class LoadPath:
    """One way of an adapter; alone it takes fixed_ms + bytes / gb_per_s."""

    fixed_ms: float
    gb_per_s: float
    num_parallel: int = 1
    blocks_step_loop: bool = False
    step_slowdown: float = 0.0

    def load_ms(self, num_bytes: float) -> float:
        return self.fixed_ms + num_bytes / self.gb_per_s / 1e6


class MeasuredLoads:
    """results/adapter_load.csv; of several measurements of the same thing on an H100, the last."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, int, int], dict[str, str]] = {}
        with LOADS_FILE.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if "H100" in row["machine"]:
                    key = row["workload"], row["provider"], int(row["num_threads"]), int(row["lora_rank"])
                    self.rows[key] = row

    def p50_ms(self, workload: str, provider: str, num_threads: int, lora_rank: int) -> float:
        return float(self.rows[workload, provider, num_threads, lora_rank]["p50_ms"])

    def slowdown(self) -> float:
        """What a decode step loses while a copy runs, as a share of its time."""
        row = self.rows["beside products of a decode", "one pinned block", 1, 16]
        return float(row["p50_slowdown_percent"]) / 100

    def with_digest_ms(self, workload: str, lora_rank: int) -> float:
        """The file read by four threads, and its digest taken by four: no generation changes unnoticed."""
        digest_ms = self.p50_ms("digest", "sha256 of four quarters", 4, 16) * lora_rank / 16
        return self.p50_ms(workload, "read, pinned", 4, lora_rank) + digest_ms


def adapter_bytes(lora_rank: int) -> int:
    return ADAPTER_BYTES_PER_RANK * lora_rank


def fit_path(ms_by_rank: dict[int, float]) -> LoadPath:
    """The line through the measured ranks, as far as it does not start below 0."""
    measured = np.array(list(ms_by_rank.values()))
    sizes = np.array([adapter_bytes(lora_rank) / 1e6 for lora_rank in ms_by_rank])
    matrix = np.stack([1 / measured, sizes / measured], axis=1)
    fixed_ms, ms_per_mb = nonnegative_least_squares(matrix, np.ones(len(measured)))
    return LoadPath(fixed_ms=float(f"{fixed_ms:.4g}"), gb_per_s=float(f"{1 / ms_per_mb:.4g}"))


def measured_target_loads(loads: MeasuredLoads) -> dict[str, dict[int, float]]:
    """Milliseconds of each path of lora_serve, by rank."""
    return {
        "host_to_device": {r: loads.p50_ms("host to device", "one pinned block", 1, r) for r in (16, 64)},
        "disk_warm_to_host": {r: loads.with_digest_ms("warm file to host", r) for r in (16, 64)},
        "disk_cold_to_host": {r: loads.with_digest_ms("cold file to host", r) for r in (16, 64)},
    }


def target_loads(loads: MeasuredLoads) -> dict[str, LoadPath]:
    paths = {name: fit_path(ms_by_rank) for name, ms_by_rank in measured_target_loads(loads).items()}
    paths["host_to_device"].step_slowdown = round(loads.slowdown(), 4)
    return paths


def vllm_loads(loads: MeasuredLoads, to_device_ms: float, to_host_ms: float) -> dict[str, LoadPath]:
    """Paths that stop the step loop. What grows with the bytes is measured, the rest was calibrated."""

    def path(total_ms: float, ms_per_mb: float) -> LoadPath:
        fixed_ms = max(total_ms - ms_per_mb * adapter_bytes(16) / 1e6, 0.0)
        return LoadPath(round(fixed_ms, 2), float(f"{1 / ms_per_mb:.4g}"), blocks_step_loop=True)

    size_16, size_64 = adapter_bytes(16) / 1e6, adapter_bytes(64) / 1e6
    copy_ms_per_mb = loads.p50_ms("host to device", "504 pinned tensors", 1, 16) / size_16
    warm_ms_per_mb = loads.p50_ms("warm file to host", "load_file, pin each tensor", 1, 64) / size_64
    disk_ms_per_mb = loads.p50_ms("cold file to host", "read, pinned", 1, 64) / size_64
    cold_ms = to_host_ms + disk_ms_per_mb * size_16
    return {
        "host_to_device": path(to_device_ms, copy_ms_per_mb),
        "disk_warm_to_host": path(to_host_ms, warm_ms_per_mb),
        "disk_cold_to_host": path(cold_ms, warm_ms_per_mb + disk_ms_per_mb),
    }
