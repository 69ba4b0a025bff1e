"""Runs submitted plans one after the other on a thread of its own."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from lora_serve.common.errors import InternalError
from lora_serve.executor.executor import MAX_PLANS_IN_FLIGHT, ExecutionResult
from lora_serve.executor.sampling_state import SamplingState

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

RunPlan = Callable[["ExecutionPlan", Sequence[SamplingState]], ExecutionResult]


class _Outcome:
    """What becomes of one submitted plan; `is_pending` is locked until one of the others is set."""

    def __init__(self) -> None:
        self.is_pending = threading.Lock()
        self.is_pending.acquire()
        self.result: ExecutionResult | None = None
        self.error: BaseException | None = None


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

    Notes
    -----
    Not `concurrent.futures`: its `submit` takes a lock of the whole process, which threads that load adapters
    take, too, and a waiting step would wait for it.
    """

    def __init__(self, run: RunPlan) -> None:
        self._run = run
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._outcomes: deque[_Outcome] = deque()
        self._error: BaseException | None = None
        self._is_closed = False
        # It knows the queue only, and the queue a worker only while a plan is on its way: so a worker that
        # nobody closes can go, and takes its thread along.
        self._thread = threading.Thread(
            target=_run_jobs, args=[self._jobs], name="lora-serve-executor", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._jobs.put, None)

    @property
    def num_in_flight(self) -> int:
        """Plans that were submitted and not collected."""
        return len(self._outcomes)

    def submit(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> None:
        """Let a plan run when the earlier ones have.

        Raises
        ------
        InternalError
            There are MAX_PLANS_IN_FLIGHT already, or the worker is closed.
        """
        if self._is_closed:
            raise InternalError(f"plan {plan.plan_id} was submitted to an executor that is closed")
        if len(self._outcomes) >= MAX_PLANS_IN_FLIGHT:
            raise InternalError(
                f"plan {plan.plan_id} was submitted while {len(self._outcomes)} plans are on their way; "
                "collect the oldest first"
            )
        outcome = _Outcome()
        self._outcomes.append(outcome)
        self._jobs.put(partial(self._run_in_thread, plan, states, outcome))

    def collect(self) -> ExecutionResult:
        """Wait for the oldest plan and give its result. One that is interrupted meanwhile stays collectable.

        Raises
        ------
        InternalError
            No plan is on its way.
        Exception
            What `run` raised, for this plan or an earlier one.
        """
        if not self._outcomes:
            raise InternalError("a result was asked for while no plan is on its way")
        outcome = self._outcomes[0]
        with outcome.is_pending:
            pass
        if outcome.error is not None:
            raise outcome.error
        assert outcome.result is not None
        self._outcomes.popleft()
        return outcome.result

    def close(self) -> None:
        """Wait for the plan that runs and drop the others. Closing twice changes nothing."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join()
        self._outcomes.clear()

    def _run_in_thread(self, plan: ExecutionPlan, states: Sequence[SamplingState], outcome: _Outcome) -> None:
        if self._is_closed:
            return
        try:
            if self._error is None:
                outcome.result = self._run(plan, states)
        except BaseException as error:
            self._error = error
        outcome.error = self._error
        outcome.is_pending.release()


def _run_jobs(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # Or it would be kept until the next one comes.
