from __future__ import annotations

import random

import pytest
import torch

from lora_serve.kernels.device_tables import EMPTY_SLOT, DeviceTables, ModulePlace

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SLICES = (3, 1, 2, 1)
NUM_SLOTS = 5


def make_tables(device: str = "cpu") -> DeviceTables:
    return DeviceTables(SLICES, NUM_SLOTS, device)


def place(layer=0, slice_index=0, a_offset=8, b_offset=16, lora_rank=4, scaling=0.5) -> ModulePlace:
    return ModulePlace(layer, slice_index, a_offset, b_offset, lora_rank, scaling)


def entry(tables: DeviceTables, slot: int, layer: int, slice_index: int) -> tuple[int, int, int, float]:
    table = tables.layers[layer]
    return (
        int(table.a_offset[slot, slice_index]),
        int(table.b_offset[slot, slice_index]),
        int(table.lora_rank[slot, slice_index]),
        float(table.scaling[slot, slice_index]),
    )


def all_entries(tables: DeviceTables, slot: int) -> dict[tuple[int, int], tuple[int, int, int, float]]:
    return {
        (layer, index): entry(tables, slot, layer, index)
        for layer, count in enumerate(SLICES)
        for index in range(count)
    }


@pytest.mark.parametrize("device", DEVICES)
def test_every_slot_is_empty_at_first(device):
    tables = make_tables(device)
    for count, table in zip(SLICES, tables.layers, strict=True):
        assert table.lora_rank.shape == table.a_offset.shape == (NUM_SLOTS, count)
        assert bool((table.lora_rank == EMPTY_SLOT).all())


@pytest.mark.parametrize("device", DEVICES)
def test_row_is_read_back_through_the_views_of_its_slot_only(device):
    tables = make_tables(device)
    rng = random.Random(5)
    expected = {}
    for slot in (0, 2, NUM_SLOTS - 1):
        modules = [
            ModulePlace(
                layer, index, rng.randrange(2**40), rng.randrange(2**40), rng.randint(1, 512), -rng.random()
            )
            for layer, count in enumerate(SLICES)
            for index in range(count)
            if rng.random() < 0.7
        ]
        block = rng.randrange(2**40)
        rng.shuffle(modules)
        tables.rows[slot].copy_(tables.row_at(tables.make_row(modules), block))
        expected[slot] = {
            (m.layer, m.slice_index): (
                m.a_offset + block,
                m.b_offset + block,
                m.lora_rank,
                pytest.approx(m.scaling),
            )
            for m in modules
        }
    for slot in range(NUM_SLOTS):
        for key, found in all_entries(tables, slot).items():
            if slot not in expected:
                assert found[2] == EMPTY_SLOT
            else:
                assert found == expected[slot].get(key, (0, 0, 0, 0.0))


def test_later_adapter_in_a_slot_leaves_nothing_of_the_earlier_one():
    tables = make_tables()
    tables.rows[1].copy_(tables.make_row([place(2, 1), place(0, 2), place(3, 0)]))
    tables.rows[1].copy_(tables.row_at(tables.make_row([place(0, 1, scaling=2.0)]), 100))

    entries = all_entries(tables, 1)
    assert entries.pop((0, 1)) == (108, 116, 4, 2.0)
    assert set(entries.values()) == {(0, 0, 0, 0.0)}
    tables.rows[1].copy_(tables.empty_row)
    assert {found[2] for found in all_entries(tables, 1).values()} == {EMPTY_SLOT}


def test_row_at_leaves_its_row_as_it_was():
    tables = make_tables()
    row = tables.make_row([place()])
    before = row.clone()
    assert not torch.equal(tables.row_at(row, 64), before)
    assert torch.equal(row, before)
    assert torch.equal(tables.row_at(row, 64), tables.row_at(row, 64))


def test_views_share_the_buffer_and_never_move():
    tables = make_tables()
    addresses = [(t.a_offset.data_ptr(), t.lora_rank.data_ptr()) for t in tables.layers]
    tables.rows[3].copy_(tables.make_row([place(1, 0, lora_rank=7)]))

    assert int(tables.layers[1].lora_rank[3, 0]) == 7
    assert [(t.a_offset.data_ptr(), t.lora_rank.data_ptr()) for t in tables.layers] == addresses
    start = tables.rows.data_ptr()
    assert all(start <= address < start + tables.rows.nbytes for pair in addresses for address in pair)
    assert {t.a_offset.stride() for t in tables.layers} == {(tables.row_bytes // 8, 1)}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([place(4)], "no such slice"),
        ([place(-1)], "no such slice"),
        ([place(1, 1)], "no such slice"),
        ([place(0, -1)], "no such slice"),
        ([place(), place(0, 1), place()], "has a module already"),
        ([place(lora_rank=0)], "rank of 1 to 512"),
        ([place(lora_rank=513)], "rank of 1 to 512"),
        ([place(lora_rank=-1)], "rank of 1 to 512"),
        ([place(a_offset=-8)], "offsets of 0 or above"),
        ([place(b_offset=-8)], "offsets of 0 or above"),
        ([place(scaling=float("inf"))], "finite scaling"),
    ],
)
def test_modules_that_do_not_fit_are_refused(modules, message):
    with pytest.raises(ValueError, match=message):
        make_tables().make_row(modules)


def test_negative_block_offset_is_refused():
    tables = make_tables()
    with pytest.raises(ValueError, match="block_offset is -1"):
        tables.row_at(tables.make_row([]), -1)


@pytest.mark.parametrize(("slices", "num_slots"), [((), 1), ((1, 0), 1), ((1,), 0)])
def test_tables_without_slots_or_slices_are_refused(slices, num_slots):
    with pytest.raises(ValueError, match="at least one slot"):
        DeviceTables(slices, num_slots, "cpu")
