"""Adapter memory in tests: the tables against plain torch, and a manager that one thread drives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lora.adapter_setup import expected_modules, tables_of
from lora.peft_setup import FUSED, HIDDEN, VOCAB_SIZE, make_full_adapter, make_full_targets
from lora_serve.kernels import LoRALayerTable
from lora_serve.kernels.device_tables import EMPTY_SLOT
from lora_serve.kernels.lora_weights import LoRASliceWeights
from lora_serve.layers.linear import LoRAKind, LoRATarget
from lora_serve.lora.adapter_reader import AdapterReader, HostAdapter
from lora_serve.lora.device_adapters import DeviceAdapters
from lora_serve.lora.host_adapters import HostNews
from lora_serve.lora.host_pool import HostPool
from lora_serve.lora.manager import AdapterResidency, LoadReports, LoRAManager
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.lora.sources import AdapterSources

TIMEOUT_S = 60
MIB = 2**20
ALL_MODULES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "lm_head",
]


def make_memory_targets() -> dict[str, LoRATarget]:
    """Those of `make_full_targets`, with an embedding that can be installed."""
    table = LoRALayerTable((HIDDEN,), VOCAB_SIZE, is_embedding=True)
    embedding = LoRATarget(table, 0, VOCAB_SIZE, HIDDEN, LoRAKind.EMBEDDING)
    return {**make_full_targets(), "model.embed_tokens": embedding}


def make_reader(pool: HostPool, dtype: torch.dtype = torch.float32, **options: Any) -> AdapterReader:
    limits = AdapterLimits(max_lora_rank=options.pop("max_lora_rank", 64), dtype=dtype)
    sources = options.pop("sources", None) or AdapterSources()
    return AdapterReader(make_memory_targets(), FUSED, limits, pool, sources, **options)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "what was waited for does not come"
        time.sleep(0.0005)


def block_of(path: Path, *, num: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a host pool that holds this adapter so often."""
    pool = HostPool(64 * MIB, is_pinned=False)
    reader = make_reader(pool, dtype)
    with reader.read(str(path)) as adapter:
        num_bytes = adapter.num_bytes
    reader.close()
    pool.close()
    return num * num_bytes


# --- What stands in the tables ------------------------------------------------------------------------------


def assert_holds(
    device: DeviceAdapters, targets: Mapping[str, LoRATarget], slot: int, path: Path, **options: Any
) -> None:
    """A slot stands for the adapter in the folder: the same in the device's rows and the layers' tables."""
    expected = expected_modules(path, device._dtype, **options)
    in_rows = weights_in_rows(device, targets, slot)
    assert in_rows.keys() == targets.keys()
    for module, target in targets.items():
        entry = target.table.get(slot)
        assert entry is not None, f"{module} has no entry: its operator would refuse the slot"
        for found in (in_rows[module], entry[target.slice_index]):
            if module not in expected:
                assert found is None, f"{module} is left from somebody else"
                continue
            assert found is not None, f"{module} is missing"
            assert found.a.shape == target.a_shape(found.lora_rank)
            assert found.a.dtype == found.b.dtype == device._dtype
            assert torch.equal(found.a.cpu(), expected[module].a), module
            assert torch.equal(found.b.cpu(), expected[module].b), module
            assert abs(found.scaling - expected[module].scaling) <= 1e-6 * abs(expected[module].scaling)


def weights_in_rows(
    device: DeviceAdapters, targets: Mapping[str, LoRATarget], slot: int
) -> dict[str, LoRASliceWeights | None]:
    """What a kernel finds under a slot, from the device's rows and the arena; None = rank 0.

    Modules of an empty slot are left out.
    """
    weights = device._arena.buffer.view(device._dtype)
    found: dict[str, LoRASliceWeights | None] = {}
    for module, target in targets.items():
        layer = device._tables.layers[device._layer_of[id(target.table)]]
        at = (slot, target.slice_index)
        lora_rank = int(layer.lora_rank[at])
        if lora_rank == EMPTY_SLOT:
            continue
        a, b = (
            weights[int(offset) : int(offset) + rows * columns].view(rows, columns)
            for offset, (rows, columns) in (
                (layer.a_offset[at], target.a_shape(lora_rank)),
                (layer.b_offset[at], (lora_rank, target.out_features)),
            )
        )
        found[module] = LoRASliceWeights(a, b, float(layer.scaling[at])) if lora_rank else None
    return found


def assert_only_these_slots(
    device: DeviceAdapters, targets: Mapping[str, LoRATarget], slots: Iterable[int]
) -> None:
    """Exactly these slots have an adapter, in every table."""
    wanted = tuple(sorted(slots))
    assert {table.installed_slots for table in tables_of(dict(targets))} == {wanted}
    for layer in device._tables.layers:
        used = (layer.lora_rank != EMPTY_SLOT).all(dim=1).nonzero().flatten().tolist()
        empty = (layer.lora_rank == EMPTY_SLOT).all(dim=1).sum()
        assert tuple(used) == wanted
        assert int(empty) == len(layer.lora_rank) - len(wanted)


# --- Who is waited for --------------------------------------------------------------------------------------


