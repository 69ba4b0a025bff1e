"""Faults of the product, planted in the engine process one at a time: what the fuzz must be able to find."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lora_serve.engine import adapter_operations
from lora_serve.engine.adapter_operations import AdapterOperations
from lora_serve.lora.adapter_reader import AdapterReader
from lora_serve.lora.device_adapters import DeviceAdapters
from lora_serve.lora.device_arena import DeviceArena
from lora_serve.lora.host_pool import HostPool


def reload_keeps_the_kv_namespace() -> None:
    """A load in place changes the weights of the generation that serves, whose cached pages stay."""
    open_generation = AdapterOperations._open_generation

    def swap(self: Any, load: Any, adapter: Any) -> None:
        old, store = self._registry.find(load.name), self._store
        if old is None or old.adapter_id not in store._device:
            open_generation(self, load, adapter)
            return
        if store._host.layout(old.adapter_id) != adapter.layout:
            open_generation(self, load, adapter)
            return
        kept = replace(old, content_digest=adapter.content_digest, path=adapter.path)
        self._registry._generations[kept.adapter_id] = self._registry._newest[kept.name] = kept
        store._host.remove(kept.adapter_id)
        store._host.add(kept.adapter_id, adapter)
        store._device._residents[kept.adapter_id].extent.tensor.copy_(adapter.block.tensor)
        self._answer(load, self._make_result(kept, already_loaded=False))

    AdapterOperations._open_generation = swap  # type: ignore[method-assign]


def leased_block_is_evicted() -> None:
    """Host memory that a slow copy to the device is going to read is given to another load."""
    load = DeviceAdapters.load

    def last_use_at(self: Any, offset: int) -> int | None:
        record = self._records[offset]
        if record.num_holds == 0:
            last_use: int = record.last_use
            return last_use
        return None if record.adapter_id is None else -1

    def load_slowly(self: Any, *arguments: Any) -> None:
        time.sleep(0.02)
        load(self, *arguments)

    HostPool._last_use_at = last_use_at  # type: ignore[method-assign]
    DeviceAdapters.load = load_slowly  # type: ignore[method-assign]


def slot_is_not_rewritten() -> None:
    """A slot that is used again goes on to stand for what it stood for first."""
    write = DeviceAdapters._write
    written: set[int] = set()

    def write_once(self: Any, resident: Any) -> None:
        if resident.slot not in written:
            written.add(resident.slot)
            write(self, resident)

    DeviceAdapters._write = write_once  # type: ignore[method-assign]
    DeviceAdapters._empty = lambda self, slot: None  # type: ignore[method-assign]


def moved_adapter_is_not_rewritten() -> None:
    """Compaction moves an adapter, and its slot goes on to point to where it was."""

    def place(self: Any, num_bytes: int) -> Any:
        return self._arena.place(num_bytes, joins_loads=True).extent

    DeviceAdapters._place = place  # type: ignore[method-assign]


def unload_keeps_host_memory() -> None:
    """The first adapter that is unloaded leaves its bytes in the host pool."""
    drop = HostPool.drop

    def drop_halfway(self: Any, adapter_id: int) -> None:
        HostPool.drop = drop  # type: ignore[method-assign]
        record = self._kept.pop(adapter_id)
        record.adapter_id, record.num_holds = None, record.num_holds + 1

    HostPool.drop = drop_halfway  # type: ignore[method-assign]


def unload_keeps_device_memory() -> None:
    """What leaves the device stays in the arena."""
    DeviceArena.free = lambda self, extent: None  # type: ignore[method-assign]


def unload_does_not_wait() -> None:
    """An unload is answered while requests still use what it unloads."""
    make = adapter_operations._Unload

    def make_done(name: str, waits_for: set[int], adapter_ids: list[int], caller: Any) -> Any:
        return make(name, set(), adapter_ids, caller)

    adapter_operations._Unload = make_done  # type: ignore[assignment,misc]


def read_again_without_a_look_at_the_digest() -> None:
    """What is read again may be other content than what was loaded."""
    AdapterReader.read_again = (  # type: ignore[method-assign]
        lambda self, folder, layout, content_digest, room, is_cancelled: self._read(
            folder, None, {}, is_cancelled, lambda *_: room
        )
    )


def load_in_place_needs_no_flag() -> None:
    """A load replaces other content although it was not told to."""
    load = AdapterOperations.load
    AdapterOperations.load = lambda self, name, path, **options: load(  # type: ignore[method-assign]
        self, name, path, **{**options, "load_inplace": True}
    )


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        reload_keeps_the_kv_namespace,
        leased_block_is_evicted,
        slot_is_not_rewritten,
        moved_adapter_is_not_rewritten,
        unload_keeps_host_memory,
        unload_keeps_device_memory,
        unload_does_not_wait,
        read_again_without_a_look_at_the_digest,
        load_in_place_needs_no_flag,
    )
}


def plant(name: str) -> None:
    """Plant a fault in this process."""
    FAULTS[name]()
