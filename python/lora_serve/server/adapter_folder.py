"""Keeps the engine's adapters as a watched folder has them, for as long as the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

from lora_serve.common.errors import AdapterNotFoundError, InvalidArgumentError, LoraServeError
from lora_serve.lora import registry
from lora_serve.lora.folder_scan import FolderScan, scan_folder
from lora_serve.lora.watched_folder import FolderAction, FolderChanges, WatchedFolder
from lora_serve.server.adapter_selection import check_adapter_name
from lora_serve.server.settings import AdapterFolderSettings

if TYPE_CHECKING:
    from lora_serve.engine.engine_client import AsyncEngineClient, LoadedAdapter
    from lora_serve.engine.status import AdapterInfo

MAX_LOADS = 4
"""Loads that the folder asks for at once: those of users do not queue behind a thousand of them."""

logger = logging.getLogger(__name__)


class AdapterFolder:
    """Watches the folder and asks the engine for what it finds.

    Owns: a task that polls, and one task an action under way. Their errors go to the log: nothing that is in
    the folder, and nothing that the engine answers, ends the watch.

    Parameters
    ----------
    client : AsyncEngineClient
        The engine; it stays the caller's to close.
    settings : AdapterFolderSettings
        What to watch.
    """

    def __init__(self, client: AsyncEngineClient, settings: AdapterFolderSettings) -> None:
        self._client = client
        self._settings = settings
        # Not resolved: a folder that is a link is looked up again with every poll.
        self._path = os.path.abspath(settings.path)
        self._folder = WatchedFolder(self._why_no_name)
        self._actions: dict[FolderAction, asyncio.Task[int | None]] = {}
        # What served from here when the engine ended, until it is loaded again: with its pin and its weight.
        self._lost: dict[str, LoadedAdapter] = {}
        self._turns = asyncio.Semaphore(MAX_LOADS)
        self._last_failure: str | None = None
        self._looked_at_s = 0.0
        self._task: asyncio.Task[None] | None = None

    async def look(self) -> None:
        """Look at the folder for the first time, which needs no engine: its start then does not add up."""
        with contextlib.suppress(OSError):
            self._begin(self._folder.update(await self._scan(), {}), {})

    async def start(self) -> None:
        """Load what is complete in the folder now, and begin to watch. The client has been started."""
        await asyncio.sleep(self._looked_at_s + self._settings.poll_seconds - time.monotonic())
        await self._load_and_watch()

    async def forget_engine(self) -> None:
        """End the watch of an engine that has ended; its client has not been started again yet.

        Until then the client knows what served, and so what :meth:`start_again` has to load.
        """
        await self.close()
        served = {
            adapter.name: adapter
            for adapter in self._client.loaded_adapters
            if adapter.path == os.path.join(self._path, adapter.name)
        }
        self._lost.update(served)  # An engine that ends before it has them all must not forget the others.
        self._folder.forget_engine(served)

    async def start_again(self) -> None:
        """Load at once what served before `forget_engine` and has not changed; the engine has no adapters.

        What has changed is loaded when it has come to rest, as ever; both with the pin and the weight that
        they had. What somebody had unloaded stays so.
        """
        await self._load_and_watch()

    async def close(self) -> None:
        """End the watch; what is loaded stays. Closing twice changes nothing."""
        tasks = [task for task in (self._task, *self._actions.values()) if task is not None]
        self._task, self._actions = None, {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- A poll -------------------------------------------------------------------------------------------

    async def _load_and_watch(self) -> None:
        await self._poll_safely()
        if self._actions:
            await asyncio.wait(self._actions.values())
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            await self._poll_safely()

    async def _poll_safely(self) -> None:
        try:
            await self._poll()
            self._last_failure = None
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            if failure != self._last_failure:
                is_expected = isinstance(error, (OSError, LoraServeError))
                logger.error("cannot poll %s: %s", self._path, failure, exc_info=not is_expected)
            self._last_failure = failure

    async def _poll(self) -> None:
        if not self._client.is_healthy:
            return
        # In the order that WatchedFolder asks for.
        self._finish_actions()
        scan = await self._scan()
        self._lost = {name: adapter for name, adapter in self._lost.items() if name in scan}
        if self._folder.is_at_rest(scan):
            return  # The list of a thousand adapters is work for the engine's step loop.
        serving = {info.name: info for info in await self._client.list_lora_adapters() if info.is_serving}
        changes = self._folder.update(scan, {name: info.adapter_id for name, info in serving.items()})
        self._begin(changes, serving)

    def _finish_actions(self) -> None:
        for action in [action for action, task in self._actions.items() if task.done()]:
            task = self._actions.pop(action)
            self._folder.finish(action, None if task.cancelled() else task.result())

    async def _scan(self) -> FolderScan:
        self._looked_at_s = time.monotonic()
        return await asyncio.to_thread(scan_folder, self._path)

    def _begin(self, changes: FolderChanges, serving: dict[str, AdapterInfo]) -> None:
        for note in changes.notes:
            logger.warning("%s: %s", self._path, note)
        for action in changes.actions:
            self._actions[action] = asyncio.create_task(self._act(action, serving.get(action.name)))

    # --- An action ----------------------------------------------------------------------------------------

    async def _act(self, action: FolderAction, info: AdapterInfo | None) -> int | None:
        """Do it; the generation that serves for the folder then, None where that is unchanged."""
        try:
            if action.kind == "unload":
                await self._unload(action.name)
                return None
            async with self._turns:
                return await self._load(action, info)
        except LoraServeError as error:
            logger.warning("%s: cannot %s adapter %r: %s", self._path, action.kind, action.name, error)
        except Exception:
            logger.exception("%s: cannot %s adapter %r", self._path, action.kind, action.name)
        return None

    async def _load(self, action: FolderAction, info: AdapterInfo | None) -> int | None:
        # Files say nothing of sharing: what somebody has set by hand stays.
        before = info or self._lost.get(action.name)
        pinned, weight = (False, 1.0) if before is None else (before.pinned, before.weight)
        result = await self._client.load_lora_adapter(
            action.name,
            os.path.join(self._path, action.name),
            load_inplace=action.kind == "reload",
            pinned=pinned,
            weight=weight,
        )
        self._lost.pop(action.name, None)
        if result.already_loaded and action.kind == "load":
            return None  # Somebody else was quicker, with the same content.
        if not result.already_loaded:
            logger.info("%s: adapter %r is loaded", self._path, action.name)
        return result.adapter_id

    async def _unload(self, name: str) -> None:
        with contextlib.suppress(AdapterNotFoundError):
            await self._client.unload_lora_adapter(name)
        logger.info("%s: adapter %r is unloaded, its subfolder is gone", self._path, name)

    def _why_no_name(self, name: str) -> str | None:
        try:
            check_adapter_name(name, self._settings.served_model_name)
            registry.check_adapter_name(name)
        except InvalidArgumentError as error:
            return str(error)
        return None
