"""Adapters of a server, loaded and unloaded over HTTP, and what the answers of each must be made with."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import Future
from typing import Any

import aiohttp

from lora_serve.common.errors import InternalError
from lora_serve.engine.messages import LoadAdapterResult, UnloadAdapterResult


class HttpAdapters:
    """Loads and unloads over HTTP. Implements `AdapterHost`, in one event loop.

    Parameters
    ----------
    session
        Of the server, for operators' calls.
    digests
        Content digest of each adapter directory; from `load`, which fills it.

    Attributes
    ----------
    generations
        Of a name that serves, the newest generation of which the server has said that it is loaded.
    loaded
        (name, generation) to directory, of all loads.
    num_unloads, num_forced
        How often an unload of a name was begun, and those by force.
    """

    def __init__(self, session: aiohttp.ClientSession, digests: dict[str, str]) -> None:
        self._session = session
        self._digests = digests
        self.generations: dict[str, int] = {}
        self.loaded: dict[tuple[str, int], str] = {}
        self.num_unloads: Counter[str] = Counter()
        self.num_forced: Counter[str] = Counter()

    def load_adapter(self, name: str, path: str, *, load_inplace: bool = False) -> Future[LoadAdapterResult]:
        """Begin to load."""
        return self._begin(self.load(name, path, load_inplace=load_inplace))

    def unload_adapter(self, name: str, *, force: bool = False) -> Future[UnloadAdapterResult]:
        """Begin to unload."""
        self.num_unloads[name] += 1
        self.num_forced[name] += force
        self.generations.pop(name, None)
        return self._begin(self.unload(name, force=force))

    async def load(self, name: str, path: str, *, load_inplace: bool = False) -> LoadAdapterResult:
        """Load; return when it serves."""
        body = {"lora_name": name, "lora_path": path, "load_inplace": load_inplace}
        answer = await self._post("/v1/load_lora_adapter", body)
        if path not in self._digests:
            loras = await read_loras(self._session)
            (self._digests[path],) = {one["content_digest"] for one in loras["data"] if one["path"] == path}
        self.loaded[name, answer["adapter_id"]] = path
        self.generations[name] = answer["adapter_id"]
        return LoadAdapterResult(
            name=name,
            adapter_id=answer["adapter_id"],
            content_digest=self._digests[path],
            already_loaded=answer["already_loaded"],
        )

    async def unload(self, name: str, *, force: bool = False) -> UnloadAdapterResult:
        """Unload; return when nothing of it is left."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": name, "force": force})
        return UnloadAdapterResult(name=name, adapter_ids=[])

    def _begin(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, asyncio.get_running_loop())

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._session.post(path, json=body) as response:
            if response.status != 200:
                raise InternalError(f"{path} {body} answers {response.status}: {await response.text()}")
            answer: dict[str, Any] = await response.json()
            return answer


async def read_loras(session: aiohttp.ClientSession) -> dict[str, Any]:
    """What the server says of its adapters and its engine."""
    async with session.get("/v1/loras") as response:
        response.raise_for_status()
        loras: dict[str, Any] = await response.json()
        return loras
