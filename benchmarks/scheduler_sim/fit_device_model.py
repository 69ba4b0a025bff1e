"""Fits the simulated devices of this folder to measured tables, and writes device_models.json.

A device is a step time, linear in a few counts of the step (`step_counts`), and the times of bringing an
adapter in. The step times of `vllm_h100_qwen3_8b` are fitted to what vLLM 0.24.0 was measured to do on one
H100, those of `lora_serve_target_h100_qwen3_8b` to the gates of this project's speed targets for the same
machine and work. The loads come from results/adapter_load.csv, vLLM's from its open-loop figures
(vllm_open_loop.py). Coefficients are non-negative and minimise the squared relative errors.

Prints measured, model and error of every row; ends with an error if a fitted one is off by more than
`--limit`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import vllm_open_loop
from load_times import (
    ADAPTER_BYTES_PER_RANK,
    LoadPath,
    MeasuredLoads,
    adapter_bytes,
    measured_target_loads,
    target_loads,
    vllm_loads,
)
from nonnegative_fit import nonnegative_least_squares
from step_tables import (
    MAX_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    NUM_LAYERS,
    Counts,
    Lora,
    Row,
    gate_rows,
    step_counts,
    vllm_rows,
)

MODELS_FILE = Path(__file__).resolve().parent / "device_models.json"
KV_BYTES_PER_TOKEN = NUM_LAYERS * 2 * 8 * 128 * 2
VLLM_DESCRIPTION = "vLLM 0.24.0 on one H100 80GB, Qwen3-8B's shape, bf16; fitted to its measured speed"
TARGET_DESCRIPTION = "lora_serve on one H100 80GB, Qwen3-8B's shape, bf16, at the gates of its speed targets"

# FlashInfer 0.7.2 on the same H100, microseconds a layer. Decode: 32 rows of 256 and of 4,096 tokens.
# Prefill: 4 prompts of 2,048 tokens.
DECODE_ATTENTION_US = {32 * 256: 16.0, 32 * 4096: 188.0}
PREFILL_ATTENTION_US, PREFILL_ATTENTION_PAIRS = 321.0, 4 * 2048 * 2048 / 2

StepTimes = dict[str, float]  # coefficient to its value


def attention_times() -> StepTimes:
    """The two coefficients that the tables cannot tell: their contexts are short."""
    (few, few_us), (many, many_us) = sorted(DECODE_ATTENTION_US.items())
    return {
        "per_context_ns": NUM_LAYERS * (many_us - few_us) * 1e3 / (many - few),
        "per_prefill_pair_ns": NUM_LAYERS * PREFILL_ATTENTION_US * 1e3 / PREFILL_ATTENTION_PAIRS,
    }


def fit(rows: list[Row], zero: Sequence[str] = ()) -> StepTimes:
    """Non-negative least squares on the relative errors; `zero` names what this device does not have."""
    fixed = attention_times() | dict.fromkeys(zero, 0.0)
    free = [name for name in rows[0].counts if name not in fixed]
    rows = [row for row in rows if row.is_fitted]
    measured = np.array([row.measured_ms for row in rows])
    known = np.array([sum(fixed[name] * row.counts[name] for name in fixed) for row in rows])
    matrix = np.array([[row.counts[name] for name in free] for row in rows]) / measured[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    values = nonnegative_least_squares(matrix / scale, (measured - known) / measured) / scale
    fitted = fixed | dict(zip(free, values.tolist(), strict=True))
    return {name: float(f"{fitted[name]:.4g}") for name in rows[0].counts}


def step_ms(times: StepTimes, counts: Counts) -> float:
    return sum(times[name] * count for name, count in counts.items())


def vllm_step_ms(times: StepTimes) -> vllm_open_loop.StepMs:
    """The fitted step in the terms of vllm_open_loop: prompts of 128 tokens, adapters of rank 16."""

    def one_step(rows: int, context_tokens: int, num_prompts: int, num_adapters: int, places: int) -> float:
        counts = step_counts(rows, context_tokens, [(0, 128)] * num_prompts, Lora(num_adapters, 16, places))
        return step_ms(times, counts)

    return one_step


@dataclass(frozen=True)
class Line:
    """A line of the printed tables."""

    name: str
    unit: str
    measured: float
    model: float
    is_fitted: bool = True


def step_lines(rows: list[Row], times: StepTimes) -> list[Line]:
    return [
        Line(row.name, row.unit, row.measured, row.written(step_ms(times, row.counts)), row.is_fitted)
        for row in rows
    ]


def load_lines(loads: MeasuredLoads, paths: dict[str, LoadPath]) -> list[Line]:
    return [
        Line(f"{name}, rank {lora_rank}", "ms", ms, paths[name].load_ms(adapter_bytes(lora_rank)))
        for name, ms_by_rank in measured_target_loads(loads).items()
        for lora_rank, ms in ms_by_rank.items()
    ]


def print_lines(title: str, lines: list[Line]) -> float:
    """Print the table and return the largest error among the fitted rows."""
    print(f"\n{title:66}{'measured':>10}{'model':>10}{'error':>8}")
    for line in lines:
        error = line.model / line.measured - 1
        mark = "" if line.is_fitted else "  not fitted"
        values = f"{line.measured:10.2f}{line.model:10.2f}{error:8.1%}"
        print(f"{line.name:56}{line.unit:>10}{values}{mark}")
    return max(abs(line.model / line.measured - 1) for line in lines if line.is_fitted)


def print_open_loops(
    one_step: vllm_open_loop.StepMs, to_device_ms: float, to_host_ms: float, seeds: int
) -> None:
    """How the model's open loops compare with the table, to whose tails the load times were fitted."""
    names = list(vllm_open_loop.Figures.__dataclass_fields__)
    print(
        f"\nvLLM, open loops, ms (measured; model, median of {seeds} seeds){'':4}"
        + "".join(f"{n:>10}" for n in names)
    )
    groups = {
        "no loads": vllm_open_loop.RESIDENT_ROWS,
        "loads from host memory, fitted": vllm_open_loop.HOST_ROWS,
        "loads from files, fitted": vllm_open_loop.DISK_ROWS,
    }
    for group, loops in groups.items():
        for loop in loops:
            model = vllm_open_loop.typical(loop, one_step, to_device_ms, to_host_ms, seeds)
            for what, figures in ((f"{loop.name} ({group})", loop.measured), ("model", model)):
                print(f"{what:65}" + "".join(f"{value:10.1f}" for value in asdict(figures).values()))


