"""The counts that a step's time depends on, and the tables of measured and promised speed in terms of them.

All figures are of Qwen3-8B's shape in bf16 on one H100 80GB, random prompts, no prefix reuse, CUDA graphs on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MAX_BATCHED_TOKENS = 16384
MAX_NUM_SEQS = 128
NUM_LAYERS = 36

Counts = dict[str, float]  # coefficient to what it is multiplied with


@dataclass(frozen=True)
class Lora:
    """The adapters of a workload. `num_adapters` 0 with `places` above 0 is LoRA on, but idle."""

    num_adapters: float = 0
    lora_rank: int = 0
    places: int = 0


@dataclass(frozen=True)
class Row:
    """One measured figure: the counts of all steps behind it, added up, and how to write it."""

    name: str
    unit: str
    measured: float
    measured_ms: float
    counts: Counts
    is_fitted: bool = True

    def written(self, model_ms: float) -> float:
        """The model's time, in the unit of the row."""
        return model_ms if self.unit == "ms" else self.measured * self.measured_ms / model_ms


def step_counts(
    decode_rows: float, context_tokens: float, prompts: Sequence[tuple[int, int]], lora: Lora
) -> Counts:
    """What one step multiplies the coefficients with. `prompts`: tokens computed before and now, of each."""
    prefill_tokens = float(sum(now for _, now in prompts))
    uses_adapters = lora.num_adapters > 0
    return {
        "base_ms": 1.0,
        "per_row_us": decode_rows * 1e-3,
        "per_context_ns": context_tokens * 1e-6,
        "per_prefill_token_us": prefill_tokens * 1e-3,
        "per_prefill_pair_ns": sum(now * (before + now / 2) for before, now in prompts) * 1e-6,
        "prefill_step_ms": float(prefill_tokens > 0),
        "lora_enabled_ms": float(lora.places > 0),
        "lora_base_ms": float(uses_adapters),
        "lora_per_adapter_us": lora.num_adapters * 1e-3,
        "lora_per_adapter_rank_us": lora.num_adapters * lora.lora_rank * 1e-3,
        "lora_per_place_us": uses_adapters * lora.places * 1e-3,
        "lora_per_row_us": uses_adapters * decode_rows * 1e-3,
        "lora_per_prefill_token_us": uses_adapters * prefill_tokens * 1e-3,
        "lora_per_prefill_token_place_ns": uses_adapters * prefill_tokens * lora.places * 1e-6,
    }


def added(parts: Sequence[Counts]) -> Counts:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def batch_counts(num_requests: int, num_prompt_tokens: int, num_new_tokens: int, lora: Lora) -> Counts:
    """All steps of a closed batch: prompts first, as many as fit in a step, then decode steps of all rows."""
    steps: list[Counts] = []
    for first in range(0, num_requests, MAX_NUM_SEQS):
        num_rows = min(MAX_NUM_SEQS, num_requests - first)
        per_step = MAX_BATCHED_TOKENS // num_prompt_tokens
        for begin in range(0, num_rows, per_step):
            prompts = [(0, num_prompt_tokens)] * min(per_step, num_rows - begin)
            steps.append(step_counts(0, 0, prompts, lora))
        for k in range(1, num_new_tokens):
            steps.append(step_counts(num_rows, num_rows * (num_prompt_tokens + k), [], lora))
    return added(steps)


def generation(num_requests: int, num_new_tokens: int, tokens_per_s: float, what: str, lora: Lora) -> Row:
    """`num_requests` prompts of 128 tokens; the rate counts new tokens."""
    name = f"{num_requests} requests, 128 in, {num_new_tokens} out: {what}"
    total_ms = 1e3 * num_requests * num_new_tokens / tokens_per_s
    counts = batch_counts(num_requests, 128, num_new_tokens, lora)
    return Row(name, "tokens/s", tokens_per_s, total_ms, counts)


def prefill(tokens_per_s: float, what: str, lora: Lora) -> Row:
    """16 prompts of 2,048 tokens and one new token each; the rate counts prompt tokens."""
    counts = batch_counts(16, 2048, 1, lora)
    return Row(
        f"prefill 16 x 2,048: {what}", "tokens/s", tokens_per_s, 1e3 * 16 * 2048 / tokens_per_s, counts
    )


def closed_rows(what: str, rates: dict[int, float], lora: Lora) -> list[Row]:
    """The tables' closed batches: 1 request makes 256 tokens, 32 and 128 make 128 each, 256 make 64 each."""
    new_tokens = {1: 256, 32: 128, 128: 128, 256: 64}
    return [
        generation(
            num, new_tokens[num], rate, what, Lora(min(lora.num_adapters, num), lora.lora_rank, lora.places)
        )
        for num, rate in rates.items()
    ]


