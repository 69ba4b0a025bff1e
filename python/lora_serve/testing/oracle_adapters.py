"""Adapter memory without weights, for the oracle executor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from lora_serve.common.errors import AdapterNotFoundError, InternalError
from lora_serve.lora.adapter_layout import AdapterLayout, ModuleLayout
from lora_serve.lora.adapter_reader import HostAdapter, never
from lora_serve.lora.allowed_roots import AllowedRoots
from lora_serve.lora.eviction_order import AdapterLine
from lora_serve.lora.host_adapters import HostNews, HostResidency
from lora_serve.lora.manager import NO_SLOT, AdapterResidency
from lora_serve.lora.sources import AdapterFolder


def make_oracle_adapter(path: str, content: str, *, num_bytes: int, lora_rank: int = 1) -> HostAdapter:
    """An adapter without weights.

    Parameters
    ----------
    path
        Where it claims to come from.
    content
        What its digest is made of.
    num_bytes
        What it claims to take.
    lora_rank
        Of its only module.
    """
    layout = AdapterLayout((ModuleLayout("model.oracle", lora_rank, 1.0, 0, 0),), num_bytes)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return HostAdapter(AdapterFolder(path, AllowedRoots(None)), layout, digest, None, {})


class OracleAdapterStore:
    """Adapters that are only a path: equal paths have equal content. Implements `AdapterStore`.

    Owns which generations were added, which of them are on the host (those that were just added or that
    `poll` was told to read, until they are lost), and the slot of each that is on the device. Slots are also
    kept for generations that were never added, so that an oracle can be driven by a scheduler alone. Whoever
    brings in, takes off or removes what is not where it must be gets an InternalError: the scheduler was
    wrong.

    Parameters
    ----------
    num_bytes : int
        Reported size of every adapter.
    memory_bytes : int
        What the device holds, for the scheduler's options; 0 = no limit.

    Attributes
    ----------
    is_read : callable
        Whether a read of this generation has ended; asked in each `poll`.
    memory_bytes : int
        As given.
    """

    def __init__(self, num_bytes: int = 1024, memory_bytes: int = 0) -> None:
        self.is_read: Callable[[int], bool] = lambda adapter_id: True  # noqa: ARG005
        self.memory_bytes = memory_bytes
        self._num_bytes = num_bytes
        self._adapters: dict[int, HostAdapter] = {}
        self._on_host: set[int] = set()
        self._lost: set[int] = set()
        self._num_being_read = 0
        self._slots: dict[int, int] = {}

    # --- As the engine uses it ----------------------------------------------------------------------------

    @property
    def num_reads_under_way(self) -> int:
        """Those that the last `poll` was told to read, and whose reads had not ended."""
        return self._num_being_read

    @property
    def num_load_waits(self) -> int:
        """Give 0: no thread reads."""
        return 0

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Do nothing: there is never news."""

    def read(
        self,
        path: str,
        name: str | None = None,  # noqa: ARG002
        is_cancelled: Callable[[], bool] = never,  # noqa: ARG002
    ) -> HostAdapter:
        """Give an adapter whose content is a function of the path; no file is touched."""
        return make_oracle_adapter(path, path, num_bytes=self._num_bytes)

    def charged_bytes(self, adapter: HostAdapter) -> int:
        """Give the adapter's own bytes."""
        return adapter.num_bytes

    def is_on_host(self, adapter_id: int) -> bool:
        """Whether a generation was added or read again, and not lost since."""
        return adapter_id in self._on_host

    def lose(self, adapter_id: int) -> None:
        """Let one leave the host at the next `poll`, if it is there."""
        self._lost.add(adapter_id)

    def touch(self, adapter_id: int) -> None:
        """Do nothing: nobody is evicted from the host."""

    def poll(self, line: AdapterLine) -> HostNews:
        """Tell what was lost and read since the last call."""
        news = HostNews(evicted=sorted(self._lost & self._on_host))
        self._on_host -= self._lost
        self._lost.clear()
        missing = [i for i in line.adapters_to_stage() if i in self._adapters and i not in self._on_host]
        news.arrived += [adapter_id for adapter_id in missing if self.is_read(adapter_id)]
        self._on_host.update(news.arrived)
        self._num_being_read = len(missing) - len(news.arrived)
        return news

    def prepare_loads(self, adapter_ids: Iterable[int]) -> None:
        """Check that they are on the host; there are no weights.

        Raises
        ------
        InternalError
            One was added, and is not.
        """
        lost = [i for i in adapter_ids if i in self._adapters and i not in self._on_host]
        if lost:
            raise InternalError(f"a plan loads adapter generations {lost}, which are not on the host")

    def add(self, adapter_id: int, adapter: HostAdapter) -> None:
        """Keep a generation.

        Raises
        ------
        InternalError
            The id was added before.
        """
        if adapter_id in self._adapters:
            raise InternalError(f"adapter generation {adapter_id} was added before; ids are never reused")
        self._adapters[adapter_id] = adapter
        self._on_host.add(adapter_id)

    def remove(self, adapter_id: int) -> None:
        """Forget a generation.

        Raises
        ------
        AdapterNotFoundError
            It was not added.
        InternalError
            It is on the device.
        """
        if adapter_id not in self._adapters:
            raise AdapterNotFoundError(f"adapter generation {adapter_id} was not added")
        if adapter_id in self._slots:
            raise InternalError(f"adapter generation {adapter_id} is removed while it is on the device")
        del self._adapters[adapter_id]
        self._on_host.discard(adapter_id)

    def __contains__(self, adapter_id: int) -> bool:
        """Whether the generation was added and not removed, or has a slot."""
        return adapter_id in self._adapters or adapter_id in self._slots

    def snapshot(self) -> list[AdapterResidency]:
        """Give every generation that was added, ordered by id."""
        return [
            AdapterResidency(
                adapter_id,
                self._slots.get(adapter_id, NO_SLOT),
                HostResidency(
                    is_on_host=adapter_id in self._on_host,
                    is_being_read=False,
                    layout=adapter.layout,
                    load_ms={},
                    num_reads=1,
                    last_used_s=0.0,
                ),
            )
            for adapter_id, adapter in sorted(self._adapters.items())
        ]

    # --- As plans change it -------------------------------------------------------------------------------

    @property
    def num_device_bytes(self) -> int:
        """Bytes of the generations in slots; one that was never added has none."""
        return sum(
            self._adapters[adapter_id].num_bytes for adapter_id in self._slots if adapter_id in self._adapters
        )

    def load(self, adapter_id: int, slot: int) -> None:
        """Bring a generation to the device.

        Raises
        ------
        InternalError
            The generation is on the device, or the slot is taken.
        """
        if adapter_id in self._slots:
            raise InternalError(
                f"adapter generation {adapter_id} is loaded to slot {slot} but has {self._slots[adapter_id]}"
            )
        if slot in self._slots.values():
            raise InternalError(
                f"adapter generation {adapter_id} is loaded to slot {slot}, which is taken: {self._slots}"
            )
        self._slots[adapter_id] = slot

    def evict(self, adapter_id: int) -> None:
        """Take a generation off the device; it is kept.

        Raises
        ------
        InternalError
            It is not on the device.
        """
        if adapter_id not in self._slots:
            raise InternalError(f"adapter generation {adapter_id} is evicted but is in no slot")
        del self._slots[adapter_id]

    def free(self, adapter_id: int) -> None:
        """Take a generation off the device if it is there, because it is drained."""
        self._slots.pop(adapter_id, None)

    def adapter_in(self, slot: int) -> int | None:
        """Give the generation in a slot, None where it is empty."""
        return next((adapter_id for adapter_id, held in self._slots.items() if held == slot), None)
