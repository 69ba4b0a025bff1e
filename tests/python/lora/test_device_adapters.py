from __future__ import annotations

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lora_serve.common.errors import InternalError
from lora_serve.kernels import add_lora_linear, build_lora_metadata
from lora_serve.lora.adapter_copies import CpuCopies
from lora_serve.lora.adapter_layout import BLOCK_ALIGNMENT, align
from lora_serve.lora.device_adapters import MAX_RESIDENT_ADAPTERS, NUM_SLOTS, DeviceAdapters
from lora_serve.lora.host_pool import HostPool

from .adapter_setup import num_exact_bytes, tables_of
from .device_setup import on_devices
from .memory_setup import (
    ALL_MODULES,
    MIB,
    assert_holds,
    assert_only_these_slots,
    make_memory_targets,
    make_reader,
    wait_until,
    weights_in_rows,
)
from .peft_setup import make_full_adapter


class Device:
    """Adapters of one device and what they are read through; closed with `close`."""

    def __init__(self, setup, tmp_path, *, memory_bytes=4 * MIB, dtype=torch.float32, copies=None, only=None):
        self.setup, self.tmp_path = setup, tmp_path
        self.targets = {name: t for name, t in make_memory_targets().items() if only in (None, name)}
        self.pool = HostPool(16 * MIB, is_pinned=setup.device.type == "cuda")
        self.reader = make_reader(self.pool, dtype)
        self.adapters = DeviceAdapters(
            self.targets, dtype, setup.device, memory_bytes, copies or setup.copies
        )

    def read(self, adapter_id, **options):
        path = self.tmp_path / str(adapter_id)
        if not path.exists():
            make_full_adapter(path, **{"seed": adapter_id, **options})
        return self.reader.read(str(path))

    def load(self, adapter_id, slot, **options):
        adapter = self.read(adapter_id, **options)
        self.adapters.load(adapter_id, slot, adapter.layout, adapter.block)
        return adapter

    def assert_holds(self, slots):
        assert self.adapters.slots == slots
        assert_only_these_slots(self.adapters, self.targets, slots.values())
        for adapter_id, slot in slots.items():
            assert_holds(self.adapters, self.targets, slot, self.tmp_path / str(adapter_id))

    def release_all(self):
        def nothing_is_held():
            self.adapters.release_blocks()
            return self.pool.snapshot().num_held_bytes == 0

        wait_until(nothing_is_held)

    def outputs(self, slots):
        """What every linear layer adds for one token of each slot."""
        results = []
        metadata = build_lora_metadata(torch.tensor(slots), len(slots), device=self.setup.device)
        for index, table in enumerate(tables_of(self.targets)):
            if not table.is_embedding:
                generator = torch.Generator().manual_seed(index)
                x = torch.randn(len(slots), table.in_features, generator=generator)
                x = x.to(self.setup.device, self.adapters._dtype)
                y = torch.zeros(len(slots), table.out_features, dtype=x.dtype, device=x.device)
                add_lora_linear(y, x, table, metadata)
                results.append(y)
        return results

    def close(self):
        self.adapters.close()
        self.reader.close()
        self.pool.close()


@pytest.fixture
def device(setup, tmp_path):
    device = Device(setup, tmp_path)
    yield device
    device.close()


# --- One adapter --------------------------------------------------------------------------------------------


@on_devices
def test_loaded_weights_stand_at_their_slice_of_every_table(device):
    device.load(1, 7, rank=3, use_rslora=True, alpha=5, target_modules=ALL_MODULES)
    device.assert_holds({1: 7})
    rows = weights_in_rows(device.adapters, device.targets, 7)
    assert len(rows) == len(device.targets) == 30
    for module in device.targets:
        assert rows[module].scaling == pytest.approx(5 / 3**0.5, rel=1e-6)


