"""Calls the program scheduler_sim and reads what it writes."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim_scenarios import Run

DEVICE_MODELS = Path(__file__).resolve().parent / "device_models.json"


@dataclass(frozen=True)
class Result:
    """Figures of a run by their names in the CSV; quantiles of the times, if the scenario has them."""

    run: Run
    values: dict[str, float]
    quantiles: list[dict[str, float]]

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines `name=number` of nested values, texts and lists left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield f"{prefix}{name}={str(value).lower()}"
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}={value}"


def device_limits(device: dict[str, Any]) -> list[str]:
    """The limits of a step that the device's tables were taken with."""
    return [
        f"--max-num-seqs={device['max_num_seqs']}",
        f"--max-num-batched-tokens={device['max_num_batched_tokens']}",
    ]


class Runner:
    """Runs the program with the devices of device_models.json.

    Parameters
    ----------
    program : Path
        The built scheduler_sim.
    folder : Path
        For the files that go in and out; must exist.
    """

    def __init__(self, program: Path, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self.devices: dict[str, Any] = json.loads(DEVICE_MODELS.read_text(encoding="utf-8"))["devices"]
        for name, device in self.devices.items():
            (folder / f"{name}.txt").write_text("\n".join(flatten(device)) + "\n", encoding="utf-8")

    def run(self, run: Run) -> Result:
        """Run it. Raises CalledProcessError with the program's message on standard error."""
        name = f"{run.scenario.name}-{run.system}-{run.device}-{run.seed}"
        csv_path = self._folder / f"{name}.csv"
        quantiles_path = self._folder / f"{name}-quantiles.csv"
        command = [str(self._program), f"--device={self._folder / run.device}.txt", f"--csv={csv_path}"]
        command += device_limits(self.devices[run.device])
        command += [f"--{option}={value}" for option, value in run.arguments().items()]
        if run.scenario.has_quantiles:
            command.append(f"--quantiles={quantiles_path}")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        row = _read_rows(csv_path)[0]
        values = {key: float(value) for key, value in row.items() if key not in {"scenario", "system"}}
        quantiles: list[dict[str, float]] = []
        if run.scenario.has_quantiles:
            quantiles = [
                {key: float(value) for key, value in line.items()} for line in _read_rows(quantiles_path)
            ]
        return Result(run, values, quantiles)

    def run_all(self, runs: list[Run], num_jobs: int) -> list[Result]:
        """Run them, some at once, and return the results in the order of `runs`."""
        with ThreadPoolExecutor(num_jobs) as pool:
            return list(pool.map(self.run, runs))


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def result_row(result: Result) -> dict[str, object]:
    """A row for benchmarks/results."""
    run = result.run
    options = run.scenario.options
    return {
        "scenario": run.scenario.name,
        "system": run.system,
        "device_model": run.device,
        "adapters": options["adapters"],
        "popularity": options["popularity"],
        "memory_adapters": options["places"],
        "host_adapters": options["host-adapters"],
        "rate_per_s": options["rate"],
        "seed": run.seed,
        **{name: f"{value:g}" for name, value in result.values.items()},
    }
