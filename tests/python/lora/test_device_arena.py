from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.kernels.device_tables import DeviceTables, ModulePlace
from lora_serve.lora.adapter_copies import CpuCopies, PendingCopy
from lora_serve.lora.adapter_layout import BLOCK_ALIGNMENT
from lora_serve.lora.device_arena import DeviceArena, DeviceExtent
from lora_serve.lora.host_pool import HostBlock, HostPool

from .device_setup import DeviceSetup, on_devices, random_bytes, wait_done

UNIT = BLOCK_ALIGNMENT


def make_arena(setup: DeviceSetup, num_units: int) -> DeviceArena:
    return DeviceArena(num_units * UNIT, setup.device, setup.copies)


def fill(setup: DeviceSetup, arena: DeviceArena, *units: int) -> list[DeviceExtent]:
    """Place and load extents of these sizes one after another; the content of each is its index."""
    extents = []
    for index, num_units in enumerate(units):
        extent = placed(arena, num_units)
        wait_done(
            arena.load(extent, setup.host_bytes(torch.full((extent.num_bytes,), index, dtype=torch.uint8)))
        )
        extents.append(extent)
    return extents


def placed(arena: DeviceArena, num_units: int) -> DeviceExtent:
    placement = arena.place(num_units * UNIT)
    assert placement.extent is not None
    return placement.extent


def values(extent: DeviceExtent) -> set[int]:
    return set(extent.tensor.unique().tolist())


@on_devices
def test_extents_use_every_byte_and_do_not_overlap(setup):
    arena = make_arena(setup, 10)
    extents = fill(setup, arena, 3, 1, 4, 2)

    assert arena.num_free_bytes == 0
    assert [values(extent) for extent in extents] == [{0}, {1}, {2}, {3}]
    assert [extent.tensor.numel() for extent in extents] == [3 * UNIT, UNIT, 4 * UNIT, 2 * UNIT]
    arena.free(extents[1])
    assert arena.num_free_bytes == UNIT
    assert placed(arena, 1).offset == 3 * UNIT


@on_devices
def test_adapter_that_fits_in_scattered_free_bytes_is_placed(setup):
    arena = make_arena(setup, 10)
    address = arena.buffer.data_ptr()
    extents = fill(setup, arena, 2, 1, 3, 1, 3)
    arena.free(extents[0])
    arena.free(extents[2])

    placement = arena.place(5 * UNIT)
    assert placement.extent is not None
    assert placement.moved == (extents[1],)
    assert arena.num_moved_bytes == UNIT
    assert [values(extents[index]) for index in (1, 3, 4)] == [{1}, {3}, {4}]
    wait_done(arena.load(placement.extent, setup.host_bytes(torch.full((5 * UNIT,), 9, dtype=torch.uint8))))
    assert [values(extents[index]) for index in (1, 3, 4)] == [{1}, {3}, {4}]
    assert values(placement.extent) == {9}
    assert arena.buffer.data_ptr() == address


@on_devices
def test_extent_that_a_load_writes_is_not_moved(setup):
    arena = make_arena(setup, 10)
    first, middle, _ = fill(setup, arena, 2, 2, 6)
    arena.free(first)
    arena.free(middle)
    other, loading = placed(arena, 1), placed(arena, 2)
    source = setup.host_bytes(torch.full((2 * UNIT,), 7, dtype=torch.uint8))
    assert (other.offset, loading.offset) == (0, UNIT)
    arena.free(other)

    with setup.loads_held_up():
        copy = arena.load(loading, source)
        assert not loading.is_movable
        refused = arena.place(2 * UNIT)
        assert (refused.extent, refused.moved) == (None, ())
        assert loading.offset == UNIT
    wait_done(copy)
    assert loading.is_movable
    placement = arena.place(2 * UNIT)
    assert placement.extent is not None
    assert placement.moved == (loading,)
    assert values(loading) == {7}


@on_devices
def test_extent_that_was_freed_during_its_load_is_given_away_only_after_it(setup):
    arena = make_arena(setup, 4)
    (extent,) = fill(setup, arena, 4)
    source = setup.host_bytes(torch.full((4 * UNIT,), 7, dtype=torch.uint8))

    with setup.loads_held_up():
        copy = arena.load(extent, source)
        arena.free(extent)
        assert arena.num_free_bytes == 0
        assert arena.place(2 * UNIT).extent is None
        with pytest.raises(InternalError, match="not in the arena, or was freed"):
            arena.free(extent)
    wait_done(copy)
    assert arena.num_free_bytes == 4 * UNIT
    assert placed(arena, 2).offset == 0


@on_devices
def test_extent_that_was_freed_during_its_load_is_never_told_as_moved(setup):
    arena = make_arena(setup, 6)
    first, second, third = fill(setup, arena, 1, 2, 2)
    arena.free(first)
    with setup.loads_held_up():
        copy = arena.load(second, setup.host_bytes(torch.zeros(2 * UNIT, dtype=torch.uint8)))
        arena.free(second)
    wait_done(copy)

    placement = arena.place(4 * UNIT)
    assert placement.moved == (third,)
    assert values(third) == {2}


