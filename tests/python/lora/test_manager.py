from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora.adapter_setup import (
    entries_of_slot,
    make_adapter,
    make_manager,
    make_targets,
    read_adapter,
    tables_of,
)
from lora_serve.common.errors import AdapterNotFoundError, InternalError, InvalidArgumentError
from lora_serve.kernels import LoRALayerTable
from lora_serve.layers.linear import LoRATarget
from lora_serve.lora import NO_SLOT, LoRAManager


def loaded_manager(targets, tmp_path, *adapters, **options):
    """A manager that holds adapters 1, 2, ... made with the given options."""
    manager = make_manager(targets, **options)
    for adapter_id, adapter_options in enumerate(adapters, 1):
        path = make_adapter(tmp_path / str(adapter_id), seed=adapter_id, **adapter_options)
        manager.add(adapter_id, manager.read(str(path)))
    return manager


def test_installed_weights_stand_at_their_slice_of_every_table(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 3, "use_rslora": True, "alpha": 5})
    manager.install(1, 7)
    adapter = read_adapter(tmp_path / "1")
    assert len(adapter.modules) == len(targets) == 28
    for module, target in targets.items():
        entry = target.table.get(7)
        assert entry is not None
        installed = entry[target.slice_index]
        assert installed is not None
        assert torch.equal(installed.a, adapter.modules[module].a)
        assert torch.equal(installed.b, adapter.modules[module].b)
        assert installed.scaling == pytest.approx(5 / 3**0.5, rel=1e-15)
        assert installed.a.shape == (3, target.in_features)
        assert installed.b.shape == (3, target.out_features)


def test_missing_modules_are_written_as_none_in_every_table(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2, "target_modules": ["k_proj"], "layers": [2]})
    manager.install(1, 0)
    for module, target in targets.items():
        entry = target.table.get(0)
        assert entry is not None, f"{module} has no entry: its operator would refuse the slot"
        assert (entry[target.slice_index] is not None) == (module == "model.layers.2.self_attn.k_proj")


def test_reused_slot_carries_nothing_over_from_an_adapter_with_more_modules(tmp_path):
    targets = make_targets()
    few = {"rank": 2, "target_modules": ["up_proj"], "layers": [1]}
    manager = loaded_manager(targets, tmp_path, {"rank": 8}, few)
    manager.install(1, 3)
    manager.install(2, 3)
    fresh = make_targets()
    loaded_manager(fresh, tmp_path / "fresh", {"rank": 8}, few).install(2, 3)
    for reused, expected in zip(entries_of_slot(targets, 3), entries_of_slot(fresh, 3), strict=True):
        assert reused is not None
        assert expected is not None
        assert [m is None for m in reused] == [m is None for m in expected]
    assert [r.adapter_slot for r in manager.snapshot()] == [NO_SLOT, 3]


def test_adapter_that_lost_its_slot_can_be_installed_again(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2}, {"rank": 4})
    manager.install(1, 0)
    manager.install(2, 0)
    manager.install(1, 1)
    assert [r.adapter_slot for r in manager.snapshot()] == [1, 0]
    assert {table.installed_slots for table in tables_of(targets)} == {(0, 1)}


def test_adapter_that_moves_leaves_its_old_slot_empty(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2})
    manager.install(1, 0)
    manager.install(1, 5)
    manager.install(1, 5)
    assert {table.installed_slots for table in tables_of(targets)} == {(5,)}
    assert [r.adapter_slot for r in manager.snapshot()] == [5]


def test_slots_do_not_disturb_each_other(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2}, {"rank": 4})
    manager.install(1, 0)
    before = entries_of_slot(targets, 0)
    manager.install(2, 1)
    manager.remove(2)
    assert entries_of_slot(targets, 0) == before
    assert entries_of_slot(targets, 1) == [None] * len(before)


def test_evicted_adapter_is_in_no_table_and_can_be_installed_again(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2}, {"rank": 4})
    manager.install(1, 0)
    manager.install(2, 1)
    before = entries_of_slot(targets, 0)
    other = entries_of_slot(targets, 1)

    manager.evict(1)

    assert [r.adapter_slot for r in manager.snapshot()] == [NO_SLOT, 1]
    assert entries_of_slot(targets, 0) == [None] * len(before)
    assert entries_of_slot(targets, 1) == other
    assert 1 in manager
    manager.install(1, 3)
    for again, first in zip(entries_of_slot(targets, 3), before, strict=True):
        assert [m is None for m in again] == [m is None for m in first]
        assert all(m is n or torch.equal(m.a, n.a) for m, n in zip(again, first, strict=True))


def test_evicting_what_is_not_on_the_device_is_an_error(tmp_path):
    manager = loaded_manager(make_targets(), tmp_path, {"rank": 2})
    with pytest.raises(InternalError, match="generation 1 is evicted but is in no slot"):
        manager.evict(1)
    with pytest.raises(AdapterNotFoundError):
        manager.evict(2)


def test_adapters_can_be_added_and_looked_up_while_others_come_and_go(tmp_path):
    manager = loaded_manager(make_targets(), tmp_path, {"rank": 2}, {"rank": 4})
    adapter = manager.read(str(tmp_path / "1"))
    ends = threading.Event()

    def run_steps():
        while not ends.is_set():
            for adapter_id in (1, 2):
                manager.install(adapter_id, adapter_id)
            for adapter_id in (1, 2):
                manager.evict(adapter_id)

    with ThreadPoolExecutor(1) as pool:
        steps = pool.submit(run_steps)
        for adapter_id in range(3, 1500):
            manager.add(adapter_id, adapter)
            held = manager.snapshot()
            assert [r.adapter_id for r in held] == [1, 2, adapter_id]
            assert {r.adapter_slot for r in held} <= {NO_SLOT, 1, 2}
            manager.remove(adapter_id)
            assert adapter_id not in manager
        ends.set()
        steps.result(timeout=30)


