"""What all clients of the fuzz have seen, and the checks that need all of it."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from support.life_cycle.catalogue import Catalogue, Content, Name
from support.life_cycle.history import FOREVER, Call, NameHistory


@dataclass(frozen=True)
class Listed:
    """One list of all generations, as GET /v1/loras gave it."""

    begin: float
    end: float
    pinned: dict[int, bool]


@dataclass
class World:
    """Shared by the clients. Whatever they add, they add under the lock.

    Parameters
    ----------
    catalogue
        The adapters.
    device_bytes
        What the server may keep on the device.
    looks_at_ids
        False: a generation may change its content, so that a fault which does that is found by its answers.
    """

    catalogue: Catalogue
    device_bytes: int
    looks_at_ids: bool = True
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    label_of_digest: dict[str, str] = field(default_factory=dict)
    content_of: dict[int, str] = field(default_factory=dict)
    num_bytes_of: dict[str, int] = field(default_factory=dict)
    newest_seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    forced: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    aborted: list[Call] = field(default_factory=list)
    aborted_names: list[str] = field(default_factory=list)
    lists: list[Listed] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.names = {name.name: name for name in self.catalogue.names}
        self.contents = {content.label: content for name in self.catalogue.names for content in name.contents}
        self.started = time.monotonic()

    def fail(self, problem: str) -> None:
        """Note a problem, and end the run."""
        with self.lock:
            self.problems.append(problem)
        self.stop.set()

    def add(self, name: str, call: Call) -> None:
        """Note a call and its answer."""
        with self.lock:
            self.calls[name].append(call)
            self.counts[call.kind] += 1
            if call.adapter_id is not None:
                self.newest_seen[name] = max(self.newest_seen[name], call.adapter_id)

    def content(self, name: str, adapter_id: int, digest: str) -> Content | None:
        """The content that a generation has shown; None, and a problem, where it cannot have it."""
        with self.lock:
            label = self.label_of_digest.get(digest[:8])
            known = self.content_of.setdefault(adapter_id, label or "") if self.looks_at_ids else label
        if label is None or known != label or not label.startswith(f"{name}-"):
            self.fail(f"generation {adapter_id} of {name} has digest {digest}: {label}, but had {known}")
            return None
        return self.contents[label]

    # --- Afterwards ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Note a problem for each name whose history is impossible, and for each unfounded refusal."""
        pins = self._pins()
        for name, calls in self.calls.items():
            spans = [(begin, end) for begin, end, _ in self.names[name].writes]
            problem = NameHistory(calls, self.content_of, spans).find_problem()
            if problem is not None:
                self.fail(f"{name}: {problem}")
            for call in calls:
                if call.kind == "refused" and not self._may_refuse(self.names[name], call, pins):
                    self.fail(f"{name}: refused although the pinned adapters leave room: {call}")
        for name, call in zip(self.aborted_names, self.aborted, strict=True):
            if not any(begin < call.end and call.begin < end for begin, end in self.forced[name]):
                self.fail(f"{name}: a request was aborted, but nobody forced an unload: {call}")

    def _pins(self) -> list[tuple[float, float, int]]:
        """When something may have been pinned, and its bytes."""
        pins = []
        for name, calls in self.calls.items():
            sizes = [self.num_bytes_of[content.label] for content in self.names[name].contents]
            for load in calls:
                if load.kind in ("loaded", "already") and load.pinned:
                    assert load.adapter_id is not None
                    label = self.content_of.get(load.adapter_id)
                    num_bytes = self.num_bytes_of[label] if label else max(sizes)
                    pins.append((load.begin, self._pinned_until(calls, load), num_bytes))
        return pins

    def _may_refuse(self, name: Name, call: Call, pins: list[tuple[float, float, int]]) -> bool:
        """Whether the largest adapter might not fit beside those that may have been pinned meanwhile."""
        own = max(self.num_bytes_of[content.label] for content in name.contents)
        pinned = own if call.pinned else 0
        pinned += sum(num_bytes for begin, end, num_bytes in pins if begin < call.end and call.begin < end)
        return pinned + max(self.num_bytes_of.values()) > self.device_bytes

    def _pinned_until(self, calls: list[Call], load: Call) -> float:
        """The first moment at which what a load has pinned is surely not pinned any more."""
        assert load.adapter_id is not None
        ends = [
            later.end
            for later in calls
            if later.begin > load.end
            and (
                later.kind == "unloaded"
                or (later.kind == "already" and not later.pinned)
                or (later.kind == "listed" and later.adapter_id == load.adapter_id and not later.pinned)
            )
        ]
        lists = [
            shown.end
            for shown in self.lists
            if shown.begin > load.end and not shown.pinned.get(load.adapter_id, False)
        ]
        return min([*ends, *lists], default=FOREVER)

    def describe(self) -> dict[str, Any]:
        """Counts of what was met."""
        return dict(sorted(self.counts.items()))
