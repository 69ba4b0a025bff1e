"""The metrics of one server: what it has counted itself, and what the engine says, as one page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

from lora_serve.common.errors import LoraServeError
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.engine.status import AdapterInfo, EngineStats
from lora_serve.server.metrics.engine_families import (
    adapter_families,
    config_family,
    counter_families,
    gauge_families,
)
from lora_serve.server.metrics.families import gauge, request_families
from lora_serve.server.metrics.request_metrics import RequestMetrics

logger = logging.getLogger(__name__)

ENGINE_TIMEOUT_S = 2.0
"""How long a scrape waits for the engine, which answers between two steps; then it shows what it knew."""
REUSE_S = 0.5
"""What the engine said is shown for so long, however often it is asked for."""


@dataclass(frozen=True)
class EngineSnapshot:
    """What the engine said last.

    Parameters
    ----------
    stats : EngineStats
        Its counts.
    adapters : list of AdapterInfo
        Every generation.
    taken_at : float
        When it came, by time.monotonic.
    """

    stats: EngineStats
    adapters: list[AdapterInfo]
    taken_at: float


class _Page:
    """What a registry collects once: families that were made before."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


class ServerMetrics:
    """Counts requests and answers scrapes, of one server with one engine.

    Parameters
    ----------
    client : AsyncEngineClient
        The engine, whose accepted requests are counted from now on.
    model_name : str
        The base model's name, the label `model_name`.
    max_adapters : int
        Most adapters with series of their own among those of requests.

    Attributes
    ----------
    requests : RequestMetrics
        What was counted of requests.
    """

    def __init__(self, client: AsyncEngineClient, model_name: str, max_adapters: int) -> None:
        self._client = client
        self._model_name = model_name
        self._snapshot: EngineSnapshot | None = None
        self._asking: asyncio.Task[None] | None = None
        self.requests = RequestMetrics(model_name, max_adapters)
        client.observe = self.requests.watch

    async def page(self, accept: str) -> tuple[bytes, str]:
        """Give all metrics as text.

        It is made in a thread of its own, out of copies: thousands of lines take milliseconds, in which the
        event loop streams on.

        Parameters
        ----------
        accept : str
            The request's Accept header: Prometheus' text, or OpenMetrics.

        Returns
        -------
        tuple of bytes and str
            The page, and its content type.
        """
        await self._ask_engine()
        snapshot = self._snapshot
        if snapshot is not None and self._client.is_healthy:
            self.requests.note_loaded(one.name for one in snapshot.adapters if one.is_serving)
        by_adapter, retired = self.requests.by_adapter(), self.requests.retired()
        model = self.requests.model()
        is_up = self._client.is_healthy

        def render() -> tuple[bytes, str]:
            registry = CollectorRegistry(auto_describe=False)
            registry.register(_Page(self._engine_families(snapshot, is_up)))
            registry.register(_Page(request_families(self._model_name, by_adapter, retired, model)))
            ProcessCollector(registry=registry)
            encode, content_type = choose_encoder(accept)
            return encode(registry), content_type

        return await asyncio.to_thread(render)

    def _engine_families(self, snapshot: EngineSnapshot | None, is_up: bool) -> Iterator[Metric]:
        """Give the engine's families; of an engine that has ended only what stays true."""
        labels = {"model_name": self._model_name}
        yield gauge("lora_serve:engine_up", "1 while the engine serves.", labels, is_up)
        yield config_family(self._client.model_info, self._client.config)
        if snapshot is None:
            return
        age_s = time.monotonic() - snapshot.taken_at
        yield gauge("lora_serve:engine_stats_age_seconds", "Age of the engine's counts.", labels, age_s)
        yield from counter_families(self._model_name, snapshot.stats)
        if is_up:
            max_loras = self._client.model_info.max_loras
            yield from gauge_families(self._model_name, snapshot.stats)
            yield from adapter_families(self._model_name, max_loras, snapshot.adapters, time.time() - age_s)

    async def _ask_engine(self) -> None:
        """Bring the snapshot up to date, unless it is, or the engine does not answer in time."""
        if not self._client.is_healthy:
            return
        if self._snapshot is not None and time.monotonic() - self._snapshot.taken_at < REUSE_S:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._take_snapshot())
        # Several scrapes wait for one answer; one that comes too late is there for the next scrape.
        await asyncio.wait({self._asking}, timeout=ENGINE_TIMEOUT_S)

    async def _take_snapshot(self) -> None:
        try:
            stats = await self._client.stats()
            adapters = await self._client.list_lora_adapters()
        except LoraServeError as error:
            logger.info("/metrics: the engine's counts are not to be had: %s", error)
            return
        self._snapshot = EngineSnapshot(stats, adapters, time.monotonic())
