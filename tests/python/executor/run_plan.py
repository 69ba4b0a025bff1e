"""Runs one plan on an executor and waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from lora_serve.executor.executor import ExecutionResult, Executor
from lora_serve.executor.sampling_state import SamplingState


def run_plan(executor: Executor, plan, states: Sequence[SamplingState] = ()) -> ExecutionResult:
    """What became of the plan; no other may be on its way."""
    executor.lora.prepare_loads(plan.load_adapter_ids.tolist())
    executor.submit(plan, states)
    return executor.collect()
