"""A few threads that no one owner of jobs can keep from the others."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable


class FairThreads:
    """Runs jobs on a few threads, never two of one owner at a time; owners take turns.

    Jobs that cannot be interrupted keep their own owner waiting, however many there are of them; others wait
    only when as many owners as there are threads have such jobs.

    Owns the threads, which are started as they are needed. They are daemons: a job that takes long does not
    hold up the process's end.

    Parameters
    ----------
    num_threads : int
        Jobs at a time, at least 1.
    name : str
        What the threads are called.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._changed = threading.Condition()
        # Those who have jobs that wait, in the order of their turns.
        self._waiting: OrderedDict[Hashable, OrderedDict[Callable[[], None], None]] = OrderedDict()
        self._busy_owners: set[Hashable] = set()
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def add(self, owner: Hashable, job: Callable[[], None]) -> None:
        """Run a job when its owner's earlier ones have ended.

        Parameters
        ----------
        owner
            Who is kept waiting by it.
        job
            Raises nothing. Hashable, and none that waits for this owner's turn already.
        """
        with self._changed:
            self._waiting.setdefault(owner, OrderedDict())[job] = None
            self._changed.notify()
        if len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def drop(self, owner: Hashable, job: Callable[[], None]) -> None:
        """Forget a job that was added for this owner, unless it has begun."""
        with self._changed:
            jobs = self._waiting.get(owner)
            if jobs is not None and job in jobs:
                del jobs[job]
                if not jobs:
                    del self._waiting[owner]

    def close(self) -> None:
        """Begin no job any more; those that run are not waited for."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (taken := self._take()) is None:
                    self._changed.wait()
                if self._is_closed:
                    return
            assert taken is not None
            owner, job = taken
            try:
                job()
            finally:
                del taken, job  # What they hold is not kept until the next one comes.
                with self._changed:
                    self._busy_owners.discard(owner)
                    self._changed.notify()

    def _take(self) -> tuple[Hashable, Callable[[], None]] | None:
        for owner, jobs in self._waiting.items():
            if owner in self._busy_owners:
                continue
            self._busy_owners.add(owner)
            job, _ = jobs.popitem(last=False)
            self._waiting.move_to_end(owner)
            if not jobs:
                del self._waiting[owner]
            return owner, job
        return None
