"""The rows of `lora-serve bench table`: workloads, what vLLM does on them, and what we are after.

All figures are of one H100 80GB and random weights of Qwen3-8B's shape in bfloat16, random prompts, greedy,
without prefix reuse. Those of vLLM are of version 0.24.0, torch 2.11 and CUDA 13.0, `LLM` in one process,
without detokenising, `max_num_seqs` 128, memory share 0.85, `max_loras` as many as adapters fit; the best of
two runs after a warm-up. Its open loops had fewer requests than ours (`Row.num_vllm_requests`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_serve.cli.bench.workloads import ClosedBatch, OpenLoop, Workload

PREFILL_STEP_TOKENS = 16384
SERVE_STEP_TOKENS = 2048
"""Tokens of a step where waits count: one long prompt must not hold up all others."""


@dataclass(frozen=True, kw_only=True)
class EngineNeeds:
    """What a row asks of its engine; rows that ask the same share one.

    Parameters
    ----------
    num_adapters, lora_rank
        Adapters that it knows, all of one rank on all seven projections.
    num_device_adapters, num_host_adapters
        How many of them device and host memory hold; None = all.
    max_num_batched_tokens
        Of a step on CUDA, unless the user says otherwise.
    """

    num_adapters: int = 0
    lora_rank: int = 16
    num_device_adapters: int | None = None
    num_host_adapters: int | None = None
    max_num_batched_tokens: int = PREFILL_STEP_TOKENS

    def describe(self) -> str:
        """Such as '64 adapters of rank 16, 8 on the device'."""
        if not self.num_adapters:
            return "no adapters"
        text = f"{self.num_adapters} adapters of rank {self.lora_rank}"
        for num, place in ((self.num_device_adapters, "device"), (self.num_host_adapters, "host")):
            if num is not None and num < self.num_adapters:
                text += f", {num} on the {place}"
        return text


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a row, with what others do and what we are after; None = nothing is said.

    Parameters
    ----------
    name
        'tokens_per_s', or a time such as 'ttft_p99_ms'.
    vllm
        What vLLM does.
    gate, stretch
        What must hold, and where the machine's limits say that one can go.
    """

    name: str
    vllm: float | None = None
    gate: float | None = None
    stretch: float | None = None

    @property
    def is_time(self) -> bool:
        """Whether less is better."""
        return self.name.endswith("_ms")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Parameters
    ----------
    name
        What `--rows` selects.
    needs
        Of its engine.
    workload
        What is sent.
    figures
        What is compared.
    base_row
        The row of the base model with the same workload, where `gate` and `stretch` are parts of its figure.
    num_vllm_requests
        How many requests vLLM's figures are of, where they are not as many as ours.
    """

    name: str
    needs: EngineNeeds
    workload: Workload
    figures: tuple[Figure, ...]
    base_row: str | None = None
    num_vllm_requests: int | None = None


_SHAPES = {
    "1": ClosedBatch(num_requests=1, num_prompt_tokens=128, num_output_tokens=256),
    "32": ClosedBatch(num_requests=32, num_prompt_tokens=128, num_output_tokens=128),
    "128": ClosedBatch(num_requests=128, num_prompt_tokens=128, num_output_tokens=128),
    "256": ClosedBatch(num_requests=256, num_prompt_tokens=128, num_output_tokens=64),
    "prefill": ClosedBatch(num_requests=16, num_prompt_tokens=2048, num_output_tokens=1),
}
_Goals = tuple[float | None, float | None, float | None]


def _closed(
    prefix: str,
    needs: EngineNeeds,
    num_adapters: int,
    goals: dict[str, _Goals],
    base_prefix: str | None = None,
) -> list[Row]:
    rows = []
    for shape, (vllm, gate, stretch) in goals.items():
        rows.append(
            Row(
                name=f"{prefix}-{shape}",
                needs=needs,
                workload=replace(_SHAPES[shape], num_adapters=num_adapters),
                figures=(Figure(name="tokens_per_s", vllm=vllm, gate=gate, stretch=stretch),),
                base_row=None if base_prefix is None else f"{base_prefix}-{shape}",
            )
        )
    return rows


def _open(
    name: str, needs: EngineNeeds, workload: OpenLoop, goals: dict[str, _Goals], num_vllm_requests: int = 180
) -> Row:
    figures = tuple(
        Figure(name=figure, vllm=vllm, gate=gate, stretch=stretch)
        for figure, (vllm, gate, stretch) in goals.items()
    )
    return Row(
        name=name, needs=needs, workload=workload, figures=figures, num_vllm_requests=num_vllm_requests
    )


def _times(*vllm: float, **aims: tuple[float, float]) -> dict[str, _Goals]:
    names = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "itl_max_ms", "e2e_p99_ms")
    return {name: (value, *aims.get(name, (None, None))) for name, value in zip(names, vllm, strict=True)}


def _at_rate(rate: float, num_adapters: int, popularity: str) -> OpenLoop:
    return OpenLoop(
        num_requests=1200,
        num_prompt_tokens=128,
        num_output_tokens=64,
        rate=rate,
        num_adapters=num_adapters,
        popularity=popularity,
    )


def _serving(num_adapters: int, num_device: int | None = None, num_host: int | None = None) -> EngineNeeds:
    return EngineNeeds(
        num_adapters=num_adapters,
        num_device_adapters=num_device,
        num_host_adapters=num_host,
        max_num_batched_tokens=SERVE_STEP_TOKENS,
    )


_NONE = EngineNeeds()
_R64 = EngineNeeds(num_adapters=8, lora_rank=64)
_R16_8, _R16_32, _R16_64 = (EngineNeeds(num_adapters=number) for number in (8, 32, 64))
_IDLE_PARTS = (0.995, 1.0)

ROWS: tuple[Row, ...] = (
    *_closed(
        "base",
        _NONE,
        0,
        {
            "1": (147.2, 150, 160),
            "32": (3971, 4050, 4300),
            "128": (10789, 11000, 11500),
            "prefill": (42567, 42600, 44000),
        },
    ),
    *_closed(
        "idle",
        _R64,
        0,
        {
            "1": (144.3, *_IDLE_PARTS),
            "32": (3827, *_IDLE_PARTS),
            "128": (10640, *_IDLE_PARTS),
            "prefill": (42608, *_IDLE_PARTS),
        },
        base_prefix="base",
    ),
    *_closed(
        "1xr64",
        _R64,
        1,
        {
            "1": (105.6, 138, 150),
            "32": (2951, 3800, 4050),
            "128": (7353, 10000, 10900),
            "prefill": (29837, 39000, 42500),
        },
    ),
    *_closed(
        "8xr64",
        _R64,
        8,
        {
            "1": (105.1, 138, 150),
            "32": (2030, 3200, 3600),
            "128": (6484, 9000, 9900),
            "prefill": (29526, 39000, 42500),
        },
    ),
    *_closed(
        "8xr16",
        _R16_8,
        8,
        {
            "1": (114.4, None, None),
            "32": (2538, 3500, 3950),
            "128": (6797, 9800, 10700),
            "256": (5616, None, None),
        },
    ),
    *_closed("32xr16", _R16_32, 32, {"32": (1436, 2900, 3500), "128": (4653, 9000, 10000)}),
    *_closed("64xr16", _R16_64, 64, {"128": (3210, 8000, 9300), "256": (2752, 5500, 6500)}),
    *_closed("8of64xr16", _R16_64, 8, {"32": (2195, None, None)}),
    *_closed(
        "16xr16-8places", EngineNeeds(num_adapters=16, num_device_adapters=8), 16, {"256": (5234, None, None)}
    ),
    *_closed(
        "64xr16-8places", EngineNeeds(num_adapters=64, num_device_adapters=8), 64, {"256": (2088, None, None)}
    ),
    _open(
        "open-8-uniform",
        _serving(8),
        _at_rate(12, 8, "uniform"),
        _times(35, 159, 10.2, 34, 100, 977),
    ),
    _open(
        "open-16-uniform-8places",
        _serving(16, 8),
        _at_rate(12, 16, "uniform"),
        _times(41, 850, 11.0, 63, 174, 1713),
    ),
    _open(
        "open-64-zipf-8places",
        _serving(64, 8),
        _at_rate(12, 64, "zipf"),
        _times(50, 1067, 11.3, 67, 148, 2054, ttft_p99_ms=(250, 120), itl_p99_ms=(20, 15)),
    ),
    _open(
        "open-64-zipf-8places-host16",
        _serving(64, 8, 16),
        _at_rate(12, 64, "zipf"),
        _times(
            *(773, 2920, 11.7, 172, 309, 4073),
            ttft_p50_ms=(80, 50),
            ttft_p99_ms=(500, 250),
            itl_p99_ms=(20, 15),
        ),
    ),
    _open(
        "open-64-uniform-8places-host16",
        _serving(64, 8, 16),
        _at_rate(12, 64, "uniform"),
        _times(2390, 5097, 11.6, 208, 311, 6333),
    ),
    _open(
        "open-64-zipf",
        _serving(64),
        _at_rate(12, 64, "zipf"),
        _times(46, 226, 13.2, 94, 171, 1672, ttft_p99_ms=(80, 50), itl_p99_ms=(20, 12)),
        num_vllm_requests=720,
    ),
    _open(
        "open-64-zipf-24",
        _serving(64),
        _at_rate(24, 64, "zipf"),
        _times(205, 522, 28.5, 146, 194, 5215, ttft_p99_ms=(120, 60), itl_p99_ms=(25, 15)),
        num_vllm_requests=960,
    ),
)
"""In the order in which they are measured and shown."""
