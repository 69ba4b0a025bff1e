"""Requests that came before their grammar was compiled."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lora_serve.engine import wire
from lora_serve.engine.status import EngineStats


@dataclass(frozen=True, eq=False)
class HeldMessage:
    """A message that waits for grammars.

    Parameters
    ----------
    message : wire.AddRequests
        As it came.
    waits_for : sequence of Future
        Grammars under way.
    arrival_us : int
        When it came, on the scheduler's clock.
    """

    message: wire.AddRequests
    waits_for: Sequence[Future[Any]]
    arrival_us: int

    @property
    def deadline_us(self) -> int | None:
        """When its requests fail; None = they wait as long as they must. The answers of a prompt share it."""
        timeout_s = self.message.requests[0].queue_timeout_s
        return None if timeout_s is None else self.arrival_us + round(timeout_s * 1_000_000)


@dataclass
class HeldCounts:
    """How much is held.

    Parameters
    ----------
    num_requests, num_tokens : int
        Requests, and the tokens of their prompts.
    num_requests_by_name : Counter
        Requests by the adapter's name; None is the base model.
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_requests_by_name: Counter[str | None] = field(default_factory=Counter)

    def add(self, message: wire.AddRequests, sign: int = 1) -> None:
        """Count a message in, or out with a sign of -1. Its requests name one adapter."""
        num_requests, name = sign * len(message.requests), message.requests[0].lora_name
        self.num_requests += num_requests
        self.num_tokens += sign * sum(len(request.prompt_token_ids) for request in message.requests)
        self.num_requests_by_name[name] += num_requests
        if self.num_requests_by_name[name] == 0:
            del self.num_requests_by_name[name]


class WaitingForGrammars:
    """Holds requests until their grammars are there, or are known to be wrong; others pass them meanwhile.

    A grammar that nobody here waits for any more is not compiled, unless that has begun. However many are
    held, a call costs as much as what it takes, gives or ends.

    Parameters
    ----------
    wake : callable
        Called, in any thread, when `take_ready` may have something to give.

    Attributes
    ----------
    counts : HeldCounts
        How much is held now.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.counts = HeldCounts()
        self._by_call: dict[int, HeldMessage] = {}
        self._by_request: dict[int, HeldMessage] = {}
        # Who waits for each grammar under way, by call. Empty where one has begun and nobody wants it now.
        self._by_grammar: dict[Future[Any], dict[int, HeldMessage]] = {}
        self._finished: deque[Future[Any]] = deque()  # Filled by the threads that compile.
        # A heap of deadlines and calls, some of which may not be held any more.
        self._deadlines: list[tuple[int, int]] = []

    @property
    def next_deadline_us(self) -> int | None:
        """Before this `take_expired` has nothing to give; None = never, as far as known."""
        return self._deadlines[0][0] if self._deadlines else None

    def count_in(self, stats: EngineStats) -> EngineStats:
        """Give the engine's counts with those that are held among its waiting requests."""
        return msgspec.structs.replace(
            stats,
            num_waiting_requests=stats.num_waiting_requests + self.counts.num_requests,
            num_queued_requests=stats.num_queued_requests + self.counts.num_requests,
            num_queued_tokens=stats.num_queued_tokens + self.counts.num_tokens,
        )

    def add(self, message: wire.AddRequests, waits_for: Sequence[Future[Any]], arrival_us: int) -> None:
        """Hold a message, whose call is not held, until all of these are done."""
        held = HeldMessage(message, waits_for, arrival_us)
        self.counts.add(message)
        self._by_call[message.call_id] = held
        for request in message.requests:
            self._by_request[request.request_id] = held
        if held.deadline_us is not None:
            heapq.heappush(self._deadlines, (held.deadline_us, message.call_id))
        for future in waits_for:
            is_new = future not in self._by_grammar
            self._by_grammar.setdefault(future, {})[message.call_id] = held
            if is_new:
                future.add_done_callback(self._note_finished)

    def drop(self, request_ids: Collection[int]) -> list[wire.AddRequests]:
        """Forget messages of which nobody waits for any request, and give them."""
        aborted = set(request_ids)
        dropped = []
        for request_id in request_ids:
            held = self._by_request.get(request_id)
            if held and aborted.issuperset(request.request_id for request in held.message.requests):
                self._forget(held)
                dropped.append(held.message)
        return dropped

    def take_expired(self, now_us: int) -> list[wire.AddRequests]:
        """Give the messages that have waited for as long as they may."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_us:
            _, call_id = heapq.heappop(self._deadlines)
            held = self._by_call.get(call_id)
            if held is not None:
                self._forget(held)
                expired.append(held.message)
        return expired

    def take_ready(self) -> list[HeldMessage]:
        """Give the messages that need to wait no longer, in the order of their calls."""
        ready = []
        while self._finished:
            for held in self._by_grammar.pop(self._finished.popleft(), {}).values():
                if all(one.done() for one in held.waits_for):
                    self._forget(held)
                    ready.append(held)
        return sorted(ready, key=lambda held: held.message.call_id)

    def _note_finished(self, future: Future[Any]) -> None:
        self._finished.append(future)
        self._wake()

    def _forget(self, held: HeldMessage) -> None:
        call_id = held.message.call_id
        self.counts.add(held.message, -1)
        del self._by_call[call_id]
        for request in held.message.requests:
            self._by_request.pop(request.request_id, None)
        for future in held.waits_for:
            waiting = self._by_grammar.get(future)
            if waiting is not None:
                waiting.pop(call_id, None)
                if not waiting:
                    future.cancel()
        if len(self._deadlines) > 2 * len(self._by_call):  # Those that are over would wait for their time.
            self._deadlines = [
                (one.deadline_us, call) for call, one in self._by_call.items() if one.deadline_us is not None
            ]
            heapq.heapify(self._deadlines)
