from __future__ import annotations

import gc
import signal
import threading
import weakref

import pytest

from lora_serve.common.errors import InternalError
from lora_serve.executor.plan_worker import PlanWorker

from .plans import PlanStandIn


class Gate:
    """A `run` that waits for the test at every plan, and notes what runs."""

    def __init__(self):
        self.ran = []
        self.failing = set()
        self.has_begun = threading.Event()
        self._may_go_on = threading.Semaphore(0)

    def __call__(self, plan, states):
        self.has_begun.set()
        assert self._may_go_on.acquire(timeout=60)
        self.ran.append((plan.plan_id, threading.current_thread()))
        if plan.plan_id in self.failing:
            raise ValueError(f"plan {plan.plan_id} broke")
        return plan.plan_id

    def open(self, num_plans=1):
        self._may_go_on.release(num_plans)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def worker(gate):
    worker = PlanWorker(gate)
    yield worker
    gate.open(10)
    worker.close()


def test_results_come_in_the_order_of_the_plans_from_one_other_thread(worker, gate):
    collected = []
    for plan_id in range(6):
        worker.submit(PlanStandIn(plan_id=plan_id), [])
        if worker.num_in_flight == 2:
            gate.open()
            collected.append(worker.collect())
    gate.open()
    collected.append(worker.collect())

    assert collected == [plan_id for plan_id, _ in gate.ran] == list(range(6))
    assert len({thread for _, thread in gate.ran} | {threading.current_thread()}) == 2
    assert worker.num_in_flight == 0


def test_submit_returns_before_the_plan_runs(worker, gate):
    worker.submit(PlanStandIn(plan_id=1), [])
    worker.submit(PlanStandIn(plan_id=2), [])
    assert gate.ran == []


def test_third_plan_in_flight_is_an_internal_error(worker, gate):
    worker.submit(PlanStandIn(plan_id=1), [])
    worker.submit(PlanStandIn(plan_id=2), [])
    with pytest.raises(InternalError, match="plan 3 was submitted while 2 plans are on their way"):
        worker.submit(PlanStandIn(plan_id=3), [])
    gate.open(2)
    assert [worker.collect(), worker.collect()] == [1, 2]


def test_collecting_nothing_is_an_internal_error(worker):
    with pytest.raises(InternalError, match="no plan is on its way"):
        worker.collect()


def test_exception_comes_out_of_collect_and_plans_after_it_do_not_run(worker, gate):
    gate.failing = {2}
    gate.open(9)
    worker.submit(PlanStandIn(plan_id=1), [])
    worker.submit(PlanStandIn(plan_id=2), [])
    assert worker.collect() == 1
    worker.submit(PlanStandIn(plan_id=3), [])
    for _ in range(3):
        with pytest.raises(ValueError, match="plan 2 broke"):
            worker.collect()
    assert [plan_id for plan_id, _ in gate.ran] == [1, 2]


def test_interrupted_collect_can_be_repeated(worker, gate):
    worker.submit(PlanStandIn(plan_id=1), [])
    interrupt = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])

    def collect():
        interrupt.start()
        worker.collect()

    with pytest.raises(KeyboardInterrupt):
        collect()
    gate.open()
    assert worker.collect() == 1


def test_worker_that_nobody_closes_goes_with_its_thread_and_what_it_ran():
    class Owner:
        def __init__(self):
            self.worker = PlanWorker(self.run)

        def run(self, plan, states):
            return plan.plan_id

    owner = Owner()
    owner.worker.submit(PlanStandIn(plan_id=1), [])
    assert owner.worker.collect() == 1
    thread, gone = owner.worker._thread, weakref.ref(owner)
    del owner
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert gone() is None


def test_close_waits_for_the_plan_that_runs_and_drops_the_others(gate):
    worker = PlanWorker(gate)
    worker.submit(PlanStandIn(plan_id=1), [])
    worker.submit(PlanStandIn(plan_id=2), [])
    assert gate.has_begun.wait(60)
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.open(1)
    closing.join(60)
    assert not closing.is_alive()
    worker.close()
    assert [plan_id for plan_id, _ in gate.ran] == [1]
    with pytest.raises(InternalError, match="closed"):
        worker.submit(PlanStandIn(plan_id=3), [])
