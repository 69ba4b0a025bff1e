from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from lora_serve.common.errors import InternalError
from lora_serve.lora import loader_threads
from lora_serve.lora.loader_threads import LoaderThreads

TIMEOUT_S = 30
NEVER_S = 1e6


class Calls:
    """Calls that say when they begin, and wait until they are let go."""

    def __init__(self):
        self.begun = []
        self._changed = threading.Condition()
        self._may_end = set()

    def __call__(self, number):
        with self._changed:
            self.begun.append(number)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: number in self._may_end, TIMEOUT_S)
        return 10 * number

    def wait_for(self, *numbers):
        with self._changed:
            assert self._changed.wait_for(lambda: set(numbers).issubset(self.begun), TIMEOUT_S)

    def let_go(self, *numbers):
        with self._changed:
            self._may_end.update(numbers)
            self._changed.notify_all()


@pytest.fixture
def calls():
    calls = Calls()
    yield calls
    calls.let_go(*range(100))


@pytest.fixture
def threads():
    threads = LoaderThreads(2, "test")
    yield threads
    threads.close()


def test_so_many_calls_run_at_once_in_their_order(threads, calls, monkeypatch):
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", NEVER_S)
    assert threads.has_room()
    futures = [threads.submit(calls, number) for number in range(5)]
    calls.wait_for(0, 1)
    assert not threads.has_room()
    calls.let_go(1)
    calls.wait_for(2)
    assert sorted(calls.begun) == [0, 1, 2]
    calls.let_go(0, 2, 3, 4)
    assert [future.result(TIMEOUT_S) for future in futures] == [0, 10, 20, 30, 40]
    assert calls.begun[2] == 2


def test_calls_that_hang_make_room_for_others_when_their_time_is_over(threads, calls, monkeypatch):
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", 0.05)
    futures = [threads.submit(calls, number) for number in range(7)]
    calls.wait_for(*range(7))
    assert not any(future.done() for future in futures)
    calls.let_go(6)
    assert futures[6].result(TIMEOUT_S) == 60


def test_there_are_so_many_threads_and_no_more(threads, calls, monkeypatch):
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", 0.0)
    monkeypatch.setattr(loader_threads, "MOST_THREADS", 3)
    for number in range(4):
        threads.submit(calls, number)
    calls.wait_for(0, 1, 2)
    assert not threads.has_room()
    assert sorted(calls.begun) == [0, 1, 2]
    calls.let_go(1)
    calls.wait_for(3)


def test_error_of_a_call_comes_through_its_future_and_the_next_one_begins(threads, calls, monkeypatch):
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", NEVER_S)

    def fail():
        raise ValueError("no")

    failing = [threads.submit(fail) for _ in range(5)]
    assert threads.submit(lambda *, number: number, number=7).result(TIMEOUT_S) == 7
    for future in failing:
        with pytest.raises(ValueError, match="no"):
            future.result(TIMEOUT_S)


def test_cancelled_call_that_waits_never_begins(threads, calls, monkeypatch):
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", NEVER_S)
    futures = [threads.submit(calls, number) for number in range(4)]
    calls.wait_for(0, 1)
    assert futures[2].cancel()
    assert not futures[1].cancel()
    calls.let_go(0, 1, 3)
    assert futures[3].result(TIMEOUT_S) == 30
    assert 2 not in calls.begun


def test_end_cancels_what_waits_and_leaves_what_runs(calls, monkeypatch):
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", NEVER_S)
    threads = LoaderThreads(1, "test")
    first, second = threads.submit(calls, 1), threads.submit(calls, 2)
    calls.wait_for(1)
    threads.close()
    threads.close()
    assert second.cancelled()
    with pytest.raises(InternalError, match="closed"):
        threads.submit(calls, 3)
    calls.let_go(1)
    assert first.result(TIMEOUT_S) == 10
    assert calls.begun == [1]


def test_a_call_that_hangs_does_not_keep_the_process_from_its_end():
    program = """
import threading
from lora_serve.lora.loader_threads import LoaderThreads
begun = threading.Event()
LoaderThreads(1, "test").submit(lambda: (begun.set(), threading.Event().wait()))
assert begun.wait(30)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
