"""Drives an executor by the real scheduler, without an engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_serve.executor.executor import ExecutionResult, Executor
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.scheduler import ExecutionEvent, ExecutionPlan, NewRequest, Scheduler, SchedulerOptions


class SchedulerRun:
    """The engine's loop without its outputs. Finished requests stay in `states` with their tokens."""

    def __init__(self, executor: Executor, **options) -> None:
        self.executor = executor
        self.scheduler = Scheduler(
            SchedulerOptions(
                num_device_pages=executor.num_device_pages,
                num_host_pages=executor.num_host_pages,
                max_model_len=executor.max_model_len,
                **options,
            )
        )
        self.states: dict[int, SamplingState] = {}
        self.num_cached_tokens: dict[int, int] = {}
        self.drained: list[int] = []
        self.on_plan: Callable[[ExecutionPlan], None] = lambda plan: None
        self.now_us = 0

    def add(
        self, request_id: int, state: SamplingState, max_tokens: int, adapter_id: int = 0
    ) -> SamplingState:
        self.scheduler.add_request(
            NewRequest(
                request_id=request_id,
                adapter_id=adapter_id,
                prompt_token_ids=state.prompt_token_ids,
                max_tokens=max_tokens,
                reuse_prefix=state.prompt_logprobs is None,
            )
        )
        self.states[request_id] = state
        return state

    def step(self) -> ExecutionResult | None:
        """Run one plan; None when there was nothing to do."""
        self.now_us += 1000
        plan = self.scheduler.next_plan(self.now_us)
        self.scheduler.check_invariants()
        if plan.is_empty:
            return None
        self.on_plan(plan)
        request_ids = plan.request_ids.tolist()
        for request_id, num_cached in zip(request_ids, plan.num_cached_tokens.tolist(), strict=True):
            self.num_cached_tokens.setdefault(request_id, num_cached)
        result = self.executor.execute(plan, [self.states[request_id] for request_id in request_ids])
        assert result.row_errors == {}
        self.scheduler.advance(
            ExecutionEvent(
                plan_id=result.plan_id,
                sampled_token_ids=result.sampled_token_ids,
                is_finished=np.zeros(len(request_ids), dtype=np.uint8),
                loaded_adapter_ids=result.loaded_adapter_ids,
                failed_adapter_ids=list(result.failed_adapter_ids),
                completed_transfer_ids=result.completed_transfer_ids,
                failed_transfer_ids=list(result.failed_transfer_ids),
            )
        )
        self.drained += plan.drained_adapter_ids.tolist()
        self.scheduler.check_invariants()
        return result

    def finish(self, max_steps: int = 10_000) -> None:
        """Step until no work is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps: {self.scheduler.stats()}")
