"""Threads that read adapters from file systems, of which any may hang."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from lora_serve.common.errors import InternalError

SLOW_CALL_S = 5.0
"""Seconds after which a call does not count any more among those that run at once."""
MOST_THREADS = 64

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class _Call(Generic[_Result]):
    """A call, and where its result goes."""

    call: Callable[[], _Result]
    future: Future[_Result]


class LoaderThreads:
    """Runs so many calls at once, in their order; a call that hangs makes room for the next one.

    Disks gain little from many reads at once, so few run. But a call that has been running for `SLOW_CALL_S`
    is taken to wait for a file system that does not answer, and does not count: it holds up nobody else.
    At most `MOST_THREADS` run with such ones. Each has a thread of its own, a daemon: the process's end does
    not wait for it.

    Owns: the threads, the calls that wait. Thread-safe.

    Parameters
    ----------
    num_at_once
        Calls that run at once, but for slow ones.
    name
        Of the threads.
    """

    def __init__(self, num_at_once: int, name: str) -> None:
        self._num_at_once = num_at_once
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[_Call[Any]] = deque()
        self._begun_at: dict[_Call[Any], float] = {}
        self._timer: threading.Timer | None = None
        self._is_closed = False

    def has_room(self) -> bool:
        """Whether a call would begin at once."""
        with self._lock:
            return not self._waiting and self._can_begin(time.monotonic())

    def submit(
        self,
        call: Callable[_Arguments, _Result],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> Future[_Result]:
        """Run a call when it is its turn.

        Returns
        -------
        Future
            Of its result. Cancelling it before the call has begun takes the call out of the line.

        Raises
        ------
        InternalError
            The threads are closed.
        """
        one = _Call(lambda: call(*arguments, **options), Future[_Result]())
        with self._lock:
            if self._is_closed:
                raise InternalError("a call is submitted to loader threads that are closed")
            self._waiting.append(one)
            self._begin_calls()
        return one.future

    def close(self) -> None:
        """Cancel the calls that wait; those that run are not waited for. Twice changes nothing."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
            if self._timer is not None:
                self._timer.cancel()
        for one in waiting:
            one.future.cancel()

    def _can_begin(self, now: float) -> bool:
        num_brisk = sum(now - begun_at < SLOW_CALL_S for begun_at in self._begun_at.values())
        return num_brisk < self._num_at_once and len(self._begun_at) < MOST_THREADS

    def _begin_calls(self) -> None:
        """Requires the lock."""
        now = time.monotonic()
        while self._waiting and self._can_begin(now):
            one = self._waiting.popleft()
            if one.future.set_running_or_notify_cancel():
                self._begun_at[one] = now
                threading.Thread(target=self._run, args=[one], name=self._name, daemon=True).start()
        if self._waiting and self._timer is None:
            self._timer = threading.Timer(SLOW_CALL_S, self._on_time)
            self._timer.daemon = True
            self._timer.start()

    def _on_time(self) -> None:
        with self._lock:
            self._timer = None
            if not self._is_closed:
                self._begin_calls()

    def _run(self, one: _Call[Any]) -> None:
        try:
            result = one.call()
        except BaseException as error:
            self._end(one)
            one.future.set_exception(error)
        else:
            self._end(one)
            one.future.set_result(result)

    def _end(self, one: _Call[Any]) -> None:
        with self._lock:
            del self._begun_at[one]
            if not self._is_closed:
                self._begin_calls()