def zipf(num_adapters: int, exponent: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Popularity of each adapter; exponent 0 is uniform."""
    weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -exponent
    popularity: np.ndarray[Any, np.dtype[np.float64]] = weights / weights.sum()
    return popularity


def distinct(popularity: np.ndarray[Any, np.dtype[np.float64]], num_rows: float) -> float:
    """Expected number of distinct adapters among rows that draw theirs independently."""
    return float((1 - (1 - popularity) ** num_rows).sum())


def open_loop_step(name: str, ms: float, num_rows: float, num_prompts: int, lora: Lora) -> Row:
    """A step of an open loop, 128 tokens in and 64 out: contexts have 160 tokens on average."""
    counts = step_counts(num_rows, num_rows * 160, [(0, 128)] * num_prompts, lora)
    return Row(name, "ms", ms, ms, counts)


def vllm_open_loop(
    what: str,
    rate_per_s: float,
    ttft_p50_ms: float,
    itl_p50_ms: float,
    popularity_exponent: float,
    places: int,
) -> list[Row]:
    """Two steps from a row of the open-loop table where nobody queues and nothing is loaded.

    The median gap between tokens is a step of decodes, D. The first token waits for the rest of the step
    under way, half of it on average, and then for a step with a prompt, M. A share rate * M of the time is
    spent in steps with a prompt: TTFT = M + (1 - rate * M) * D / 2 + rate * M * M / 2. How many rows run
    follows from Little's law: a request lives for its first token and 63 gaps, stretched by the steps with
    other prompts.
    """
    rate_per_ms = rate_per_s / 1e3
    linear = 1 - rate_per_ms * itl_p50_ms / 2
    constant = itl_p50_ms / 2 - ttft_p50_ms
    prompt_step_ms = (math.sqrt(linear**2 - 2 * rate_per_ms * constant) - linear) / rate_per_ms
    mean_gap_ms = itl_p50_ms / (1 - rate_per_ms * (prompt_step_ms - itl_p50_ms))
    num_rows = rate_per_s * (ttft_p50_ms + 63 * mean_gap_ms) / 1e3
    popularity = zipf(places, popularity_exponent)
    lora = Lora(distinct(popularity, num_rows), 16, places)
    with_prompt = Lora(distinct(popularity, num_rows + 1), 16, places)
    return [
        open_loop_step(f"open loop, {what}: a step of decodes", itl_p50_ms, num_rows, 0, lora),
        open_loop_step(f"open loop, {what}: with a prompt", prompt_step_ms, num_rows, 1, with_prompt),
    ]


def vllm_rows() -> list[Row]:
    """vLLM 0.24.0. The engine of the columns 'idle' and '1 adapter' is taken to have 8 places."""
    idle, one, eight = Lora(0, 64, 8), Lora(1, 64, 8), Lora(8, 64, 8)
    return [
        *closed_rows("base", {1: 147.2, 32: 3971, 128: 10789}, Lora()),
        prefill(42567, "base", Lora()),
        *closed_rows("LoRA on, idle", {1: 144.3, 32: 3827, 128: 10640}, idle),
        prefill(42608, "LoRA on, idle", idle),
        *closed_rows("1 adapter r64", {1: 105.6, 32: 2951, 128: 7353}, one),
        prefill(29837, "1 adapter r64", one),
        *closed_rows("8 adapters r64", {1: 105.1, 32: 2030, 128: 6484}, eight),
        prefill(29526, "8 adapters r64", eight),
        *closed_rows("8 adapters r16", {1: 114.4, 32: 2538, 128: 6797, 256: 5616}, Lora(8, 16, 8)),
        *closed_rows("8 adapters r16, 64 places", {32: 2195}, Lora(8, 16, 64)),
        *closed_rows("32 adapters r16", {32: 1436, 128: 4653}, Lora(32, 16, 32)),
        *closed_rows("64 adapters r16", {128: 3210, 256: 2752}, Lora(64, 16, 64)),
        *vllm_open_loop("8 uniform, 8 places, 12/s", 12, 35, 10.2, 0, 8),
        *vllm_open_loop("64 zipf, 64 places, 12/s", 12, 46, 13.2, 1, 64),
    ]


def gate_itl(what: str, rate_per_s: float, itl_p99_ms: float, num_prompts: int) -> Row:
    """The step that the gate on the p99 gap allows, with as many prompts as 1% of the steps have.

    The rows that run are taken from a mean gap of half the gate.
    """
    num_rows = rate_per_s * 64 * itl_p99_ms / 2 / 1e3
    lora = Lora(distinct(zipf(64, 1), num_rows + num_prompts), 16, 64)
    return open_loop_step(
        f"open loop, {what}: {num_prompts} prompt(s)", itl_p99_ms, num_rows, num_prompts, lora
    )


def gate_rows() -> list[Row]:
    base = {1: 150.0, 32: 4050.0, 128: 11000.0}
    return [
        *closed_rows("base", base, Lora()),
        prefill(42600, "base", Lora()),
        *closed_rows("LoRA on, idle", {num: 0.995 * rate for num, rate in base.items()}, Lora(0, 64, 64)),
        *closed_rows("1 adapter r64", {1: 138, 32: 3800, 128: 10000}, Lora(1, 64, 64)),
        prefill(39000, "1 adapter r64", Lora(1, 64, 64)),
        *closed_rows("8 adapters r64", {32: 3200, 128: 9000}, Lora(8, 64, 64)),
        *closed_rows("8 adapters r16", {32: 3500, 128: 9800}, Lora(8, 16, 64)),
        *closed_rows("32 adapters r16", {32: 2900, 128: 9000}, Lora(32, 16, 64)),
        *closed_rows("64 adapters r16", {128: 8000}, Lora(64, 16, 64)),
        # At the gate of the row above, this work takes 6,700 tokens/s: its own gate asks less of the device.
        *(
            replace(row, is_fitted=False)
            for row in closed_rows("64 adapters r16", {256: 5500}, Lora(64, 16, 64))
        ),
        gate_itl("64 zipf, 12/s", 12, 20, 1),
        gate_itl("64 zipf, 24/s", 24, 25, 2),
    ]
