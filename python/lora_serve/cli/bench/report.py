"""The table of `lora-serve bench table`: kept as JSON, shown as Markdown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lora_serve.cli.bench.rows import Figure, Row

_HEADER = "| row | workload | figure | vLLM | gate | stretch | ours | ours / vLLM | gate held |"
_UNITS = {"tokens_per_s": "tokens/s"}


class TableFile:
    """Measured rows by name, in `table.json` and `table.md` of a folder.

    Rows that the folder has already stay until they are measured again, so that a table can be measured in
    parts.

    Parameters
    ----------
    folder
        Made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.measured: dict[str, Any] = {}
        if self._json.exists():
            self.add_file(self._json)

    @property
    def _json(self) -> Path:
        return self._folder / "table.json"

    def add_file(self, path: Path) -> None:
        """Take the rows of another table; they replace those of the same names."""
        self.measured.update(json.loads(path.read_text(encoding="utf-8")))

    def add(self, name: str, measured: dict[str, Any]) -> None:
        """Take a row, which replaces one of the same name."""
        self.measured[name] = measured

    def write(self, rows: tuple[Row, ...]) -> None:
        """Write both files, each at once, so that what is there is always whole."""
        _replace(self._json, json.dumps(self.measured, indent=1) + "\n")
        _replace(self._folder / "table.md", format_table(rows, self.measured))


def format_table(rows: tuple[Row, ...], measured: dict[str, Any]) -> str:
    """Give the rows that were measured as a Markdown table, and below it each run and what it was on."""
    lines = [_HEADER, "|---|---|---|" + "---:|" * 5 + "---|"]
    runs: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.name not in measured:
            continue
        lines += _table_lines(row, measured)
        entry = measured[row.name]
        runs.setdefault((_describe_machine(entry), entry["run"]), []).append(row.name)
    notes = [f"- {', '.join(names)}: {machine}" for (machine, _), names in runs.items()]
    if len(runs) == 1:
        notes = [f"Measured on: {machine}" for machine, _ in runs]
    elif runs:
        notes = ["Measured in one run each:", "", *notes]
    return "\n".join([*lines, "", *notes, ""])


def format_line(row: Row, measured: dict[str, Any]) -> str:
    """Give one line on a row that was just measured, for the terminal."""
    entry = measured[row.name]
    parts = []
    for figure in row.figures:
        ours = entry["figures"][figure.name]
        text = f"{_label(figure)} {_number(ours)}"
        ratio, gate = _ratio(figure, ours), _goal(figure.gate, row, measured)
        if ratio is not None and not entry["is_smallest"]:
            text += f" ({ratio:.2f} of vLLM" + (f", gate {_number(gate)})" if gate is not None else ")")
        parts.append(text + _of_base(row, measured))
    steps = entry["steps"]
    return (
        f"{row.name}: {', '.join(parts)}; {steps['steps']} steps of {steps['ms_per_step']} ms, "
        f"loop p50 {steps['loop_p50_us']} us, p99 {steps['loop_p99_us']} us, max {steps['loop_max_us']} us"
    )


def _table_lines(row: Row, measured: dict[str, Any]) -> list[str]:
    entry = measured[row.name]
    lines = []
    for index, figure in enumerate(row.figures):
        ours = entry["figures"][figure.name]
        gate, stretch = _goal(figure.gate, row, measured), _goal(figure.stretch, row, measured)
        is_compared = not entry["is_smallest"]
        ratio = _ratio(figure, ours)
        cells = [
            row.name if index == 0 else "",
            _workload_of(row, entry) if index == 0 else "",
            _label(figure),
            _number(figure.vllm),
            _number(gate),
            _number(stretch),
            _number(ours) + _of_base(row, measured),
            f"{ratio:.2f}" if ratio is not None and is_compared else "",
            _verdict(figure, gate, ours) if is_compared else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _workload_of(row: Row, entry: dict[str, Any]) -> str:
    if row.num_vllm_requests is None:
        return str(entry["workload"])
    return f"{entry['workload']} (vLLM: {row.num_vllm_requests} requests)"


def _goal(goal: float | None, row: Row, measured: dict[str, Any]) -> float | None:
    """A goal as a figure; one that is a part of the base row's needs a base row of the same run."""
    if goal is None or row.base_row is None:
        return goal
    base = _base_speed(row, measured)
    return None if base is None else goal * base


def _of_base(row: Row, measured: dict[str, Any]) -> str:
    """Such as ' (0.998 of base)', where the base row was measured in the same run."""
    base = _base_speed(row, measured)
    if base is None:
        return ""
    return f" ({measured[row.name]['figures']['tokens_per_s'] / base:.3f} of base)"


def _base_speed(row: Row, measured: dict[str, Any]) -> float | None:
    if row.base_row is None or row.base_row not in measured:
        return None
    base = measured[row.base_row]
    return float(base["figures"]["tokens_per_s"]) if base["run"] == measured[row.name]["run"] else None


def _ratio(figure: Figure, ours: float) -> float | None:
    return None if figure.vllm is None else ours / figure.vllm


def _verdict(figure: Figure, gate: float | None, ours: float) -> str:
    if gate is None:
        return ""
    return "yes" if (ours <= gate if figure.is_time else ours >= gate) else "no"


def _label(figure: Figure) -> str:
    if not figure.is_time:
        return _UNITS[figure.name]
    kind, quantile, unit = figure.name.split("_")
    return f"{kind.upper()} {quantile}, {unit}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}".removesuffix(".0")


def _describe_machine(entry: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in entry["machine"].items() if key != "date")
    return f"{entry['model']}; {machine}; {entry['machine']['date'][:10]}"


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
