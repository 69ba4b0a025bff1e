"""The scheduler and the KV prefix cache of the C++ core.

Everything else takes these names from here. `lora.peft_reader` alone imports the extension as well, for another part.
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