@pytest.mark.parametrize("is_installed", [True, False])
def test_nothing_is_left_of_a_removed_adapter(is_installed, tmp_path):
    targets = make_targets()
    manager = make_manager(targets)
    adapter = manager.read(str(make_adapter(tmp_path / "a", rank=2)))
    manager.add(1, adapter)
    if is_installed:
        manager.install(1, 0)
    tensors = [
        weakref.ref(tensor) for weights in adapter.modules.values() for tensor in (weights.a, weights.b)
    ]
    adapter_ref = weakref.ref(adapter)
    del adapter
    assert adapter_ref() is not None
    manager.remove(1)
    gc.collect()
    assert adapter_ref() is None
    assert not any(tensor() is not None for tensor in tensors)
    assert manager.snapshot() == []
    assert 1 not in manager
    assert {table.installed_slots for table in tables_of(targets)} == {()}


def test_unknown_adapter_is_an_error_and_changes_nothing(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2})
    manager.install(1, 0)
    for call in (lambda: manager.install(9, 0), lambda: manager.remove(9)):
        with pytest.raises(AdapterNotFoundError, match="generation 9"):
            call()
    manager.remove(1)
    with pytest.raises(AdapterNotFoundError, match="generation 1"):
        manager.remove(1)
    assert manager.snapshot() == []


def test_id_is_added_once_and_from_one(tmp_path):
    manager = loaded_manager(make_targets(), tmp_path, {"rank": 2})
    adapter = read_adapter(tmp_path / "1")
    for adapter_id in (0, -1, 1):
        with pytest.raises(InternalError, match="expected a new number"):
            manager.add(adapter_id, adapter)
    assert 1 in manager


def test_negative_slot_is_refused_and_changes_nothing(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2})
    manager.install(1, 2)
    with pytest.raises(InternalError, match="slot -1"):
        manager.install(1, -1)
    assert {table.installed_slots for table in tables_of(targets)} == {(2,)}


def test_failed_install_leaves_every_table_as_it_was(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2}, {"rank": 4})
    manager.install(1, 0)
    before = entries_of_slot(targets, 0)
    other = LoRATarget(LoRALayerTable((99,), 24), 0, 24, 99)
    broken = LoRAManager({**targets, "model.layers.9.self_attn.q_proj": other}, torch.float32, "cpu", 64)
    adapter = read_adapter(tmp_path / "2")
    wrong = {**adapter.modules, "model.layers.9.self_attn.q_proj": next(iter(adapter.modules.values()))}
    broken.add(2, type(adapter)(adapter.path, wrong, adapter.content_digest, 1, 4))
    with pytest.raises(ValueError, match="slice 0"):
        broken.install(2, 0)
    assert entries_of_slot(targets, 0) == before


def test_adapter_with_a_foreign_module_is_refused(tmp_path):
    manager = make_manager({k: v for k, v in make_targets().items() if "layers.3" not in k})
    make_adapter(tmp_path / "a", rank=2)
    with pytest.raises(InternalError, match=r"model\.layers\.3"):
        manager.add(1, read_adapter(tmp_path / "a"))


def test_weights_are_in_the_models_dtype_on_its_device(tmp_path):
    targets = make_targets()
    manager = loaded_manager(targets, tmp_path, {"rank": 2}, dtype=torch.bfloat16, device="cpu")
    manager.install(1, 0)
    for entry in entries_of_slot(targets, 0):
        for weights in entry or ():
            assert weights is not None
            assert weights.a.dtype == weights.b.dtype == torch.bfloat16
            assert weights.a.device == torch.device("cpu")


def test_snapshot_tells_bytes_and_ranks(tmp_path):
    manager = loaded_manager(
        make_targets(), tmp_path, {"rank": 2, "target_modules": ["o_proj"], "layers": [0]}, {"rank": 5}
    )
    manager.install(2, 4)
    first, second = manager.snapshot()
    assert (first.adapter_id, first.adapter_slot, first.lora_rank) == (1, NO_SLOT, 2)
    assert first.num_bytes == 4 * 2 * (32 + 24)
    assert first.target_modules == ("o_proj",)
    assert (second.adapter_id, second.adapter_slot, second.lora_rank) == (2, 4, 5)


def test_rank_limit_and_name_reach_the_error(tmp_path):
    manager = make_manager(make_targets(), max_lora_rank=4)
    path = make_adapter(tmp_path / "a", rank=5)
    with pytest.raises(InvalidArgumentError, match="'sql' has lora_rank 5 but max_lora_rank is 4"):
        manager.read(str(path), "sql")
    with pytest.raises(InvalidArgumentError, match="max_lora_rank is 0"):
        make_manager(make_targets(), max_lora_rank=0)


def test_two_targets_on_one_slice_are_refused():
    table = LoRALayerTable((4,), 4)
    targets = {name: LoRATarget(table, 0, 4, 4) for name in ("a", "b")}
    with pytest.raises(InternalError, match="'a' and 'b'"):
        make_manager(targets)


def test_reads_in_several_threads_give_what_one_thread_gives(tmp_path):
    manager = make_manager(make_targets())
    paths = [str(make_adapter(tmp_path / str(seed), rank=3, seed=seed)) for seed in range(4)]
    alone = [manager.read(path).content_digest for path in paths]
    with ThreadPoolExecutor(4) as pool:
        together = [adapter.content_digest for adapter in pool.map(manager.read, paths * 5)]
    assert together == alone * 5
    assert len(set(alone)) == 4
