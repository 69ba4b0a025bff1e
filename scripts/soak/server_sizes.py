"""How large a soak of a server is."""

from __future__ import annotations

from dataclasses import dataclass, field

from .server_questions import PASSWORDS, QUESTIONS, Question

SCARCE = (
    *("--kv-memory-gb", "0.02", "--kv-host-memory-gb", "0.05"),
    *("--lora-memory-gb", "0.0016", "--lora-host-memory-gb", "0.004"),
)
"""Beside the demo's own arguments: KV pages for some of the running requests, adapters for half the names."""
MUST_HAVE_HAPPENED = (
    *("total_adapter_loads", "total_adapter_evictions", "total_aborted_requests"),
    *("total_preemptions", "total_evicted_pages", "total_hit_tokens", "total_host_hit_tokens"),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a soak is.

    Parameters
    ----------
    num_streams
        Open at any time.
    seconds, warm_up_s
        At full load, and of them, those before memory counts.
    num_names
        Of adapters; each has two contents.
    change_interval_s, sample_interval_s
        Between two changes of adapters, and between two looks at the memory.
    questions
        That are asked.
    must_have_happened
        Counts of the engine that may not be 0 in the end.
    """

    num_streams: int = 500
    seconds: float = 180.0
    warm_up_s: float = 60.0
    num_names: int = 16
    change_interval_s: float = 0.7
    sample_interval_s: float = 2.0
    questions: list[Question] = field(default_factory=lambda: QUESTIONS)
    must_have_happened: tuple[str, ...] = MUST_HAVE_HAPPENED


SMALLEST = Sizes(
    num_streams=60,
    seconds=10.0,
    warm_up_s=4.0,
    num_names=6,
    change_interval_s=0.2,
    sample_interval_s=0.5,
    questions=[*PASSWORDS, QUESTIONS[5], QUESTIONS[6], QUESTIONS[8]],
    must_have_happened=("total_adapter_loads", "total_aborted_requests", "total_hit_tokens"),
)
