"""Requests that came before their grammar was compiled."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any

from lora_serve.engine import wire


class WaitingForGrammars:
    """Holds requests until their grammars are there, or are known to be wrong; others pass them meanwhile."""

    def __init__(self) -> None:
        self._waiting: list[tuple[wire.AddRequests, Sequence[Future[Any]]]] = []

    def add(self, message: wire.AddRequests, waits_for: Sequence[Future[Any]]) -> None:
        """Hold a message until all of these are done."""
        self._waiting.append((message, waits_for))

    def drop(self, request_ids: Collection[int]) -> None:
        """Forget messages of which nobody waits for any request."""
        aborted = set(request_ids)
        self._waiting = [
            held for held in self._waiting if not aborted.issuperset(r.request_id for r in held[0].requests)
        ]

    def take_ready(self) -> list[wire.AddRequests]:
        """Give the messages that need to wait no longer, in the order in which they came."""
        ready: list[wire.AddRequests] = []
        still_waiting = []
        for message, waits_for in self._waiting:
            if all(future.done() for future in waits_for):
                ready.append(message)
            else:
                still_waiting.append((message, waits_for))
        self._waiting = still_waiting
        return ready
