"""Starts an engine again whose process has ended, with the adapters that were loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lora_serve.common.errors import InvalidArgumentError, LoraServeError
from lora_serve.common.field_checks import check_float
from lora_serve.engine.engine_client import AsyncEngineClient, LoadedAdapter
from lora_serve.server.lifecycle import Lifecycle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestartSettings:
    """Whether and how often an engine is started again.

    Parameters
    ----------
    max_restarts : int
        Tries in a row; 0 = it is not started again. An engine that has served for `reset_s` counts anew.
    first_pause_s : float
        Before the second try in a row; twice as long before each further one, at most `max_pause_s`.
    max_pause_s : float
        See above.
    reset_s : float
        See above.

    Raises
    ------
    InvalidArgumentError
        A number is negative.
    """

    max_restarts: int = 0
    first_pause_s: float = 1.0
    max_pause_s: float = 30.0
    reset_s: float = 300.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise InvalidArgumentError(f"--max-engine-restarts is {self.max_restarts} but must be at least 0")
        for name in ("first_pause_s", "max_pause_s", "reset_s"):
            check_float(name, getattr(self, name), 0.0)


class EngineSupervisor:
    """Watches the engine's process, and starts another one when it has ended.

    Requests that the old process had have failed by then, each with its reason. Until the new one has all
    adapters the server is not ready: a request is told to come again, never that its adapter does not exist.

    Parameters
    ----------
    client : AsyncEngineClient
        A started client.
    lifecycle : Lifecycle
        Told of restarts.
    settings : RestartSettings
        How often.
    is_ours : callable
        Says which of the adapters that were loaded are loaded again here; others are `reload`'s.
    forget : callable
        Called before the new engine is started: from then on nobody else may count on what the old one had,
        nor load into the new one.
    reload : callable
        Called when the new engine serves and has these adapters, before requests are let in.
    """

    def __init__(
        self,
        client: AsyncEngineClient,
        lifecycle: Lifecycle,
        settings: RestartSettings,
        *,
        is_ours: Callable[[LoadedAdapter], bool],
        forget: Callable[[], Awaitable[None]],
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._lifecycle = lifecycle
        self._settings = settings
        self._is_ours = is_ours
        self._forget = forget
        self._reload = reload
        self._task: asyncio.Task[None] | None = None
        # Until a load is done, the client's own list lacks it: a second crash must not forget it.
        self._to_load: list[LoadedAdapter] = []

    def start(self) -> None:
        """Begin to watch."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """End the watch. Closing twice changes nothing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        num_tries = 0
        started_s = time.monotonic()
        while True:
            await self._client.wait_for_failure()
            if time.monotonic() - started_s >= self._settings.reset_s:
                num_tries = 0
            if num_tries >= self._settings.max_restarts:
                self._lifecycle.give_up()
                logger.error("the engine is not started again after %d tries in a row", num_tries)
                return
            self._lifecycle.begin_restart()
            if num_tries > 0:
                pause_s = self._settings.first_pause_s * 2.0 ** (num_tries - 1)
                await asyncio.sleep(min(pause_s, self._settings.max_pause_s))
            num_tries += 1
            logger.warning("starting the engine again, try %d of %d", num_tries, self._settings.max_restarts)
            if await self._try():
                started_s = time.monotonic()

    async def _try(self) -> bool:
        """Start the engine once; True when it serves, which it does even if not all adapters came back."""
        known = {adapter.name: adapter for adapter in (*self._to_load, *self._client.loaded_adapters)}
        self._to_load = [adapter for adapter in known.values() if self._is_ours(adapter)]
        begin_s = time.monotonic()
        try:
            await self._forget()
            await self._client.restart()
            for adapter in list(self._to_load):
                await self._load(adapter)
            await self._reload()
        except Exception as error:
            # A traceback says more than the message of an error that nobody raised on purpose.
            trace = None if isinstance(error, LoraServeError) else error
            logger.error("the engine could not be started again as it was: %s", error, exc_info=trace)
        if not self._client.is_healthy:
            return False
        self._to_load = []
        self._lifecycle.end_restart()
        logger.warning("the engine serves again, after %.1f s", time.monotonic() - begin_s)
        return True

    async def _load(self, adapter: LoadedAdapter) -> None:
        """Load one of them again; one that cannot be loaded any more is named in the log, and left out."""
        try:
            result = await self._client.load_lora_adapter(
                adapter.name, adapter.path, pinned=adapter.pinned, weight=adapter.weight
            )
        except LoraServeError as error:
            if not self._client.is_healthy:
                raise
            logger.error("adapter %r is lost with the engine that had it: %s", adapter.name, error)
            return
        except Exception:
            logger.exception("adapter %r is lost with the engine that had it", adapter.name)
            return
        if result.content_digest != adapter.content_digest:
            logger.warning(
                "adapter %r has another content since the engine was started again: %r was changed",
                adapter.name,
                adapter.path,
            )