@on_devices
def test_slots_of_embedding_and_logits_adapters_are_known_as_long_as_these_are_there(device):
    device.load(1, 7, target_modules=["q_proj"])
    device.load(2, NUM_SLOTS - 1, target_modules=["embed_tokens", "q_proj"])
    device.load(3, 0, target_modules=["lm_head"])

    def adapts_more(*slots):
        return device.adapters.adapts_more_than_layers(np.array(slots, dtype=np.int32))

    assert not adapts_more()
    assert not adapts_more(-1, 7, 7)
    assert adapts_more(7, NUM_SLOTS - 1)
    assert adapts_more(0, -1)
    device.adapters.evict(3)
    assert not adapts_more(0, -1)
    device.load(4, 0, target_modules=["k_proj"])
    assert not adapts_more(0)
    assert adapts_more(NUM_SLOTS - 1)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_in_the_models_dtype_on_its_device(setup, tmp_path, dtype):
    device = Device(setup, tmp_path, dtype=dtype)
    device.load(1, 0, rank=3, target_modules=ALL_MODULES)
    device.assert_holds({1: 0})
    for target in device.targets.values():
        weights = target.table.get(0)[target.slice_index]
        assert {weights.a.dtype, weights.b.dtype} == {dtype}
        assert {weights.a.device.type, weights.b.device.type} == {setup.device.type}
    device.close()


@on_devices
def test_missing_modules_have_rank_0_and_none_in_every_table(device):
    device.load(1, 0, rank=2, target_modules=["k_proj"], layers=[2])
    device.assert_holds({1: 0})
    rows = weights_in_rows(device.adapters, device.targets, 0)
    assert [module for module in device.targets if rows[module] is not None] == [
        "model.layers.2.self_attn.k_proj"
    ]


@on_devices
def test_slot_0_and_the_last_slot_are_used_and_slots_do_not_disturb_each_other(device):
    device.load(1, 0, rank=2)
    device.load(2, NUM_SLOTS - 1, rank=4)
    device.load(3, 1, rank=1)
    device.adapters.evict(2)
    device.assert_holds({1: 0, 3: 1})


@on_devices
def test_reused_slot_carries_nothing_over_from_an_adapter_with_more_modules(device):
    device.load(1, 3, rank=8, target_modules=ALL_MODULES)
    device.adapters.evict(1)
    device.load(2, 3, rank=2, target_modules=["up_proj"], layers=[1])
    device.assert_holds({2: 3})


@on_devices
def test_evicted_adapter_is_in_no_table_and_comes_back_into_another_slot(device):
    device.load(1, 0, rank=2)
    device.load(2, 1, rank=4)
    free = device.adapters.num_free_bytes

    device.adapters.evict(1)

    assert 1 not in device.adapters
    assert 2 in device.adapters
    device.assert_holds({2: 1})
    device.release_all()
    device.load(1, 5)
    device.assert_holds({1: 5, 2: 1})
    assert device.adapters.num_free_bytes == free


@on_devices
def test_evicting_what_is_not_on_the_device_is_an_error(device):
    device.load(1, 0, rank=2)
    device.adapters.evict(1)
    for adapter_id in (1, 2):
        with pytest.raises(InternalError, match=f"generation {adapter_id} is evicted but is in no slot"):
            device.adapters.evict(adapter_id)


# --- Loads that fail ----------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize(
    ("adapter_id", "slot", "message"),
    [
        (2, 0, "to slot 0, but has a slot or that one is taken"),
        (1, 5, "generation 1 is loaded to slot 5, but has a slot"),
        (2, -1, "slot -1, expected 0 to 2047"),
        (2, NUM_SLOTS, "slot 2048, expected 0 to 2047"),
    ],
)
def test_load_that_contradicts_what_is_there_changes_nothing_and_frees_its_block(
    device, adapter_id, slot, message
):
    device.load(1, 0, rank=2)
    free = device.adapters.num_free_bytes
    adapter = device.read(2 if adapter_id == 2 else 1, rank=4)

    with pytest.raises(InternalError, match=message):
        device.adapters.load(adapter_id, slot, adapter.layout, adapter.block)

    device.assert_holds({1: 0})
    assert device.adapters.num_free_bytes == free
    device.release_all()