@on_devices
def test_load_that_stands_in_the_way_is_joined_where_asked(setup):
    arena = make_arena(setup, 10)
    first, middle, last = fill(setup, arena, 2, 4, 4)
    arena.free(first)
    arena.free(last)
    source = setup.host_bytes(torch.full((4 * UNIT,), 7, dtype=torch.uint8))

    with setup.loads_held_up():
        setup.slow_loads_down()
        copy = arena.load(middle, source)
        assert arena.place(6 * UNIT).extent is None
    placement = arena.place(6 * UNIT, joins_loads=True)
    assert placement.extent is not None
    assert placement.moved == (middle,)
    assert values(middle) == {7}
    wait_done(copy)


@on_devices
def test_extent_that_was_freed_during_its_load_is_given_away_once_that_is_joined(setup):
    arena = make_arena(setup, 4)
    (extent,) = fill(setup, arena, 4)
    old, new = (setup.host_bytes(torch.full((4 * UNIT,), value, dtype=torch.uint8)) for value in (7, 8))

    setup.slow_loads_down()
    copies = [arena.load(extent, old)]
    arena.free(extent)
    placement = arena.place(4 * UNIT, joins_loads=True)
    assert placement.extent is not None
    copies.append(arena.load(placement.extent, new))
    arena.join(placement.extent)
    assert placement.extent.is_movable
    assert values(placement.extent) == {8}
    for copy in copies:
        wait_done(copy)
    assert values(placement.extent) == {8}


def test_more_than_the_free_bytes_is_a_bug_of_the_caller():
    arena = DeviceArena(4 * UNIT, "cpu", CpuCopies())
    placed(arena, 3)
    with pytest.raises(InternalError, match=f"{2 * UNIT} bytes .* {UNIT} of {4 * UNIT} are free"):
        arena.place(2 * UNIT)


def test_extents_are_checked():
    copies = CpuCopies()
    arena, other = DeviceArena(4 * UNIT, "cpu", copies), DeviceArena(4 * UNIT, "cpu", copies)
    extent, foreign = placed(arena, 2), placed(other, 2)
    for wrong in (lambda: arena.free(foreign), lambda: arena.load(foreign, torch.zeros(2 * UNIT))):
        with pytest.raises(InternalError, match="not in the arena"):
            wrong()
    with pytest.raises(InternalError, match="a copy of"):
        arena.load(extent, torch.zeros(2 * UNIT - 1, dtype=torch.uint8))
    arena.free(extent)
    with pytest.raises(InternalError, match="was freed"):
        arena.free(extent)


@on_devices
def test_second_load_into_an_extent_waits_for_its_first(setup):
    arena = make_arena(setup, 2)
    extent = placed(arena, 2)
    source = setup.host_bytes(torch.zeros(2 * UNIT, dtype=torch.uint8))
    with setup.loads_held_up():
        copy = arena.load(extent, source)
        with pytest.raises(InternalError, match="under way"):
            arena.load(extent, source)
    wait_done(copy)
    wait_done(arena.load(extent, source))


@on_devices
def test_memory_that_the_device_lacks_is_refused_with_the_option(setup):
    with pytest.raises(InvalidArgumentError, match="lower --lora-memory-gb"):
        DeviceArena(1 << 60, setup.device, setup.copies)


