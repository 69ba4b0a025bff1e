"""What `make sim` runs: workloads, systems and the devices that they run on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

Options: TypeAlias = dict[str, str | int | float]

VLLM_DEVICE = "vllm_h100_qwen3_8b"
OWN_DEVICE = "lora_serve_target_h100_qwen3_8b"

LORA_SERVE = "lora_serve"
VLLM_LIKE = "vllm_like"
SGLANG_LIKE = "sglang_like"
SYSTEMS = (LORA_SERVE, VLLM_LIKE, SGLANG_LIKE)

# The engine's defaults, where the program's are others.
LORA_SERVE_OPTIONS: Options = {
    "adapter-time-slice-steps": 4,
    "adapter-pause-us": 75_000,
    "adapter-patience-us": 20_000,
    "loads-staged-only": 1,
    "max-loras": 64,
    "check-bound": 1,
}


@dataclass(frozen=True)
class Measured:
    """A row of the open-loop table that vLLM was measured with, in milliseconds."""

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    itl_max: float
    e2e_p99: float
    num_requests: int


@dataclass(frozen=True)
class Scenario:
    """A workload and the memory that it is served with."""

    name: str
    title: str
    options: Options
    num_requests: int = 20_000
    measured: Measured | None = None
    systems: tuple[str, ...] = SYSTEMS
    devices: tuple[str, ...] = (VLLM_DEVICE, OWN_DEVICE)
    # Also drawn as a distribution of the time to the first token.
    has_quantiles: bool = False


def _options(
    adapters: int, popularity: str, memory: int, host: int, rate: float, **more: str | int | float
) -> Options:
    """Adapters, how they are asked for, and how many fit on the device and the host (0 = all)."""
    options: Options = {
        "adapters": adapters,
        "popularity": popularity,
        "places": memory,
        "host-adapters": host,
        "rate": rate,
        "prompt-tokens": 128,
        "output-tokens": 64,
    }
    return options | {name.replace("_", "-"): value for name, value in more.items()}


# The open-loop table of vLLM's measurements: rank 16, 128 prompt tokens, 64 output tokens.
OPEN_LOOP = (
    Scenario(
        "uniform8",
        "8 uniform, memory for 8, 12/s",
        _options(8, "uniform", 8, 0, 12),
        measured=Measured(35, 159, 10.2, 34, 100, 977, 180),
    ),
    Scenario(
        "uniform16-warm",
        "16 uniform, memory for 8, host for all, 12/s",
        _options(16, "uniform", 8, 0, 12),
        measured=Measured(41, 850, 11.0, 63, 174, 1713, 180),
    ),
    Scenario(
        "zipf64-warm",
        "64 zipf, memory for 8, host for all, 12/s",
        _options(64, "zipf", 8, 0, 12),
        measured=Measured(50, 1067, 11.3, 67, 148, 2054, 180),
        has_quantiles=True,
    ),
    Scenario(
        "zipf64-cold",
        "64 zipf, memory for 8, host for 16, 12/s",
        _options(64, "zipf", 8, 16, 12),
        measured=Measured(773, 2920, 11.7, 172, 309, 4073, 180),
        has_quantiles=True,
    ),
    Scenario(
        "uniform64-cold",
        "64 uniform, memory for 8, host for 16, 12/s",
        _options(64, "uniform", 8, 16, 12),
        measured=Measured(2390, 5097, 11.6, 208, 311, 6333, 180),
    ),
    Scenario(
        "zipf64-resident",
        "64 zipf, memory for 64, 12/s",
        _options(64, "zipf", 64, 0, 12),
        measured=Measured(46, 226, 13.2, 94, 171, 1672, 720),
    ),
    Scenario(
        "zipf64-resident-24",
        "64 zipf, memory for 64, 24/s",
        _options(64, "zipf", 64, 0, 24),
        measured=Measured(205, 522, 28.5, 146, 194, 5215, 960),
    ),
)

# Other shapes of traffic, with memory for 8 unless they say otherwise.
OTHER = (
    Scenario(
        "bursty64-warm",
        "64 zipf in bursts (4 times the mean, a fifth of the time), host for all, 8/s",
        _options(64, "zipf", 8, 0, 8, burst_factor=4, burst_share=0.2, burst_s=2),
    ),
    Scenario(
        "drifting64-cold",
        "64 zipf, the ranking moves on every 10 s, host for 16, 12/s",
        _options(64, "drifting", 8, 16, 12, drift_period_us=10_000_000, drift_step=3),
    ),
    Scenario(
        "skewed64-cold",
        "64, 90% of the requests on 10% of them, host for 16, 12/s",
        _options(64, "skewed", 8, 16, 12),
    ),
    Scenario(
        "base64-cold",
        "64 zipf, half of the requests without adapter, host for 16, 16/s",
        _options(64, "zipf", 8, 16, 16, base_share=0.5),
    ),
    Scenario(
        "lengths64-cold",
        "64 zipf, lognormal lengths (mean 256 in, 64 out), host for 16, 8/s",
        _options(64, "zipf", 8, 16, 8)
        | {"prompt-tokens": "lognormal:256:1", "output-tokens": "lognormal:64:1"},
    ),
    Scenario(
        "ranks64-cold",
        "64 zipf of ranks 8, 16 and 64, memory for 8 and host for 16 of rank 64, 12/s",
        _options(64, "zipf", 8, 16, 12) | {"lora-ranks": "8,16,64"},
    ),
    Scenario(
        "zipf1000-cold",
        "1,000 zipf, memory for 64, host for 256, 20/s",
        _options(1000, "zipf", 64, 256, 20),
    ),
    Scenario(
        "closed32-cold",
        "64 zipf, host for 16, 32 clients in a closed loop",
        _options(64, "zipf", 8, 16, 12, clients=32),
    ),
)

RATES = (4, 6, 8, 10, 12, 14, 16, 18, 20, 24)


def _rate_scenarios(name: str, host: int) -> tuple[Scenario, ...]:
    return tuple(
        Scenario(f"{name}-rate{rate}", f"{name} at {rate}/s", _options(64, "zipf", 8, host, rate))
        for rate in RATES
    )


# 64 zipf with memory for 8, over the rate; drawn, not in the table.
RATE_SWEEPS = {
    "zipf64-warm": _rate_scenarios("zipf64-warm", 0),
    "zipf64-cold": _rate_scenarios("zipf64-cold", 16),
}

# How large a run may be, and how near the longest wait comes to the bound; not policies to compare.
LARGE = (
    Scenario(
        "zipf64-bound",
        "64 zipf, memory for 8, host for all, 12/s, 100,000 requests",
        _options(64, "zipf", 8, 0, 12),
        num_requests=100_000,
        systems=(LORA_SERVE,),
    ),
    Scenario(
        "zipf64-bound-no-slices",
        "the same without time slices",
        _options(64, "zipf", 8, 0, 12, adapter_time_slice_steps=0),
        num_requests=100_000,
        systems=(LORA_SERVE,),
    ),
    Scenario(
        "zipf10000-million",
        "10,000 zipf, memory for 64, host for 1,024, 1,000,000 requests",
        _options(10_000, "zipf", 64, 1024, 20),
        num_requests=1_000_000,
        systems=(LORA_SERVE,),
        devices=(OWN_DEVICE,),
    ),
)

# How much it costs that few of many adapters fit: the same arrivals over 20 that all fit, and over 1,000.
# Each device at 60% of what it serves of the 20 in a closed loop: 50.5/s and 77.4/s.
MANY_ADAPTERS = tuple(
    Scenario(
        f"{name}-{share_of}",
        title,
        _options(adapters, "zipf", 20, host, rate),
        systems=(LORA_SERVE,),
        devices=(device,),
    )
    for share_of, device, rate in (("vllm-device", VLLM_DEVICE, 30.3), ("own-device", OWN_DEVICE, 46.4))
    for name, title, adapters, host in (
        ("zipf20-resident", f"20 zipf, memory for 20, {rate}/s", 20, 20),
        ("zipf1000-of-20", f"1,000 zipf, memory for 20, host for 200, {rate}/s", 1000, 200),
    )
)


@dataclass(frozen=True)
class Run:
    """One call of the program."""

    scenario: Scenario
    system: str
    device: str
    num_requests: int
    seed: int = 1

    def arguments(self) -> Options:
        """Options of the program, without the device's file and outputs."""
        own = LORA_SERVE_OPTIONS if self.system == LORA_SERVE else {}
        fixed: Options = {
            "label": self.scenario.name,
            "system": self.system,
            "requests": self.num_requests,
            "seed": self.seed,
        }
        return own | self.scenario.options | fixed


