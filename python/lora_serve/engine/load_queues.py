"""Loads on their way, in the order in which each name works them off."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_serve.common.errors import LoraServeError
from lora_serve.engine.messages import LoadAdapterResult
from lora_serve.lora.adapter_reader import release_unwanted

if TYPE_CHECKING:
    from lora_serve.lora.adapter_reader import HostAdapter
    from lora_serve.lora.registry import AdapterGeneration


@dataclass
class PendingLoad:
    """One load on its way.

    Parameters
    ----------
    name, path, load_inplace, pinned, weight
        As asked for.
    callers : list of Future
        Who waits; several when callers asked the same before its read began.
    read : Future or None
        Set while the files are read, and until the step loop has taken the result up.
    is_cancelled : threading.Event
        Set when nobody waits for the read any more.
    generation : AdapterGeneration or None
        Set while it is brought to the device for the first time.
    """

    name: str
    path: str
    load_inplace: bool
    pinned: bool
    weight: float
    callers: list[Future[LoadAdapterResult]] = field(default_factory=list)
    read: Future[HostAdapter] | None = None
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    generation: AdapterGeneration | None = None

    def asks_the_same(self, other: PendingLoad) -> bool:
        """True when one load can answer both."""
        ours = (self.name, self.path, self.load_inplace, self.pinned, self.weight)
        return ours == (other.name, other.path, other.load_inplace, other.pinned, other.weight)

    def drop_read(self) -> None:
        """End its read soon, if one is under way, and free what it gives."""
        self.is_cancelled.set()
        if self.read is not None and not self.read.cancel():
            self.read.add_done_callback(release_unwanted)

    def answer(self, outcome: LoadAdapterResult | LoraServeError) -> None:
        """Tell everybody who waits."""
        for caller in self.callers:
            if isinstance(outcome, LoraServeError):
                caller.set_exception(outcome)
            else:
                caller.set_result(outcome)


class LoadQueues:
    """Loads on their way: one queue a name, of which only the first load is being worked on.

    Invariant: no queue is empty.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[PendingLoad]] = {}

    @property
    def heads(self) -> list[PendingLoad]:
        """The loads that are being worked on, one a name."""
        return [queue[0] for queue in self._queues.values()]

    def add(self, load: PendingLoad) -> bool:
        """Queue a load, or let its callers join the last one of its name if that asks the same and waits.

        The first load of a name is never joined: its read has begun, so it may have seen files that were
        replaced before this call. A load that waits reads later than every caller who joined it.

        Returns
        -------
        bool
            True when the load is the first of its name and must be begun.
        """
        queue = self._queues.setdefault(load.name, deque())
        if len(queue) > 1 and queue[-1].asks_the_same(load):
            queue[-1].callers += load.callers
            return False
        queue.append(load)
        return len(queue) == 1

    def find(self, adapter_id: int) -> PendingLoad | None:
        """Give the load that brings this generation to the device; None when it was cancelled, or is over."""
        for load in self.heads:
            if load.generation is not None and load.generation.adapter_id == adapter_id:
                return load
        return None

    def pop_head(self, name: str) -> PendingLoad | None:
        """Take the first load of a name off; give the next one of the name, which must be begun."""
        queue = self._queues[name]
        queue.popleft()
        if queue:
            return queue[0]
        del self._queues[name]
        return None

    def pop_all(self, name: str) -> list[PendingLoad]:
        """Take all loads of a name off."""
        return list(self._queues.pop(name, ()))

    def clear(self) -> list[PendingLoad]:
        """Take all loads off."""
        loads = [load for queue in self._queues.values() for load in queue]
        self._queues.clear()
        return loads
