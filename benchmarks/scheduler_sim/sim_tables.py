"""Markdown tables of simulated runs, and their place in a document."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from sim_runner import Result
from sim_scenarios import LORA_SERVE, OWN_DEVICE, SGLANG_LIKE, VLLM_DEVICE, VLLM_LIKE, Scenario

NAMES = {LORA_SERVE: "lora_serve", VLLM_LIKE: "vLLM-like", SGLANG_LIKE: "SGLang-like"}


class Results:
    """Results by scenario, system and device."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = {(r.run.scenario.name, r.run.system, r.run.device): r for r in results}

    def get(self, scenario: str, system: str, device: str) -> Result:
        """The result. Raises KeyError when it was not run."""
        return self._results[scenario, system, device]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: float) -> str:
    """With as many digits as mean something."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _join(result: Result, *names: str) -> str:
    return " / ".join(number(result[name]) for name in names)


def system_table(results: Results, scenarios: Iterable[Scenario], device: str) -> str:
    """All systems on one device, one row each."""
    header = (
        "adapters, memory, rate",
        "system",
        "TTFT p50 / p99 / max",
        "rarest tenth p50 / p99",
        "ITL p50 / p99 / max",
        "E2E p99",
        "tokens/s",
        "loads host / disk",
    )
    rows = []
    for scenario in scenarios:
        for system in scenario.systems:
            result = results.get(scenario.name, system, device)
            rows.append(
                (
                    scenario.title if system == scenario.systems[0] else "",
                    NAMES[system],
                    _join(result, "ttft_p50_ms", "ttft_p99_ms", "ttft_max_ms"),
                    _join(result, "rare_ttft_p50_ms", "rare_ttft_p99_ms"),
                    _join(result, "itl_p50_ms", "itl_p99_ms", "itl_max_ms"),
                    number(result["e2e_p99_ms"]),
                    number(result["output_tokens_per_s"]),
                    f"{result['host_loads']:,.0f} / {result['disk_loads']:,.0f}",
                )
            )
    return markdown(header, rows)


def ratio_table(results: Results, scenarios: Iterable[Scenario]) -> str:
    """How many times shorter lora_serve's p99 TTFT is than the baselines'."""
    header = (
        "adapters, memory, rate",
        "same device (vLLM's): all / rarest",
        "same device (lora_serve's): all / rarest",
        "each on its own: all / rarest",
        "SGLang-like, each on its own",
        "tokens/s of the vLLM-like's, on vLLM's / lora_serve's device",
    )

    def ratio(scenario: Scenario, system: str, devices: tuple[str, str], metric: str) -> str:
        ours = results.get(scenario.name, LORA_SERVE, devices[0])[metric]
        theirs = results.get(scenario.name, system, devices[1])[metric]
        return f"{theirs / ours:.1f}" if ours > 0 else "-"  # no request of a rare adapter

    rows = []
    for scenario in scenarios:
        cells = [scenario.title]
        for devices in ((VLLM_DEVICE, VLLM_DEVICE), (OWN_DEVICE, OWN_DEVICE), (OWN_DEVICE, VLLM_DEVICE)):
            both = [ratio(scenario, VLLM_LIKE, devices, name) for name in ("ttft_p99_ms", "rare_ttft_p99_ms")]
            cells.append(" / ".join(both))
        cells.append(ratio(scenario, SGLANG_LIKE, (OWN_DEVICE, VLLM_DEVICE), "ttft_p99_ms"))
        shares = []
        for device in (VLLM_DEVICE, OWN_DEVICE):
            ours = results.get(scenario.name, LORA_SERVE, device)["output_tokens_per_s"]
            theirs = results.get(scenario.name, VLLM_LIKE, device)["output_tokens_per_s"]
            shares.append(f"{ours / theirs:.3f}")
        cells.append(" / ".join(shares))
        rows.append(cells)
    return markdown(header, rows)


def validation_table(results: Iterable[Result]) -> str:
    """The vLLM-like baseline beside what vLLM was measured with: medians over the seeds."""
    by_scenario: dict[str, list[Result]] = {}
    for result in results:
        by_scenario.setdefault(result.run.scenario.name, []).append(result)
    header = (
        "adapters, memory, rate (requests)",
        "TTFT p50: measured / simulated",
        "TTFT p99",
        "ITL p50",
        "ITL p99",
        "ITL max",
        "E2E p99",
    )
    rows = []
    for group in by_scenario.values():
        scenario = group[0].run.scenario
        measured = scenario.measured
        if measured is None:
            continue
        pairs = (
            (measured.ttft_p50, "ttft_p50_ms"),
            (measured.ttft_p99, "ttft_p99_ms"),
            (measured.itl_p50, "itl_p50_ms"),
            (measured.itl_p99, "itl_p99_ms"),
            (measured.itl_max, "itl_max_ms"),
            (measured.e2e_p99, "e2e_p99_ms"),
        )
        cells = [f"{scenario.title} ({group[0].run.num_requests})"]
        for value, name in pairs:
            simulated = statistics.median(result[name] for result in group)
            cells.append(f"{number(value)} / {number(simulated)}")
        rows.append(cells)
    return markdown(header, rows)


def large_table(results: Iterable[Result]) -> str:
    """How long the simulation itself took."""
    rows = [
        (
            result.run.scenario.title,
            "vLLM's" if result.run.device == VLLM_DEVICE else "lora_serve's",
            f"{result['waited_steps_max']:,.0f}",
            f"{100 * result['bound_share_max']:.2g}%",
            number(result["wall_s"]),
            f"{result['steps']:,.0f}",
            number(1e6 * result["wall_s"] / result["steps"]),
            number(result["ttft_p99_ms"]),
            f"{result['host_loads']:,.0f} / {result['disk_loads']:,.0f}",
        )
        for result in results
    ]
    header = (
        "run",
        "device",
        "longest wait, steps",
        "of its bound",
        "wall s",
        "steps",
        "us a step",
        "TTFT p99 ms",
        "loads host / disk",
    )
    return markdown(header, rows)


def many_adapters_table(results: Sequence[Result]) -> str:
    """Pairs of runs on one device: adapters that all fit, and many of which few do."""
    header = (
        "adapters, memory, rate",
        "device",
        "requests/s",
        "of the former",
        "TTFT p50 / p99",
        "loads host / disk",
    )
    rows = []
    for few, many in zip(results[::2], results[1::2], strict=True):
        rows += [
            (
                result.run.scenario.title,
                "vLLM's" if result.run.device == VLLM_DEVICE else "lora_serve's",
                number(result["requests_per_s"]),
                "" if result is few else f"{result['requests_per_s'] / few['requests_per_s']:.3f}",
                _join(result, "ttft_p50_ms", "ttft_p99_ms"),
                f"{result['host_loads']:,.0f} / {result['disk_loads']:,.0f}",
            )
            for result in (few, many)
        ]
    return markdown(header, rows)


def replace_between_markers(text: str, name: str, content: str) -> str:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises
    ------
    ValueError
        The markers are not there, once and in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected '{begin}' and, behind it, '{end}', each once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
