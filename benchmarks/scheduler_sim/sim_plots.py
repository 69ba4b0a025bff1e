"""Plots of simulated runs, as PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from sim_scenarios import (
    LORA_SERVE,
    OPEN_LOOP,
    OTHER,
    OWN_DEVICE,
    RATE_SWEEPS,
    RATES,
    SGLANG_LIKE,
    VLLM_DEVICE,
    VLLM_LIKE,
)
from sim_tables import Results

# (system, device, label, colour, style)
SERIES = (
    (VLLM_LIKE, VLLM_DEVICE, "vLLM-like, vLLM's device", "#c44e52", "-"),
    (SGLANG_LIKE, VLLM_DEVICE, "SGLang-like, vLLM's device", "#dd8452", "-"),
    (LORA_SERVE, VLLM_DEVICE, "lora_serve, vLLM's device", "#4c72b0", "-"),
    (VLLM_LIKE, OWN_DEVICE, "vLLM-like, lora_serve's device", "#c44e52", "--"),
    (LORA_SERVE, OWN_DEVICE, "lora_serve, its own device", "#4c72b0", "--"),
)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    # No version or date in the file: equal runs give equal files.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def plot_rates(results: Results, path: Path) -> None:
    """p99 of the time to the first token, and of the time between tokens, over the rate."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True)
    titles = {"zipf64-warm": "host memory for all", "zipf64-cold": "host memory for 16"}
    for column, (name, scenarios) in enumerate(RATE_SWEEPS.items()):
        for row, (metric, label) in enumerate(
            (("ttft_p99_ms", "TTFT p99 [ms]"), ("itl_p99_ms", "ITL p99 [ms]"))
        ):
            axis = axes[row][column]
            for system, device, series, colour, style in SERIES:
                values = [results.get(scenario.name, system, device)[metric] for scenario in scenarios]
                axis.plot(RATES, values, style, color=colour, marker="o", markersize=3, label=series)
            axis.set_yscale("log")
            axis.set_ylabel(label)
            axis.grid(True, which="both", alpha=0.3)
        axes[0][column].set_title(f"64 adapters (zipf), device memory for 8, {titles[name]}", fontsize=10)
        axes[1][column].set_xlabel("requests/s")
    axes[0][0].legend(fontsize=8)
    _save(figure, path)


def plot_scenarios(results: Results, path: Path) -> None:
    """p99 of the time to the first token in every scenario."""
    scenarios = OPEN_LOOP + OTHER
    figure, axis = plt.subplots(figsize=(11, 7))
    height = 0.8 / len(SERIES)
    for index, (system, device, series, colour, style) in enumerate(SERIES):
        values = [results.get(scenario.name, system, device)["ttft_p99_ms"] for scenario in scenarios]
        positions = [position + index * height for position in range(len(scenarios))]
        hatch = "" if style == "-" else "///"
        axis.barh(positions, values, height, color=colour, hatch=hatch, edgecolor="white", label=series)
    axis.set_yticks([position + 0.4 - height / 2 for position in range(len(scenarios))])
    axis.set_yticklabels([scenario.name for scenario in scenarios], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("TTFT p99 [ms]")
    axis.grid(True, axis="x", which="both", alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def plot_distributions(results: Results, path: Path) -> None:
    """Share of the requests that have their first token after a time."""
    scenarios = [scenario for scenario in OPEN_LOOP if scenario.has_quantiles]
    figure, axes = plt.subplots(1, len(scenarios), figsize=(11, 4), sharey=True)
    for axis, scenario in zip(axes, scenarios, strict=True):
        for system, device, series, colour, style in SERIES:
            lines = results.get(scenario.name, system, device).quantiles
            times = [line["ttft_ms"] for line in lines]
            axis.plot(times, [line["quantile"] for line in lines], style, color=colour, label=series)
        axis.set_xscale("log")
        axis.set_title(scenario.title, fontsize=10)
        axis.set_xlabel("TTFT [ms]")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(fontsize=8, loc="upper left")
    _save(figure, path)