def device(
    description: str, step: StepTimes, pads: bool, loads: dict[str, LoadPath], notes: list[str]
) -> Any:
    return {
        "description": description,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": MAX_NUM_SEQS,
        "adapter_bytes_per_rank": ADAPTER_BYTES_PER_RANK,
        "kv_bytes_per_token": KV_BYTES_PER_TOKEN,
        "step": {**step, "pads_to_max_rank": pads},
        "loads": {name: asdict(path) for name, path in loads.items()},
        "notes": notes,
    }


COMMON_NOTES = [
    "per_context_ns and per_prefill_pair_ns are not fitted, because the tables' contexts are short: "
    "they follow from FlashInfer's times for a layer.",
    "In every measured batch all rows had an adapter, or none. When some have one, lora_per_row_us "
    "and the terms for prompt tokens are taken to count those rows only.",
]
VLLM_NOTES = [
    "The columns 'LoRA on, idle' and '1 adapter' are taken to come from an engine with 8 places.",
    "prefill_step_ms comes from the median first tokens of the open loops; of a closed batch's steps "
    "one in a hundred has prompts.",
    "pads_to_max_rank: in all tables the rank was the engine's maximum; the padding itself is not measured.",
    "Loads: fixed_ms was chosen so that a small model of vLLM's loop comes closest to the tails of "
    "its open loops with loads (180 requests each); what grows with the bytes was measured. The cold "
    "path adds the measured disk. Where files are loaded the model still queues about 1.3 times as "
    "long as measured, with shorter stalls.",
    "The model flatters vLLM in the open loop over 64 places at 24 requests/s, where vLLM's first "
    "tokens took 205 ms (p50) and 522 ms (p99).",
]
TARGET_NOTES = [
    "A gate is what must hold, not what was measured: this device is as slow as the project allows "
    "itself to be.",
    "Terms for places are 0 by design: kernels are sized by the adapters present.",
    "prefill_step_ms is what the gates on the p99 gap of the open loops (20 and 25 ms) leave.",
    "Not fitted: 256 requests over 64 adapters, gate 5,500 tokens/s. It asks less than the gate of "
    "8,000 for 128 requests over 64 adapters, at which it would run at 6,700. The model lies above "
    "it.",
    "Loads from disk, one at a time: four threads read into pinned memory, then take the SHA-256 of a "
    "quarter each. The cold path is the virtual disk of the machine measured; another gave 4 GB/s "
    "instead of 2.5.",
]


def write_models(vllm: Any, target: Any) -> None:
    models = {"schema": 1, "devices": {"vllm_h100_qwen3_8b": vllm, "lora_serve_target_h100_qwen3_8b": target}}
    MODELS_FILE.write_text(json.dumps(models, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {MODELS_FILE}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=0.15, help="largest error allowed (default: 0.15)")
    parser.add_argument("--dry-run", action="store_true", help="print the tables, write nothing")
    parser.add_argument("--seeds", type=int, default=25, help="runs of each open loop (default: 25)")
    args = parser.parse_args()
    measured_loads = MeasuredLoads()

    rows = vllm_rows()
    vllm_step = fit(rows)
    worst = print_lines("vLLM, steps", step_lines(rows, vllm_step))
    one_step = vllm_step_ms(vllm_step)
    calibrated = vllm_open_loop.calibrate(one_step, args.seeds)
    print_open_loops(one_step, *calibrated, args.seeds)
    vllm_paths = vllm_loads(measured_loads, *calibrated)

    rows = gate_rows()
    target_step = fit(rows, zero=["lora_per_place_us", "lora_per_prefill_token_place_ns"])
    worst = max(worst, print_lines("Gates, steps", step_lines(rows, target_step)))
    target_paths = target_loads(measured_loads)
    worst = max(worst, print_lines("Loads", load_lines(measured_loads, target_paths)))
    print(f"\nlargest error of a fitted row: {worst:.1%}")
    if not args.dry_run:
        write_models(
            device(VLLM_DESCRIPTION, vllm_step, True, vllm_paths, COMMON_NOTES + VLLM_NOTES),
            device(TARGET_DESCRIPTION, target_step, False, target_paths, COMMON_NOTES + TARGET_NOTES),
        )
    return int(worst > args.limit)


if __name__ == "__main__":
    sys.exit(main())
