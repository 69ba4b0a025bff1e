"""The engine as one caller may use it: whatever a route does with it, it stays within the caller's key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from lora_serve.common.errors import AdapterNotFoundError
from lora_serve.common.outputs import RequestOutput
from lora_serve.common.queueing import DEFAULT_QUEUEING, Queueing
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.engine.isolation import DEFAULT_DOMAIN, make_domain
from lora_serve.engine.messages import LoadAdapterResult, UnloadAdapterResult
from lora_serve.engine.request_stream import RequestStream
from lora_serve.engine.status import AdapterInfo, EngineStats
from lora_serve.server.caller import Caller

HIDDEN_GENERATION = -1
"""In place of a generation's number, which counts the loads of everybody."""
HARMLESS = frozenset(
    {
        "abort",
        "config",
        "encode",
        "encode_chat",
        "is_healthy",
        "model_info",
        "tokenizer",
    }
)
"""What tells nothing about other callers: passed on as it is."""
NOT_FOR_ROUTES = frozenset({"close", "loaded_adapters", "restart", "start", "wait_for_failure"})
"""What only the server itself uses."""


class CallerClient(AsyncEngineClient):
    """A started engine client, narrowed to one caller.

    Names outside the caller's key are refused here, before the engine is asked, so that there is no
    difference, in time neither, between one that serves others and one that never existed. What this class
    does not know is not there: a new method of the engine's client must be narrowed here, or named harmless.
    What the engine's errors say is not narrowed here: `error_handlers` does that, where they become answers.

    Parameters
    ----------
    client : AsyncEngineClient
        The engine.
    caller : Caller
        Who asks.
    """

    def __init__(self, client: AsyncEngineClient, caller: Caller) -> None:
        self._client = client
        self._caller = caller

    def __getattribute__(self, name: str) -> Any:
        if name in HARMLESS:
            return getattr(object.__getattribute__(self, "_client"), name)
        if name.startswith("__") or name in CallerClient.__dict__ or name in ("_client", "_caller"):
            return object.__getattribute__(self, name)
        raise AttributeError(f"the engine's {name!r} is not for callers; narrow it in CallerClient")

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped, None while it has not; a tenant is told no more than that."""
        if self._client.failure is None or self._caller.sees_everything:
            return self._client.failure
        return "the engine has stopped; the reason is in the server's log"

    async def submit(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        *,
        lora_name: str | None = None,
        request_id: str | None = None,
        queueing: Queueing = DEFAULT_QUEUEING,
        isolation_domain: bytes = DEFAULT_DOMAIN,
    ) -> RequestStream:
        """Hand a request to the engine, as its client does, within the caller's adapters and group."""
        self._require_known(lora_name)
        if self._caller.group is not None:
            isolation_domain = make_domain(self._caller.group, isolation_domain.hex() or None)
        stream = await self._client.submit(
            prompt,
            sampling_params,
            lora_name=lora_name,
            request_id=request_id,
            queueing=queueing,
            isolation_domain=isolation_domain,
        )
        if not self._caller.sees_everything and lora_name is not None:
            stream.adapter_id = HIDDEN_GENERATION
        return stream

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        *,
        lora_name: str | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Submit and iterate in one, as the engine's client does."""
        stream = await self.submit(prompt, sampling_params, lora_name=lora_name, request_id=request_id)
        async with stream:
            async for output in stream:
                yield output

    async def load_lora_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        pinned: bool = False,
        weight: float = 1.0,
    ) -> LoadAdapterResult:
        """Load an adapter, where the caller may."""
        self._caller.require_may_load()
        return await self._client.load_lora_adapter(
            name, path, load_inplace=load_inplace, pinned=pinned, weight=weight
        )

    async def unload_lora_adapter(self, name: str, *, force: bool = False) -> UnloadAdapterResult:
        """Unload an adapter, where the caller may."""
        self._caller.require_may_load()
        return await self._client.unload_lora_adapter(name, force=force)

    async def list_lora_adapters(self) -> list[AdapterInfo]:
        """Give the generations of the caller's adapters."""
        return [info for info in await self._client.list_lora_adapters() if self._caller.knows(info.name)]

    async def stats(self) -> EngineStats:
        """Give the engine's totals, where the caller may see them."""
        self._caller.require_sees_everything()
        return await self._client.stats()

    def _require_known(self, lora_name: str | None) -> None:
        if lora_name is not None and not self._caller.knows(lora_name):
            raise AdapterNotFoundError(f"adapter {lora_name!r} does not serve")
