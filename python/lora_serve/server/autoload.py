"""Adapters that are loaded when a request first names them, and unloaded when others need their place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from lora_serve.common.errors import (
    AdapterNotFoundError,
    AdapterSourceError,
    CapacityError,
    InvalidArgumentError,
)
from lora_serve.lora import registry
from lora_serve.lora.sources import may_be_local
from lora_serve.server.settings import AutoloadSettings

if TYPE_CHECKING:
    from lora_serve.engine.engine_client import AsyncEngineClient
    from lora_serve.engine.status import AdapterInfo

MAX_LOADS = 2
"""Loads that are asked for at once, as many as the engine reads: an operator's waits for one at most."""
RETRY_AFTER_S = 1

logger = logging.getLogger(__name__)


class AdapterAutoloader:
    """Loads adapters under their paths, and unloads those that were used least recently.

    Owns: the adapters that it has loaded itself, by name and generation; nothing else is ever unloaded. What
    an operator loads, replaces or unloads under the same name is the operator's from then on.
    Deliberately does not know: which names serve (the engine does), nor where a path leads (the engine holds
    it to the allowed roots).

    Every method but `load` is synchronous; all run in one event loop.

    Parameters
    ----------
    client : AsyncEngineClient
        The engine; it stays the caller's to close.
    settings : AutoloadSettings
        What may be loaded, and how much.
    served_model_name : str
        The base model's name, which no adapter can have.
    """

    def __init__(self, client: AsyncEngineClient, settings: AutoloadSettings, served_model_name: str) -> None:
        self._client = client
        self._settings = settings
        self._served_model_name = served_model_name
        # Name to generation; the least recently used one first.
        self._owned: OrderedDict[str, int] = OrderedDict()
        # Requests that the engine may not know yet, by name.
        self._users: Counter[str] = Counter()
        self._loads: dict[str, asyncio.Task[None]] = {}
        # Names of loads under way that an operator has asked for too.
        self._disowned: set[str] = set()
        self._turns = asyncio.Semaphore(MAX_LOADS)

    @contextlib.contextmanager
    def using(self, path: str) -> Iterator[None]:
        """Keep the adapter of this path while a request for it is handed to the engine."""
        self._users[path] += 1
        try:
            yield
        finally:
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path]
            if path in self._owned:
                self._owned.move_to_end(path)

    async def load(self, path: str) -> None:
        """Load the adapter at a path under the path as its name; return when it serves.

        Those who ask for the same path meanwhile share the load, which goes on when they go away.

        Parameters
        ----------
        path : str
            As a request gave it.

        Raises
        ------
        AdapterNotFoundError
            The path leads to no adapter that may be loaded. The message is the same whatever is there.
        InvalidArgumentError
            There is an adapter, which cannot be served; the message says why.
        CapacityError
            All the places are taken by adapters in use, or the engine has no room.
        LoraServeError
            The engine could not load it.
        """
        if not self._may_load(path):
            raise _not_found(path)
        task = self._loads.get(path)
        if task is None:
            task = self._loads[path] = asyncio.create_task(self._load(path))
            task.add_done_callback(partial(self._forget_load, path))
        await asyncio.shield(task)

    def disown(self, name: str) -> None:
        """Note that an operator has loaded or unloaded this name: it is not unloaded here any more."""
        self._owned.pop(name, None)
        if name in self._loads:
            self._disowned.add(name)

    def owns(self, name: str) -> bool:
        """True for an adapter that was loaded here, and may be unloaded here."""
        return name in self._owned

    def forget_all(self) -> None:
        """Note that the engine has lost its adapters: those from here are loaded again on their next use."""
        self._owned.clear()

    def _may_load(self, path: str) -> bool:
        """Tell whether a text can be a path: a plain word is a name that somebody has to load."""
        if "/" not in path or path == self._served_model_name:
            return False
        try:
            registry.check_adapter_name(path)
        except InvalidArgumentError:
            return False
        return self._settings.allow_local or not may_be_local(path, allow_hub=self._settings.allow_hub)

    async def _load(self, path: str) -> None:
        async with self._turns:
            try:
                result = await self._client.load_lora_adapter(path, path)
            except AdapterSourceError as error:
                logger.info("adapter path %r cannot be loaded on first use: %s", path, error)
                raise _not_found(path) from None
        if result.already_loaded or path in self._disowned:
            return  # Somebody else was quicker; it is theirs.
        self._owned[path] = result.adapter_id
        # Only now: a path that leads nowhere must not cost anybody an adapter.
        while len(self._owned) > self._settings.max_adapters:
            await self._make_way(path)
        logger.info("adapter %r is loaded on first use", path)

    def _forget_load(self, path: str, task: asyncio.Task[None]) -> None:
        del self._loads[path]
        self._disowned.discard(path)
        if not task.cancelled():
            task.exception()  # Those who wait for it have got it; there may be none.

    async def _make_way(self, newest: str) -> None:
        """Unload the least recently used adapter that no request uses; the newest one where there is none.

        Raises
        ------
        CapacityError
            It was the newest one.
        """
        serving = {info.name: info for info in await self._client.list_lora_adapters() if info.is_serving}
        for name, adapter_id in self._owned.items():
            info = serving.get(name)
            is_there = info is not None and info.adapter_id == adapter_id
            if not is_there or (name != newest and not self._is_used(serving[name])):
                await self._unload(name, is_there=is_there)
                return
        if newest not in self._owned:
            return  # Nobody waits for it any more, and somebody has unloaded it, or it is an operator's.
        await self._unload(newest, is_there=True)
        raise CapacityError(
            f"all {self._settings.max_adapters} adapters that may be loaded on first use are in use; try "
            "again later, or start the server with a larger --lora-autoload-max",
            retry_after_s=RETRY_AFTER_S,
        )

    def _is_used(self, info: AdapterInfo) -> bool:
        return bool(self._users[info.name] or info.num_waiting_requests or info.num_running_requests)

    async def _unload(self, name: str, *, is_there: bool) -> None:
        # Before the engine hears of it: a request that comes now finds no adapter and loads it again.
        del self._owned[name]
        if is_there:
            with contextlib.suppress(AdapterNotFoundError):
                await self._client.unload_lora_adapter(name)
            logger.info("adapter %r, loaded on first use, is unloaded to make way", name)


def _not_found(path: str) -> AdapterNotFoundError:
    """Give the error for a path that is not loaded; the same whatever is there."""
    return AdapterNotFoundError(
        f"{path!r} is neither a loaded adapter nor one that may be loaded on first use"
    )
