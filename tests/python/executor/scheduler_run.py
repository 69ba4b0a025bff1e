"""Drives an executor by the real scheduler, without an engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lora_serve.executor.executor import ExecutionResult, Executor
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.scheduler import ExecutionEvent, ExecutionPlan, NewRequest, Scheduler, SchedulerOptions


class SchedulerRun:
    """The engine's loop without its outputs. Finished requests stay in `states` with their tokens.

    With `max_in_flight` 2 each plan but the first is made while the one before is on its way. `outputs` has
    the tokens that were taken: none after a request's end, though `states` may have one more. A request ends
    by itself at `max_tokens`, or where `stop_after` says so.
    """

    def __init__(self, executor: Executor, *, max_in_flight: int = 1, **options) -> None:
        self.executor = executor
        self.max_in_flight = max_in_flight
        self.in_flight: deque[ExecutionPlan] = deque()
        self.scheduler = Scheduler(
            SchedulerOptions(
                num_device_pages=executor.num_device_pages,
                num_host_pages=executor.num_host_pages,
                max_model_len=executor.max_model_len,
                loads_staged_only=True,
                **options,
            )
        )
        self.states: dict[int, SamplingState] = {}
        self.outputs: dict[int, list[int]] = {}
        self.stop_after: dict[int, int] = {}
        self.ended: set[int] = set()
        self.num_cached_tokens: dict[int, int] = {}
        self.drained: list[int] = []
        self.expired: list[int] = []
        self.before_poll: Callable[[], None] = lambda: None
        self.on_plan: Callable[[ExecutionPlan], None] = lambda plan: None
        self.before_failed: Callable[[list[int]], None] = lambda adapter_ids: None
        self.now_us = 0
        self._max_tokens: dict[int, int] = {}

    def add(
        self, request_id: int, state: SamplingState, max_tokens: int, adapter_id: int = 0, **fields
    ) -> SamplingState:
        self.scheduler.add_request(
            NewRequest(
                request_id=request_id,
                adapter_id=adapter_id,
                prompt_token_ids=state.prompt_token_ids,
                max_tokens=max_tokens,
                reuse_prefix=state.prompt_logprobs is None,
                **fields,
            )
        )
        self.states[request_id] = state
        self.outputs[request_id] = []
        self._max_tokens[request_id] = max_tokens
        return state

    def abort(self, request_id: int) -> bool:
        """End a request; nothing is taken for it any more."""
        is_live = self.scheduler.abort(request_id)
        assert is_live == (request_id not in self.ended)
        self.ended.add(request_id)
        return is_live

    def step(self) -> ExecutionResult | None:
        """Make one plan and give what became of the oldest; None when there was nothing to do or to take."""
        self.now_us += 1000
        self._poll()
        plan = self.scheduler.next_plan(self.now_us)
        self.scheduler.check_invariants()
        self.expired += plan.expired_request_ids.tolist()
        self.ended.update(plan.expired_request_ids.tolist())
        if not plan.is_empty:
            self._submit(plan)
        if len(self.in_flight) == self.max_in_flight or (plan.is_empty and self.in_flight):
            return self._take_oldest()
        return self.report() if plan.is_empty else None

    def report(self) -> ExecutionResult | None:
        """Report copies that end now, without a plan; None when there are none."""
        result = self.executor.report()
        reports = {
            "completed_transfer_ids": result.completed_transfer_ids,
            "failed_transfer_ids": list(result.failed_transfer_ids),
        }
        if not any(reports.values()):
            return None
        self.scheduler.advance(ExecutionEvent(plan_id=result.plan_id, **reports))
        self.scheduler.check_invariants()
        return result

    def _poll(self) -> None:
        """Tell the scheduler which adapters are on the host now, and which are not any more."""
        self.before_poll()
        news = self.executor.lora.poll(self.scheduler)
        assert news.failed == {}
        for adapter_id in news.evicted:
            self.scheduler.set_adapter_staged(adapter_id, False)
        for adapter_id in news.arrived:
            self.scheduler.set_adapter_staged(adapter_id, True)

    def _submit(self, plan: ExecutionPlan) -> None:
        self.on_plan(plan)
        request_ids = plan.request_ids.tolist()
        for request_id, num_cached in zip(request_ids, plan.num_cached_tokens.tolist(), strict=True):
            self.num_cached_tokens.setdefault(request_id, num_cached)
        self.in_flight.append(plan)
        self.executor.lora.prepare_loads(plan.load_adapter_ids.tolist())
        self.executor.submit(plan, [self.states[request_id] for request_id in request_ids])

    def _take_oldest(self) -> ExecutionResult:
        result = self.executor.collect()
        plan = self.in_flight.popleft()
        self.before_failed(list(result.failed_adapter_ids))
        sampled_token_ids = result.sampled_token_ids.copy()
        for row in result.row_errors:
            assert int(plan.request_ids[row]) in self.ended, result.row_errors
            sampled_token_ids[row] = 0 if plan.samples_token[row] else -1
        self.scheduler.advance(
            ExecutionEvent(
                plan_id=result.plan_id,
                sampled_token_ids=sampled_token_ids,
                is_finished=[
                    self._take_token(request_id, token)
                    for request_id, token in zip(
                        plan.request_ids.tolist(), result.sampled_token_ids.tolist(), strict=True
                    )
                ],
                loaded_adapter_ids=result.loaded_adapter_ids,
                failed_adapter_ids=list(result.failed_adapter_ids),
                completed_transfer_ids=result.completed_transfer_ids,
                failed_transfer_ids=list(result.failed_transfer_ids),
            )
        )
        self.drained += plan.drained_adapter_ids.tolist()
        self.scheduler.check_invariants()
        return result

    def _take_token(self, request_id: int, token: int) -> bool:
        """Take what a row sampled; True when the request stops there."""
        if token < 0 or request_id in self.ended:
            return False
        output = self.outputs[request_id]
        output.append(token)
        is_stop = len(output) == self.stop_after.get(request_id)
        if is_stop or len(output) == self._max_tokens[request_id]:
            self.ended.add(request_id)
        return is_stop

    def finish(self, max_steps: int = 10_000) -> None:
        """Step until no work is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            if self.step() is None and not self.in_flight:
                time.sleep(0.005)  # An adapter is being read.
        raise AssertionError(f"work is left after {max_steps} steps: {self.scheduler.stats()}")
