"""Adapters in host memory: read from disk, kept while there is room, read again before their turn comes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_serve.common.errors import AdapterNotFoundError, InternalError
from lora_serve.lora.adapter_layout import AdapterLayout
from lora_serve.lora.adapter_reader import AdapterReader, HostAdapter, describe_error, release_unwanted
from lora_serve.lora.eviction_order import AdapterLine, EvictionOrder, NobodyWaits
from lora_serve.lora.host_block import HostBlock
from lora_serve.lora.host_pool import HostPool
from lora_serve.lora.loader_threads import LoaderThreads
from lora_serve.lora.sources import AdapterFolder

NUM_LOADERS = 4
"""Adapters that are read at once, but for those whose files do not come; see `LoaderThreads`."""


@dataclass
class _Record:
    """What is remembered of an adapter that was added, wherever its weights are."""

    folder: AdapterFolder
    layout: AdapterLayout
    content_digest: str
    load_ms: Mapping[str, float]
    last_used_s: float
    num_reads: int = 1


@dataclass(frozen=True)
class _Read:
    """A read that is under way."""

    future: Future[HostAdapter]
    is_cancelled: threading.Event

    def drop(self) -> None:
        """Let it end soon, and free what it gives."""
        self.is_cancelled.set()
        self.future.add_done_callback(release_unwanted)


class HostResidency(NamedTuple):
    """What host memory knows of one adapter.

    Parameters
    ----------
    is_on_host
        Its weights are in host memory.
    is_being_read
        They are on their way from disk.
    layout
        Of its block.
    load_ms
        How long each stage of its last read took; see :class:`HostAdapter`.
    num_reads
        How often it was read from disk.
    last_used_s
        Unix time at which it was read or wanted last.
    """

    is_on_host: bool
    is_being_read: bool
    layout: AdapterLayout
    load_ms: Mapping[str, float]
    num_reads: int
    last_used_s: float


@dataclass
class HostNews:
    """What has changed in host memory since the last look.

    Parameters
    ----------
    arrived
        Adapters that were read again.
    evicted
        Adapters whose blocks made room for others.
    failed
        Adapters that could not be read again, with the reason.
    """

    arrived: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


class HostAdapters:
    """Which adapters lie in host memory, and the threads that bring them there.

    An adapter is read again when its turn is near (`poll`), `NUM_LOADERS` at once, each only with its room in
    hand: none of them stands in the way of a new adapter, which waits for room.

    Owns: the record of each adapter that was added, what it keeps in the pool, the reads that are under way.
    Deliberately does not know: names, slots, the device, requests; whose turn is near it is told.
    Invariants: an adapter's block leaves the pool only in `poll`, so that whoever has looked can rely on what
    it saw until its next look; who is read ahead never takes the room of one whose turn comes before its own;
    a record is there from `add` to `remove`; what is read again for an adapter has the digest that it was
    added with, or is not used.
    Threads: one calls everything, and evicts for all reads of the pool, in `poll`.

    Parameters
    ----------
    reader
        Reads adapters into the pool.
    pool
        Host memory for the blocks.
    on_news
        Called from another thread when `poll` has something to do.
    """

    def __init__(
        self,
        reader: AdapterReader,
        pool: HostPool,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self._reader = reader
        self._pool = pool
        self._on_news = on_news
        self._loaders = LoaderThreads(NUM_LOADERS, "lora-serve-loader")
        self._records: dict[int, _Record] = {}
        self._reads: dict[int, _Read] = {}

    def add(self, adapter_id: int, adapter: HostAdapter) -> None:
        """Remember an adapter that was read, until :meth:`remove`.

        The caller's lease goes on; with its end the block may make room for others.

        Raises
        ------
        InternalError
            ``adapter_id`` is below 1 or was added before, or the adapter has no weights.
        """
        if adapter_id < 1 or adapter_id in self._records:
            raise InternalError(
                f"adapter generation {adapter_id} is added, expected a new number, 1 or above"
            )
        self._keep(adapter_id, adapter)
        self._records[adapter_id] = _Record(
            adapter.folder, adapter.layout, adapter.content_digest, adapter.load_ms, time.time()
        )

    def remove(self, adapter_id: int) -> None:
        """Forget an adapter; its block is free when nobody has leased it any more.

        Raises
        ------
        AdapterNotFoundError
            The adapter was not added, or was removed.
        """
        self._get(adapter_id)
        del self._records[adapter_id]
        read = self._reads.pop(adapter_id, None)
        if read is not None:
            read.drop()
        self._pool.drop(adapter_id)

    def __contains__(self, adapter_id: int) -> bool:
        """Whether the adapter was added and not removed."""
        return adapter_id in self._records

    @property
    def num_reads_under_way(self) -> int:
        """How many adapters are being read again."""
        return len(self._reads)

    def is_on_host(self, adapter_id: int) -> bool:
        """Whether its block is in the pool, where it stays at least until the next :meth:`poll`."""
        return self._pool.contains(adapter_id)

    def layout(self, adapter_id: int) -> AdapterLayout:
        """The layout of an adapter's block.

        Raises
        ------
        AdapterNotFoundError
            The adapter was not added, or was removed.
        """
        return self._get(adapter_id).layout

    def lease(self, adapter_id: int) -> HostBlock | None:
        """Give its block, which then stays until it is released; None where it must be read again first.

        Raises
        ------
        AdapterNotFoundError
            The adapter was not added, or was removed.
        """
        self._get(adapter_id).last_used_s = time.time()
        return self._pool.lease(adapter_id)

    def touch(self, adapter_id: int) -> None:
        """Count as a use of an adapter, wherever it is.

        Raises
        ------
        AdapterNotFoundError
            The adapter was not added, or was removed.
        """
        self._get(adapter_id).last_used_s = time.time()
        self._pool.touch(adapter_id)

    def poll(self, line: AdapterLine | None = None) -> HostNews:
        """Make room for reads that wait for it, take up those that have ended, read ahead.

        Parameters
        ----------
        line
            Who is waited for; None = nobody.

        Notes
        -----
        Costs as much as there is news; in a call that has to evict, O(blocks on the host).
        """
        line = line or NobodyWaits()
        news = HostNews()
        if self._pool.has_waiters:
            waiting = line.waiting_adapters(self._pool.kept_adapters())
            news.evicted += self._pool.make_room(EvictionOrder(waiting))
        with contextlib.ExitStack() as arrivals:  # Nobody arrives and goes in the same call.
            for adapter_id in [i for i, read in self._reads.items() if read.future.done()]:
                read = self._reads.pop(adapter_id)
                try:
                    adapter = arrivals.enter_context(read.future.result())
                except Exception as error:
                    news.failed[adapter_id] = describe_error(error)
                    continue
                record = self._records[adapter_id]
                record.load_ms = adapter.load_ms
                record.num_reads += 1
                self._keep(adapter_id, adapter)
                news.arrived.append(adapter_id)
            news.evicted += self._read_ahead(line, news)
        return news

    def _read_ahead(self, line: AdapterLine, news: HostNews) -> list[int]:
        """Begin reads in the order of the line until one gets no room; who was evicted for them."""
        evicted: list[int] = []
        if self._pool.has_waiters:
            return evicted
        for adapter_id in line.adapters_to_stage():
            # What has failed now goes as soon as the caller has heard of it.
            is_done = adapter_id in self._reads or self._pool.contains(adapter_id)
            if is_done or adapter_id in news.failed or adapter_id not in self._records:
                continue
            if not self._loaders.has_room():
                break
            num_bytes = self._records[adapter_id].layout.num_bytes
            room, victims = self._pool.try_reserve(num_bytes)
            if room is None:
                waiting = line.waiting_adapters([*self._pool.kept_adapters(), adapter_id])
                order = EvictionOrder(waiting, for_adapter=adapter_id)
                room, victims = self._pool.try_reserve(num_bytes, order)
            if room is None:  # Nobody behind it takes the room that comes free for it.
                break
            evicted += victims
            self._start_read(adapter_id, room)
        return evicted

    def _start_read(self, adapter_id: int, room: HostBlock) -> None:
        record = self._records[adapter_id]
        is_cancelled = threading.Event()
        future = self._loaders.submit(
            self._reader.read_again,
            record.folder,
            record.layout,
            record.content_digest,
            room,
            is_cancelled.is_set,
        )
        self._reads[adapter_id] = _Read(future, is_cancelled)
        future.add_done_callback(lambda _: self._on_news())

    def close(self) -> None:
        """End the loader threads; pool and reader are closed by their owner. Twice changes nothing."""
        self._loaders.close()
        for read in self._reads.values():
            read.drop()
        self._reads.clear()

    def snapshot(self) -> dict[int, HostResidency]:
        """What host memory knows of each adapter that was added."""
        is_kept, reads = self._pool.contains, self._reads
        return {
            adapter_id: HostResidency(
                is_kept(adapter_id),
                adapter_id in reads,
                record.layout,
                record.load_ms,
                record.num_reads,
                record.last_used_s,
            )
            for adapter_id, record in sorted(self._records.items())
        }

    def _keep(self, adapter_id: int, adapter: HostAdapter) -> None:
        if adapter.block is None:
            raise InternalError(f"adapter generation {adapter_id} was read without its weights")
        self._pool.keep(adapter_id, adapter.block)

    def _get(self, adapter_id: int) -> _Record:
        record = self._records.get(adapter_id)
        if record is None:
            raise AdapterNotFoundError(f"adapter generation {adapter_id} was not added, or was removed")
        return record
