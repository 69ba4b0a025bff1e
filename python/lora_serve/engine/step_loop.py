"""The loop of plans: made, handed to the executor, collected; and what a result means for each request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InternalError, LoraServeError
from lora_serve.engine.adapter_operations import AdapterOperations
from lora_serve.engine.admission import make_queue_timeout
from lora_serve.engine.live_requests import LiveRequest, LiveRequests
from lora_serve.engine.loop_times import LoopTimes
from lora_serve.engine.messages import EngineOutput
from lora_serve.engine.snapshots import describe_plan
from lora_serve.engine.throughput import Throughput
from lora_serve.scheduler import ExecutionEvent, ExecutionPlan, Scheduler

if TYPE_CHECKING:
    from lora_serve.executor.executor import ExecutionResult, Executor


@dataclass(frozen=True)
class PlanInFlight:
    """A plan that was handed to the executor.

    Parameters
    ----------
    plan : ExecutionPlan
        Kept until its result is collected, because the executor reads it.
    rows : list of LiveRequest
        [B], the requests of its rows as they were when it was made. Some may have ended since.
    """

    plan: ExecutionPlan
    rows: list[LiveRequest]


class StepLoop:
    """Makes plans, keeps up to `max_in_flight` of them with the executor, and takes their results.

    With two, plan N+1 is made while N runs: the executor never waits for the scheduler, nor for what the
    engine does with a result. Plan N+1 then has rows of requests whose end is known only with N's result (a
    stop token, an abort, a failed row). Those rows run; what they give is dropped here, an error too. With
    one, a step makes a plan and waits for it.

    Owns the plans in flight, and the memory that their blocks are written into. Results are taken in the
    order of the plans, by the thread that makes them.

    Parameters
    ----------
    scheduler, executor, requests, operations
        What the loop drives.
    emit : callable
        Takes each output for the engine's caller.
    fail_request : callable
        Ends a live request with an error.
    max_in_flight : int
        1 or 2.

    Attributes
    ----------
    num_steps : int
        Plans made and handed to the executor so far.
    num_recomputed_tokens : int
        Tokens whose KV a preemption had taken away and which were computed again.
    is_stalled : bool
        True when the last step could do nothing: there is no work, or all of it waits for reads and copies.
    throughput : Throughput
        Of recent steps.
    times : LoopTimes
        What the loop itself took in recent steps; whoever calls `step` says where a step begins and ends.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        requests: LiveRequests,
        operations: AdapterOperations,
        *,
        emit: Callable[[EngineOutput], None],
        fail_request: Callable[[int, LoraServeError], None],
        max_in_flight: int,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._requests = requests
        self._operations = operations
        self._emit = emit
        self._fail_request = fail_request
        self._max_in_flight = max_in_flight
        self._in_flight: deque[PlanInFlight] = deque()
        # A plan is read until its result is taken: so one block of memory more than plans in flight, in turn.
        block_size = scheduler.plan_block_size
        self._blocks = deque(np.empty(block_size, dtype=np.int32) for _ in range(max_in_flight + 1))
        self.num_steps = 0
        self.num_recomputed_tokens = 0
        self.is_stalled = False
        self.throughput = Throughput()
        self.times = LoopTimes()

    @property
    def num_in_flight(self) -> int:
        """Plans whose results have not been taken."""
        return len(self._in_flight)

    def step(self, now_us: int) -> None:
        """Make one plan, and take the oldest result unless another plan may be made before it.

        Parameters
        ----------
        now_us : int
            The scheduler's clock.
        """
        plan = self._scheduler.next_plan(now_us, self._blocks[0])
        self._expire(plan.expired_request_ids.tolist())
        if not plan.is_empty:
            self._submit(plan, now_us)
        has_result = len(self._in_flight) == self._max_in_flight or (plan.is_empty and self._in_flight)
        self.is_stalled = False
        if has_result:
            self.take_oldest()
        elif plan.is_empty:
            self.is_stalled = not self._take_report()

    def take_oldest(self) -> None:
        """Wait for the result of the oldest plan in flight, and take it."""
        result = self.times.wait_for(self._executor.collect)
        self._advance(self._in_flight.popleft(), result)

    def describe(self) -> str:
        """Give the plans in flight, oldest first, for the log."""
        plans = [describe_plan(in_flight.plan) for in_flight in self._in_flight]
        return "; ".join(plans) if plans else "none is in flight"

    # --- Out ----------------------------------------------------------------------------------------------

    def _submit(self, plan: ExecutionPlan, now_us: int) -> None:
        rows = [self._requests[request_id] for request_id in plan.request_ids.tolist()]
        for live in rows:
            if live.queue_us is None:
                live.queue_us = now_us - live.arrival_us
        if not self._in_flight:
            self.throughput.resume()
        self._in_flight.append(PlanInFlight(plan, rows))
        self._blocks.rotate(-1)
        self._operations.before_plan(plan)
        self._executor.submit(plan, [live.state for live in rows])
        self.num_steps += 1

    def _expire(self, request_ids: list[int]) -> None:
        """Tell the requests that waited too long; the scheduler has forgotten them."""
        for request_id in request_ids:
            live = self._requests.pop(request_id)
            if live is not None:
                num_queued_tokens = self._scheduler.counters().num_queued_tokens
                retry_after_s = self.throughput.seconds_for(num_queued_tokens)
                self._emit(live.make_abort(make_queue_timeout(live.queue_timeout_s, retry_after_s)))

    # --- Back ---------------------------------------------------------------------------------------------

    def _advance(self, in_flight: PlanInFlight, result: ExecutionResult) -> None:
        plan = in_flight.plan
        self.throughput.add(len(plan.token_ids))
        self._operations.before_failed(result.failed_adapter_ids)
        is_finished = self._take_rows(in_flight, result)
        sampled_token_ids = result.sampled_token_ids.copy()
        for row in result.row_errors:  # Aborted by now; the scheduler wants a token and drops it.
            sampled_token_ids[row] = 0 if plan.samples_token[row] else -1
        self._scheduler.advance(
            ExecutionEvent(
                plan_id=plan.plan_id,
                sampled_token_ids=sampled_token_ids,
                is_finished=is_finished,
                loaded_adapter_ids=result.loaded_adapter_ids,
                failed_adapter_ids=list(result.failed_adapter_ids),
                completed_transfer_ids=result.completed_transfer_ids,
                failed_transfer_ids=list(result.failed_transfer_ids),
            )
        )
        self._operations.on_drained(plan.drained_adapter_ids.tolist())
        self._operations.on_loaded(result.loaded_adapter_ids)
        self._operations.on_failed(result.failed_adapter_ids)

    def _take_report(self) -> bool:
        """Take the copies that have ended while there was no plan; False when there are none."""
        result = self._executor.report()
        if not (result.completed_transfer_ids or result.failed_transfer_ids):
            return False
        self._scheduler.advance(
            ExecutionEvent(
                plan_id=result.plan_id,
                completed_transfer_ids=result.completed_transfer_ids,
                failed_transfer_ids=list(result.failed_transfer_ids),
            )
        )
        return True

    def _take_rows(self, in_flight: PlanInFlight, result: ExecutionResult) -> npt.NDArray[np.uint8]:
        """Turn sampled tokens into outputs, end what ends; [B] uint8, 1 = ended by a stop token."""
        plan = in_flight.plan
        is_finished = np.zeros(len(in_flight.rows), dtype=np.uint8)
        samples = plan.samples_token.tolist()
        progress = zip(
            plan.num_cached_tokens.tolist(),
            plan.num_computed_tokens.tolist(),
            plan.num_scheduled_tokens.tolist(),
            strict=True,
        )
        for row, (live, counts) in enumerate(zip(in_flight.rows, progress, strict=True)):
            if live.has_ended:
                continue
            self.num_recomputed_tokens += live.note_scheduled(*counts)
            if row in result.row_errors:
                error = InternalError(f"the request failed: {result.row_errors[row]}")
                self._fail_request(live.request_id, error)
            elif samples[row]:
                output = live.take_token(int(result.sampled_token_ids[row]), result.logprobs[row])
                self._emit(output)
                if output.finish_reason is not None:
                    self._requests.pop(live.request_id)
                    is_finished[row] = output.finish_reason == "stop"
        return is_finished
