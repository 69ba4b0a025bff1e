"""The scheduler and the KV prefix cache of the C++ core.

Everything else takes these names from here; of the rest of the extension only `lora.peft_reader` takes some.
Two value types cross the border in the step loop: ``ExecutionPlan`` out, ``ExecutionEvent`` in.
"""

from __future__ import annotations

from lora_serve._core import (
    AdapterState,
    AdapterStats,
    ExecutionEvent,
    ExecutionPlan,
    KVEvent,
    NewRequest,
    Scheduler,
    SchedulerCounters,
    SchedulerOptions,
    SchedulerStats,
    plan_layout,
)

__all__ = [
    "AdapterState",
    "AdapterStats",
    "ExecutionEvent",
    "ExecutionPlan",
    "KVEvent",
    "NewRequest",
    "Scheduler",
    "SchedulerCounters",
    "SchedulerOptions",
    "SchedulerStats",
    "plan_layout",
]