@on_devices
def test_adapter_that_does_not_fit_changes_nothing_and_frees_its_block(setup, tmp_path):
    device = Device(setup, tmp_path, memory_bytes=48 * 1024)
    device.load(1, 0, rank=4)
    free = device.adapters.num_free_bytes
    with pytest.raises(InternalError, match="bytes are to be placed in the arena"):
        device.load(2, 1, rank=5)
    device.assert_holds({1: 0})
    assert device.adapters.num_free_bytes == free
    device.load(3, 1, rank=2)
    device.assert_holds({1: 0, 3: 1})
    device.release_all()
    device.close()


@pytest.mark.parametrize("setup", ["cpu"], indirect=True)
def test_copy_that_fails_leaves_no_trace_of_its_adapter(device, monkeypatch):
    device.load(1, 0, rank=4)
    device.load(2, 1, rank=2)
    device.adapters.evict(1)  # so that 3 needs a compaction
    free = device.adapters.num_free_bytes

    def fail(source, target):
        raise OSError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr("lora_serve.lora.adapter_copies._timed_copy_ms", fail)
        with pytest.raises(OSError, match="no such luck"):
            device.load(3, 0, rank=3)

    device.assert_holds({2: 1})
    assert device.adapters.num_free_bytes == free
    device.release_all()
    device.load(3, 0)
    device.assert_holds({2: 1, 3: 0})


@on_devices
def test_slot_without_its_adapter_has_no_module_until_the_next_one_comes(device):
    device.load(1, 0, rank=2)
    device.adapters.install_nothing(4)
    assert_only_these_slots(device.adapters, device.targets, [0, 4])
    assert set(weights_in_rows(device.adapters, device.targets, 4).values()) == {None}
    assert device.adapters.slots == {1: 0}
    device.load(2, 4, rank=3)
    device.assert_holds({1: 0, 2: 4})
    device.adapters.evict(2)
    device.assert_holds({1: 0})


@on_devices
@pytest.mark.parametrize("slot", [0, -1, NUM_SLOTS])
def test_slot_of_another_adapter_and_one_that_does_not_exist_are_not_emptied(device, slot):
    device.load(1, 0, rank=2)
    device.adapters.install_nothing(slot)
    device.assert_holds({1: 0})


# --- Memory -------------------------------------------------------------------------------------------------


@on_devices
def test_evicted_bytes_are_used_again_at_once(setup, tmp_path):
    """Evict and load in the same plan, in an arena that holds one of them."""
    size = num_exact_bytes(make_full_adapter(tmp_path / "1", rank=8, seed=1))
    device = Device(setup, tmp_path, memory_bytes=align(size, BLOCK_ALIGNMENT))
    device.load(1, 0)
    assert device.adapters.num_free_bytes == 0
    for adapter_id in range(2, 6):
        device.adapters.evict(adapter_id - 1)
        device.load(adapter_id, adapter_id % 2, rank=8)
        device.assert_holds({adapter_id: adapter_id % 2})
    device.close()


@on_devices
def test_compaction_rewrites_what_stands_for_the_moved_adapters_and_no_result_changes(setup, tmp_path):
    device = Device(setup, tmp_path, memory_bytes=256 * 1024)
    ranks = {1: 5, 2: 3, 3: 7, 4: 2, 5: 6, 6: 1, 7: 9}
    for adapter_id, rank in ranks.items():
        device.load(adapter_id, 10 + adapter_id, rank=rank, target_modules=ALL_MODULES)
    for adapter_id in (1, 3, 5):
        device.adapters.evict(adapter_id)
    left = {2: 12, 4: 14, 6: 16, 7: 17}
    before = device.outputs(list(left.values()))
    offsets = {i: device.adapters._residents[i].extent.offset for i in left}
    assert device.adapters._arena._allocator.largest_hole < device.adapters.num_free_bytes

    free = device.adapters.num_free_bytes
    rank = free // (num_exact_bytes(tmp_path / "2") // 3)
    device.load(8, 1, rank=rank, target_modules=ALL_MODULES)

    moved = {i for i in left if device.adapters._residents[i].extent.offset != offsets[i]}
    assert moved >= {2, 4, 6}
    device.assert_holds({**left, 8: 1})
    after = device.outputs(list(left.values()))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(x.abs().sum() > 0 for x in before)
    device.close()


