"""Where a server is in its life, and what that means for a request that comes now."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from lora_serve.common.errors import LoraServeError

RETRY_AFTER_DRAIN_S = 5
"""A server that drains does not come back; another one, or its successor, may take so long to answer."""
RETRY_AFTER_RESTART_S = 2


class Phase(Enum):
    """Where a server is in its life."""

    SERVING = "serving"
    """It answers, as long as its engine does."""
    RESTARTING = "restarting"
    """The engine's process has ended, and another one is on its way."""
    DRAINING = "draining"
    """It was told to end: what runs may end, newcomers are refused."""


class NotServingError(LoraServeError):
    """The server takes no requests now (HTTP 503).

    Parameters
    ----------
    message : str
        Why.
    code : str
        'draining' or 'engine_restarting'.
    retry_after_s : int
        When to try again.
    """

    def __init__(self, message: str, code: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass
class Lifecycle:
    """Where one server is in its life; whoever moves it on sets `phase`.

    Attributes
    ----------
    phase : Phase
        Never leaves DRAINING again.
    has_given_up : bool
        The engine has ended, and nobody will start it again.
    is_restarting : bool
        Another engine is on its way, or does not have the adapters of the old one yet; also while the server
        drains.
    """

    phase: Phase = Phase.SERVING
    has_given_up: bool = False
    is_restarting: bool = False
    _num_requests: int = 0
    _is_idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request for as long as it is answered."""
        self._num_requests += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if self._num_requests == 0:
                self._is_idle.set()

    async def wait_until_idle(self) -> None:
        """Return when no request is answered."""
        while self._num_requests > 0:
            await self._is_idle.wait()

    def begin_restart(self) -> None:
        """The engine has ended and will be started again."""
        self.is_restarting = True
        if self.phase is Phase.SERVING:
            self.phase = Phase.RESTARTING

    def end_restart(self) -> None:
        """The engine serves as before."""
        self.is_restarting = False
        if self.phase is Phase.RESTARTING:
            self.phase = Phase.SERVING

    def give_up(self) -> None:
        """The engine will not be started again."""
        self.has_given_up = True
        self.end_restart()

    def begin_drain(self) -> None:
        """The server was told to end."""
        self.phase = Phase.DRAINING

    def why_not_serving(self) -> NotServingError | None:
        """Give the error for newcomers; None while they are welcome."""
        if self.phase is Phase.DRAINING:
            return NotServingError(
                "the server is shutting down and takes no new requests; send it to another server, or again "
                "later",
                "draining",
                RETRY_AFTER_DRAIN_S,
            )
        return _make_restarting() if self.is_restarting else None

    def require_engine(self) -> None:
        """Refuse a request that was let in before the engine ended, and reaches it only now.

        Its adapter may be missing in the new engine, which says nothing about whether it exists.

        Raises
        ------
        NotServingError
            The engine is being started again.
        """
        if self.is_restarting:
            raise _make_restarting()


def _make_restarting() -> NotServingError:
    return NotServingError(
        "the engine's process has ended and is being started again; send the request again later",
        "engine_restarting",
        RETRY_AFTER_RESTART_S,
    )
