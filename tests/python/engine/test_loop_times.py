"""What the step loop measures of itself, and that loads do not make it wait."""

import gc
import sys
import threading

import pytest

from lora_serve.engine.engine_process import settle_interpreter
from lora_serve.engine.loop_times import WINDOW_STEPS, LoopTimeQuantiles, LoopTimes
from lora_serve.lora.counted_lock import CountedLock
from lora_serve.lora.host_pool import HostPool

from .core_driver import CoreDriver


class Clock:
    def __init__(self):
        self.now_us = 0

    def __call__(self):
        return 1000 * self.now_us

    def pass_us(self, num_us):
        self.now_us += num_us


def run_step(times, clock, own_us, waited_us):
    with times.step():
        clock.pass_us(own_us)
        times.wait_for(lambda: clock.pass_us(waited_us))


def test_waits_for_the_executor_are_not_the_loops_own_time():
    clock = Clock()
    times = LoopTimes(clock)
    run_step(times, clock, own_us=30, waited_us=8000)
    run_step(times, clock, own_us=50, waited_us=0)
    assert times.recent_us().tolist() == [30, 50]


def test_wait_between_two_steps_counts_for_neither():
    clock = Clock()
    times = LoopTimes(clock)
    times.wait_for(lambda: clock.pass_us(500))
    run_step(times, clock, own_us=30, waited_us=100)
    assert times.recent_us().tolist() == [30]


def test_quantiles_are_of_the_last_steps():
    clock = Clock()
    times = LoopTimes(clock)
    assert times.quantiles() == LoopTimeQuantiles(0, 0, 0)
    run_step(times, clock, own_us=1_000_000, waited_us=0)
    for _ in range(WINDOW_STEPS - 1):
        run_step(times, clock, own_us=20, waited_us=0)
    assert times.quantiles() == LoopTimeQuantiles(20, 20, 1_000_000)
    run_step(times, clock, own_us=70, waited_us=0)
    assert times.quantiles() == LoopTimeQuantiles(20, 20, 70)


def test_wait_that_raises_is_a_wait_all_the_same():
    clock = Clock()
    times = LoopTimes(clock)

    def fail():
        clock.pass_us(400)
        raise ValueError

    with times.step():
        with pytest.raises(ValueError):
            times.wait_for(fail)
        clock.pass_us(5)
    assert times.recent_us().tolist() == [5]


def test_engine_reports_its_loops_times_without_the_executors():
    driver = CoreDriver()
    clock = Clock()
    driver.core.loop_times._clock_ns = clock
    collect = driver.executor.collect

    def slow_collect():
        clock.pass_us(8000)
        return collect()

    driver.executor.collect = slow_collect
    poll = driver.files.poll

    def slow_poll(line):
        clock.pass_us(60)
        return poll(line)

    driver.files.poll = slow_poll
    driver.add()
    driver.run()
    stats = driver.core.stats()
    assert (stats.loop_p50_us, stats.loop_p99_us, stats.loop_max_us) == (60, 60, 60)
    assert stats.total_load_waits == 0


def test_requests_run_to_their_end_while_an_adapter_is_being_read():
    driver = CoreDriver()
    driver.files.hold("/slow")
    load = driver.core.load_adapter("slow", "/slow")
    request = driver.add()
    driver.step_until(lambda: request in driver.finish)
    assert not load.done()
    driver.files.release("/slow")
    driver.wait_for(load)


# --- Locks that threads which load share with the loop -----------------------------------------------------


class WatchedLock:
    """A lock of which a test knows who waits for it."""

    def __init__(self, lock):
        self._lock = lock
        self.release = lock.release
        self.waiting = threading.Semaphore(0)

    def acquire(self, blocking=True):
        if self._lock.acquire(blocking=False):
            return True
        if blocking:
            self.waiting.release()
            return self._lock.acquire()
        return False

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *error):
        self.release()

    def wait_for_waiters(self, number):
        for _ in range(number):
            assert self.waiting.acquire(timeout=60)


def in_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_lock_that_is_taken_is_counted_as_one_wait():
    lock = WatchedLock(threading.Lock())
    counted = CountedLock(lock)
    with counted:
        pass
    assert counted.num_waits == 0

    def take():
        with counted:
            pass

    lock.acquire()
    thread = in_thread(take)
    lock.wait_for_waiters(1)
    lock.release()
    thread.join()
    assert counted.num_waits == 1


def test_pool_counts_waits_of_all_calls_but_reserve():
    pool = HostPool(1024, is_pinned=False)
    block = pool.reserve(1024, lambda: False)
    lock = pool._changed._lock = pool._between_steps._lock = WatchedLock(pool._between_steps._lock)
    lock.acquire()
    threads = [
        in_thread(lambda: pool.lease(1)),
        in_thread(block.release),
        in_thread(lambda: pool.reserve(256, lambda: False).release),
    ]
    lock.wait_for_waiters(len(threads))
    lock.release()
    for thread in threads:
        thread.join()
    assert pool.num_lock_waits == 2


def test_loop_looks_at_the_pool_in_each_step_without_its_lock():
    pool = HostPool(1024, is_pinned=False)
    with pool._changed:
        assert pool.make_room() == []
        assert not pool.contains(1)


# --- Cores and the interpreter ------------------------------------------------------------------------------


def test_settled_interpreter_never_collects_everything_by_itself_and_switches_soon():
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    try:
        settle_interpreter()
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold()[:2] == threshold[:2]
        assert gc.get_threshold()[2] > 10**9
        assert sys.getswitchinterval() <= 1e-3
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