@on_devices
def test_mixed_ranks_of_1_to_64_take_at_most_5_percent_over_their_exact_bytes(setup, tmp_path):
    """That is what is charged for them; and whatever the scheduler lets in by these figures fits."""
    rng = random.Random(0)
    device = Device(setup, tmp_path, memory_bytes=4 * MIB)
    exact, charged, slot_of = {}, {}, {}
    for adapter_id in range(1, 90):
        rank, layers = rng.randint(1, 64), sorted(rng.sample(range(4), rng.randint(1, 4)))
        adapter = device.read(adapter_id, rank=rank, layers=layers)
        exact[adapter_id] = num_exact_bytes(tmp_path / str(adapter_id))
        size = device.adapters.charged_bytes(adapter.num_bytes)
        while sum(charged.values()) + size > device.adapters.memory_bytes:
            victim = rng.choice(list(slot_of))
            device.adapters.evict(victim)
            del slot_of[victim], charged[victim]
        charged[adapter_id] = size
        slot_of[adapter_id] = adapter_id
        device.adapters.load(adapter_id, adapter_id, adapter.layout, adapter.block)
        device.release_all()
        taken = device.adapters.memory_bytes - device.adapters.num_free_bytes
        num_exact = sum(exact[i] for i in slot_of)
        assert num_exact <= taken <= sum(charged.values()) <= 1.05 * num_exact
    device.assert_holds(slot_of)
    assert taken > device.adapters.memory_bytes / 2
    assert device.adapters._arena.num_moved_bytes > 0
    device.close()


@pytest.mark.parametrize("memory_bytes", [1, 255, 256, 100_000, 2**20 + 1, 2**30 - 1, 2**30, 5 * 10**9])
@pytest.mark.parametrize("setup", ["cpu"], indirect=True)
def test_no_more_adapters_than_there_are_rows_fit_into_what_is_charged(setup, tmp_path, memory_bytes):
    device = Device(setup, tmp_path, memory_bytes=memory_bytes)
    charge = device.adapters.charged_bytes(1)
    assert charge % BLOCK_ALIGNMENT == 0
    assert (MAX_RESIDENT_ADAPTERS + 1) * charge > device.adapters.memory_bytes
    assert 2 * MAX_RESIDENT_ADAPTERS <= NUM_SLOTS
    for num_bytes in (1, charge, charge + 1, 10 * charge - 255):
        assert device.adapters.charged_bytes(num_bytes) == max(align(num_bytes, BLOCK_ALIGNMENT), charge)
    device.close()


# --- Blocks -------------------------------------------------------------------------------------------------


class _HeldCopies(CpuCopies):
    """Copies that are not seen to be over before `finish`."""

    def __init__(self, *, is_thread_used=True):
        super().__init__()
        self.is_finished = False
        self._is_thread_used = is_thread_used

    def start_load(self, source, target):
        copy = super().start_load(source, target) if self._is_thread_used else _DoneCopy()
        return _HeldCopy(self, copy)


class _DoneCopy:
    error, copy_ms = None, 0.0

    def join(self):
        pass

    def is_done(self):
        return True


class _HeldCopy:
    def __init__(self, copies, copy):
        self._copies, self._copy = copies, copy
        self.join = copy.join

    def is_done(self):
        return self._copies.is_finished and self._copy.is_done()

    @property
    def error(self):
        return self._copy.error

    @property
    def copy_ms(self):
        return self._copy.copy_ms


