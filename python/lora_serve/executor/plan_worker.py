"""Runs submitted plans one after the other on a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from lora_serve.common.errors import InternalError
from lora_serve.executor.executor import MAX_PLANS_IN_FLIGHT, ExecutionResult
from lora_serve.executor.sampling_state import SamplingState

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

RunPlan = Callable[["ExecutionPlan", Sequence[SamplingState]], ExecutionResult]


class PlanWorker:
    """Runs submitted plans one after the other on a thread of its own; results come in the same order.

    Owns: the thread, and the results that nobody has collected. Everything that `run` touches belongs to that
    thread as long as a plan is on its way. One other thread calls the methods.

    An exception of `run` is raised by the `collect` of its plan, and by every later one: plans that follow it
    are not run.

    Parameters
    ----------
    run : callable
        Takes a plan and its states, gives the result.
    """

    def __init__(self, run: RunPlan) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lora-serve-executor")
        self._results: deque[Future[ExecutionResult]] = deque()
        self._error: BaseException | None = None
        self._is_closed = False

    @property
    def num_in_flight(self) -> int:
        """Plans that were submitted and not collected."""
        return len(self._results)

    def submit(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> None:
        """Let a plan run when the earlier ones have.

        Raises
        ------
        InternalError
            There are MAX_PLANS_IN_FLIGHT already, or the worker is closed.
        """
        if self._is_closed:
            raise InternalError(f"plan {plan.plan_id} was submitted to an executor that is closed")
        if len(self._results) >= MAX_PLANS_IN_FLIGHT:
            raise InternalError(
                f"plan {plan.plan_id} was submitted while {len(self._results)} plans are on their way; "
                "collect the oldest first"
            )
        self._results.append(self._thread.submit(self._run_in_thread, plan, states))

    def collect(self) -> ExecutionResult:
        """Wait for the oldest plan and give its result. One that is interrupted meanwhile stays collectable.

        Raises
        ------
        InternalError
            No plan is on its way.
        Exception
            What `run` raised, for this plan or an earlier one.
        """
        if not self._results:
            raise InternalError("a result was asked for while no plan is on its way")
        result = self._results[0].result()
        self._results.popleft()
        return result

    def close(self) -> None:
        """Wait for the plan that runs and drop the others. Closing twice changes nothing."""
        self._is_closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._results.clear()

    def _run_in_thread(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> ExecutionResult:
        if self._error is not None:
            raise self._error
        try:
            return self._run(plan, states)
        except BaseException as error:
            self._error = error
            raise