class Line:
    """An `AdapterLine`: who waits for the device, the first in front; all of them are to be staged."""

    def __init__(self, *adapter_ids: int) -> None:
        self.adapter_ids = list(adapter_ids)

    def adapters_to_stage(self) -> list[int]:
        return self.adapter_ids

    def waiting_adapters(self, adapter_ids: Sequence[int]) -> list[int]:
        return [adapter_id for adapter_id in self.adapter_ids if adapter_id in adapter_ids]


# --- A manager ----------------------------------------------------------------------------------------------


class Memory:
    """A manager that one thread drives as the engine does: one plan after the other, none in flight."""

    def __init__(self, tmp_path: Path, device: torch.device | str = "cpu", **options: Any) -> None:
        defaults = {"memory_bytes": 4 * MIB, "host_memory_bytes": 8 * MIB, "sources": AdapterSources()}
        self.tmp_path = tmp_path
        self.targets = make_memory_targets()
        self.dtype = options.pop("dtype", torch.float32)
        max_lora_rank = options.pop("max_lora_rank", 64)
        self.manager = LoRAManager(
            self.targets, FUSED, self.dtype, device, max_lora_rank, **{**defaults, **options}
        )
        self.news = HostNews()
        self.line = Line()

    @property
    def pool(self) -> HostPool:
        return self.manager._pool

    @property
    def device(self) -> DeviceAdapters:
        return self.manager._device

    def add(self, adapter_id: int, **options: Any) -> Path:
        """Make an adapter, read and add it."""
        options = {"seed": adapter_id, "rank": 2, **options}
        path = make_full_adapter(self.tmp_path / str(adapter_id), **options)
        with self.read(path) as adapter:
            self.manager.add(adapter_id, adapter)
        return path

    def read(self, path: Path) -> HostAdapter:
        """Read as a loader thread does, while this thread polls."""
        with ThreadPoolExecutor(1) as thread:
            read = thread.submit(self.manager.read, str(path))
            while not read.done():
                self.poll()
                time.sleep(0.0005)
            return read.result()

    def poll(self) -> bool:
        """Poll, and keep the news; who has arrived is staged, who has failed is given up."""
        news = self.manager.poll(self.line)
        self.news.arrived += news.arrived
        self.news.evicted += news.evicted
        self.news.failed.update(news.failed)
        for adapter_id in (*news.arrived, *news.failed):
            if adapter_id in self.line.adapter_ids:
                self.line.adapter_ids.remove(adapter_id)
        return True

    def read_ahead(self, *adapter_ids: int) -> None:
        """Let these be in front of the line, and poll once."""
        self.line = Line(*adapter_ids)
        self.poll()

    def plan(
        self, loads: Mapping[int, int] | None = None, evicted: Iterable[int] = (), drained: Iterable[int] = ()
    ) -> LoadReports:
        """Carry out a plan; loads of adapters to slots."""
        self.manager.prepare_loads(loads or {})
        for adapter_id in drained:
            self.manager.free(adapter_id)
        for adapter_id in evicted:
            self.manager.evict(adapter_id)
        return self.manager.take_loads(loads or {})

    def bring_to_host(self, *adapter_ids: int) -> None:
        """Let these be in front of the line until each is on the host or could not be read."""
        self.news = HostNews()
        self.read_ahead(*adapter_ids)
        wait_until(lambda: self.poll() and self.line.adapter_ids == [])

    def fill_host(self, num_bytes: int) -> None:
        """Take and give back room of so many bytes: what is in its way is evicted."""
        with ThreadPoolExecutor(1) as thread:
            room = thread.submit(self.pool.reserve, num_bytes, lambda: False)
            wait_until(lambda: self.poll() and room.done())
            room.result().release()

    def evict_from_host(self) -> None:
        """Let nothing that is not leased stay on the host; there must be no lease."""
        wait_until(lambda: self.poll() and self.pool.snapshot().num_held_bytes == 0)
        self.fill_host(self.pool.snapshot().num_bytes)
        assert self.pool.snapshot().adapters == ()

    def residency(self, adapter_id: int) -> AdapterResidency:
        return next(entry for entry in self.manager.snapshot() if entry.adapter_id == adapter_id)

    def assert_holds(self, slots: Mapping[int, int]) -> None:
        """These adapters and no others are on the device in these slots, whole."""
        assert self.device.slots == dict(slots)
        assert_only_these_slots(self.device, self.targets, slots.values())
        for adapter_id, slot in slots.items():
            assert_holds(self.device, self.targets, slot, self.tmp_path / str(adapter_id))

    def assert_at_start(self) -> None:
        """Nothing is held anywhere."""
        wait_until(lambda: self.poll() and self.pool.snapshot().num_held_bytes == 0)
        pool = self.pool.snapshot()
        assert (pool.num_free_bytes, pool.num_waiters, pool.adapters) == (pool.num_bytes, 0, ())
        assert self.manager.snapshot() == []
        assert self.device.num_free_bytes == self.device.memory_bytes
        assert self.device.slots == {}
        assert_only_these_slots(self.device, self.targets, ())
        assert self.manager._staged == self.manager._copy_ms == {}
        assert self.manager._host._records == self.manager._host._reads == {}