@pytest.mark.parametrize("setup", ["cpu"], indirect=True)
def test_block_is_held_until_its_copy_is_over_although_the_adapter_is_used_and_gone(setup, tmp_path):
    copies = _HeldCopies()
    device = Device(setup, tmp_path, copies=copies)
    first, second = device.load(1, 0, rank=2), device.load(2, 1, rank=4)
    device.assert_holds({1: 0, 2: 1})
    device.adapters.evict(1)
    assert device.adapters.release_blocks() == {}
    held = device.pool.snapshot().num_held_bytes
    assert held == first.num_bytes + second.num_bytes

    copies.is_finished = True
    times = device.adapters.release_blocks()

    assert times.keys() == {1, 2}
    assert all(0 <= time < 1e4 for time in times.values())
    assert device.pool.snapshot().num_held_bytes == 0
    assert device.adapters.release_blocks() == {}
    device.close()


@on_devices
def test_close_waits_for_copies_and_lets_go_of_their_blocks_and_twice_is_nothing(device):
    device.load(1, 0, rank=64)
    for _ in range(2):
        device.adapters.close()
        assert device.pool.snapshot().num_held_bytes == 0
    with pytest.raises(InternalError, match="after the copies were closed"):
        device.load(2, 1, rank=2)
    assert device.pool.snapshot().num_held_bytes == 0
    assert device.adapters.slots == {1: 0}


@pytest.mark.parametrize("setup", ["cpu"], indirect=True)
def test_blocks_are_released_in_another_thread_while_adapters_are_loaded(setup, tmp_path):
    """The engine's thread looks for copies that are over while the steps' thread begins new ones."""
    copies = _HeldCopies(is_thread_used=False)
    copies.is_finished = True
    device = Device(setup, tmp_path, copies=copies, only="model.layers.0.self_attn.k_proj")
    adapter = device.read(1, rank=1, target_modules=["k_proj"], layers=[0])
    device.pool.keep(1, adapter.block)
    ends = threading.Event()

    def release():
        while not ends.is_set():
            device.adapters.release_blocks()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as thread:
            releases = thread.submit(release)
            for _ in range(10_000):
                device.adapters.load(1, 0, adapter.layout, device.pool.lease(1))
                device.adapters.evict(1)
            ends.set()
            releases.result(timeout=60)
    finally:
        ends.set()
        sys.setswitchinterval(interval)
    adapter.release()
    device.release_all()
    device.close()


# --- Random life --------------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("seed", range(4))
def test_random_life_keeps_every_adapter_whole(setup, tmp_path, seed):
    rng = random.Random(seed)
    device = Device(setup, tmp_path, memory_bytes=96 * 1024)
    slots, charged = {}, {}
    shapes = {
        adapter_id: {"rank": rng.choice([1, 2, 3, 5, 8]), "target_modules": rng.sample(ALL_MODULES, 3)}
        for adapter_id in range(1, 13)
    }
    for step in range(120):
        adapter_id = rng.randint(1, 12)
        if adapter_id in slots:
            device.adapters.evict(adapter_id)
            del slots[adapter_id], charged[adapter_id]
        else:
            adapter = device.read(adapter_id, **shapes[adapter_id])
            size = device.adapters.charged_bytes(adapter.num_bytes)
            if sum(charged.values()) + size > device.adapters.memory_bytes:
                adapter.release()
                continue
            slot = rng.choice([i for i in range(20) if i not in slots.values()])
            device.adapters.load(adapter_id, slot, adapter.layout, adapter.block)
            slots[adapter_id], charged[adapter_id] = slot, size
        if step % 4 == 0:
            device.assert_holds(slots)
        device.adapters.release_blocks()
    for adapter_id in list(slots):
        device.adapters.evict(adapter_id)
    device.release_all()
    device.assert_holds({})
    assert device.adapters.num_free_bytes == device.adapters.memory_bytes
    device.close()