@dataclass(frozen=True)
class Plan:
    """All runs of a call of `make sim`."""

    table: list[Run] = field(default_factory=list)
    sweeps: list[Run] = field(default_factory=list)
    validation: list[Run] = field(default_factory=list)
    large: list[Run] = field(default_factory=list)
    many: list[Run] = field(default_factory=list)

    def all(self) -> list[Run]:
        """In the order in which they are reported."""
        return self.table + self.sweeps + self.validation + self.large + self.many


NUM_VALIDATION_SEEDS = 9


def make_plan(max_requests: int | None = None) -> Plan:
    """Return every run; `max_requests` cuts each short."""

    def size(num_requests: int) -> int:
        return num_requests if max_requests is None else min(num_requests, max_requests)

    def runs(scenarios: tuple[Scenario, ...]) -> list[Run]:
        return [
            Run(scenario, system, device, size(scenario.num_requests))
            for scenario in scenarios
            for device in scenario.devices
            for system in scenario.systems
        ]

    validation = [
        Run(scenario, VLLM_LIKE, VLLM_DEVICE, size(scenario.measured.num_requests), seed)
        for scenario in OPEN_LOOP
        if scenario.measured is not None
        for seed in range(1, NUM_VALIDATION_SEEDS + 1)
    ]
    sweeps = [run for scenarios in RATE_SWEEPS.values() for run in runs(scenarios)]
    return Plan(
        table=runs(OPEN_LOOP + OTHER),
        sweeps=sweeps,
        validation=validation,
        large=runs(LARGE),
        many=runs(MANY_ADAPTERS),
    )
