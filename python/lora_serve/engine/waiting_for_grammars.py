"""Requests that came before their grammar was compiled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
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


class WaitingForGrammars:
    """Holds requests until their grammars are there, or are known to be wrong; others pass them meanwhile.

    A grammar that nobody here waits for any more is not compiled, unless that has begun.
    """

    def __init__(self) -> None:
        self._held: list[HeldMessage] = []

    @property
    def messages(self) -> list[wire.AddRequests]:
        """Those that are held, in the order in which they came."""
        return [held.message for held in self._held]

    @property
    def next_deadline_us(self) -> int | None:
        """When `take_expired` has something to give; None = never, as far as known."""
        return min((held.deadline_us for held in self._held if held.deadline_us is not None), default=None)

    def count_in(self, stats: EngineStats) -> EngineStats:
        """Give the engine's counts with those that are held among its waiting requests."""
        requests = [request for message in self.messages for request in message.requests]
        return msgspec.structs.replace(
            stats,
            num_waiting_requests=stats.num_waiting_requests + len(requests),
            num_queued_requests=stats.num_queued_requests + len(requests),
            num_queued_tokens=stats.num_queued_tokens + sum(len(r.prompt_token_ids) for r in requests),
        )

    def add(self, message: wire.AddRequests, waits_for: Sequence[Future[Any]], arrival_us: int) -> None:
        """Hold a message until all of these are done."""
        self._held.append(HeldMessage(message, waits_for, arrival_us))

    def drop(self, request_ids: Collection[int]) -> list[wire.AddRequests]:
        """Forget messages of which nobody waits for any request, and give them."""
        aborted = set(request_ids)
        return self._give_up(
            lambda held: aborted.issuperset(request.request_id for request in held.message.requests)
        )

    def take_expired(self, now_us: int) -> list[wire.AddRequests]:
        """Give the messages that have waited for as long as they may."""
        return self._give_up(lambda held: held.deadline_us is not None and held.deadline_us <= now_us)

    def take_ready(self) -> list[HeldMessage]:
        """Give the messages that need to wait no longer, in the order in which they came."""
        ready = [held for held in self._held if all(future.done() for future in held.waits_for)]
        if ready:
            self._held = [held for held in self._held if held not in ready]
        return ready

    def _give_up(self, is_over: Callable[[HeldMessage], bool]) -> list[wire.AddRequests]:
        given_up = [held for held in self._held if is_over(held)]
        if given_up:
            self._held = [held for held in self._held if held not in given_up]
            wanted = {future for held in self._held for future in held.waits_for}
            for future in {future for held in given_up for future in held.waits_for} - wanted:
                future.cancel()
        return [held.message for held in given_up]