@on_devices
def test_random_life_never_refuses_what_fits_and_keeps_every_byte(setup):
    seed, num_units = 11, 200
    rng = random.Random(seed)
    arena = make_arena(setup, num_units)
    contents: dict[DeviceExtent, Tensor] = {}
    for step in range(300):
        free_units = num_units - sum(-(-len(content) // UNIT) for content in contents.values())
        assert arena.num_free_bytes == free_units * UNIT
        if free_units and (rng.random() < 0.55 or not contents):
            content = random_bytes(rng.randint(1, min(free_units, 64) * UNIT), step)
            placement = arena.place(len(content))
            assert placement.extent is not None, f"seed {seed}, step {step}"
            assert set(placement.moved) <= set(contents)
            wait_done(arena.load(placement.extent, setup.host_bytes(content)))
            contents[placement.extent] = content
        else:
            victim = rng.choice(list(contents))
            arena.free(victim)
            del contents[victim]
        for extent, content in contents.items():
            assert torch.equal(extent.tensor.cpu(), content), f"seed {seed}, step {step}"
    assert arena.num_moved_bytes > 0
    for extent in contents:
        arena.free(extent)
    assert arena.num_free_bytes == num_units * UNIT


@dataclass
class Resident:
    extent: DeviceExtent
    row: Tensor
    slot: int
    tag: int
    block: HostBlock
    copy: PendingCopy
    is_usable: bool = False
    holds_block: bool = True
    last_read: torch.cuda.Event | None = None


class AdapterLife:
    """Host pool, arena, tables and copies together; steps read through the rows, and count what is wrong.

    An adapter's words are its tag times 1000 plus their index, so that another's words, or the same ones at
    another place, never pass for right. The host looks at nothing that the steps found before the end.
    With `joins` an adapter is used by the step after its load was started, else once it is seen to be done.
    """

    num_slots = 6
    num_words_read = 96

    def __init__(self, setup: DeviceSetup, seed: int, joins: bool) -> None:
        self.setup = setup
        self.joins = joins
        self.rng = random.Random(seed)
        self.pool = HostPool(60 * UNIT, is_pinned=setup.device.type == "cuda")
        self.arena = make_arena(setup, 30)
        self.tables = DeviceTables((1,), self.num_slots, setup.device)
        self.words = self.arena.buffer.view(torch.int32)
        self.index = torch.arange(self.num_words_read, device=setup.device)
        self.num_wrong = torch.zeros((), dtype=torch.int64, device=setup.device)
        self.residents: dict[int, Resident] = {}
        self.num_loads = self.num_refused = self.num_moved = self.num_read = 0

    def load(self) -> None:
        free_slots = set(range(self.num_slots)) - set(self.residents)
        num_units = self.rng.randint(2, 12)
        if not free_slots or self.arena.num_free_bytes < num_units * UNIT:
            return
        placement = self.arena.place(num_units * UNIT, joins_loads=self.joins)
        for resident in self.residents.values():
            if resident.extent in placement.moved:
                self.num_moved += 1
                if resident.is_usable:
                    self.install(resident)
        if placement.extent is None:
            self.num_refused += 1
            return
        self.num_loads += 1
        tag = self.num_loads
        block = self.pool.reserve(num_units * UNIT, lambda: False)
        count = num_units * UNIT // 4
        block.tensor.view(torch.int32).copy_(tag * 1000 + torch.arange(count, dtype=torch.int32))
        row = self.tables.make_row([ModulePlace(0, 0, 0, 0, tag, 1.0)])
        copy = self.arena.load(placement.extent, block.tensor)
        slot = self.rng.choice(sorted(free_slots))
        resident = self.residents[slot] = Resident(placement.extent, row, slot, tag, block, copy)
        if self.joins:
            self.arena.join(placement.extent)
            self.install(resident)

    def poll(self) -> None:
        for resident in self.residents.values():
            if resident.copy.is_done():
                self.release(resident)
                if not resident.is_usable:
                    self.install(resident)

    def evict(self) -> None:
        if self.residents:
            resident = self.residents.pop(self.rng.choice(sorted(self.residents)))
            if resident.last_read is not None:
                resident.last_read.synchronize()  # a scheduler would take another one
            self.arena.free(resident.extent)
            self.setup.copies.write_row(self.tables.rows[resident.slot], self.tables.empty_row)
            wait_done(resident.copy)  # a manager would hold the block meanwhile
            self.release(resident)

    def release(self, resident: Resident) -> None:
        if resident.holds_block:
            assert resident.copy.error is None
            resident.holds_block = False
            resident.block.tensor.fill_(0xEE)  # as the block's next owner would
            resident.block.release()

    def step(self) -> None:
        self.setup.keep_steps_busy(is_long=False)
        table = self.tables.layers[0]
        read = [r for r in self.residents.values() if r.is_usable and self.rng.random() < 0.5]
        for resident in read:
            found = self.words[table.a_offset[resident.slot, 0] + self.index]
            self.num_wrong += (found != resident.tag * 1000 + self.index).sum()
            self.num_wrong += table.lora_rank[resident.slot, 0] != resident.tag
            self.num_read += 1
        step_end = self.setup.end_step()
        for resident in read:
            resident.last_read = step_end

    def install(self, resident: Resident) -> None:
        resident.is_usable = True
        row = self.tables.row_at(resident.row, resident.extent.offset // 4)
        self.setup.copies.write_row(self.tables.rows[resident.slot], row)


@on_devices
@pytest.mark.parametrize("joins", [False, True], ids=["polled", "joined"])
def test_steps_that_run_late_read_the_right_bytes_through_loads_moves_and_evictions(setup, joins):
    seed = 7
    life = AdapterLife(setup, seed, joins)
    for turn in range(1_200):  # enough on machines that are slow to end a load
        life.poll()
        if life.rng.random() < 0.35:
            life.evict()
        life.load()
        if life.rng.random() < 0.3:
            life.load()
        life.step()
        if turn % 50 == 49:
            for resident in life.residents.values():
                wait_done(resident.copy)
    setup.wait()
    assert not (joins and life.num_refused)
    assert int(life.num_wrong) == 0, f"seed {seed}"
    assert min(life.num_loads, life.num_moved, life.num_read) > 50
    for _ in range(len(life.residents)):
        life.evict()
    assert life.arena.num_free_bytes == 30 * UNIT
    assert life.pool.snapshot().num_free_bytes == 60 * UNIT
    life.pool.close()
