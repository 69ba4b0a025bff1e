from __future__ import annotations

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_serve.common.errors import AdapterNotFoundError, InternalError, InvalidArgumentError
from lora_serve.lora.host_adapters import HostNews
from lora_serve.lora.load_cancelled import LoadCancelledError
from lora_serve.lora.manager import NO_SLOT, LoadReports

from .adapter_setup import num_exact_bytes
from .device_setup import on_devices
from .memory_setup import ALL_MODULES, MIB, TIMEOUT_S, Line, Memory, block_of, wait_until
from .peft_setup import make_full_adapter


@pytest.fixture
def make_memory(tmp_path):
    """Makes memories on the CPU."""
    memories = []

    def make(**options):
        memories.append(Memory(tmp_path, **options))
        return memories[-1]

    yield make
    for memory in memories:
        memory.manager.close()


@pytest.fixture
def make_device_memory(setup, make_memory):
    """Makes memories on the test's device."""
    return lambda **options: make_memory(device=setup.device, **options)


def make_two_tier(make, tmp_path, *, num_device=8, num_host=8):
    """A memory that holds so many adapters of rank 2 in each tier."""
    size = block_of(make_full_adapter(tmp_path / "size", rank=2))
    return make(memory_bytes=num_device * size, host_memory_bytes=num_host * size)


def loaded(*adapter_ids, failed=None):
    return LoadReports(list(adapter_ids), failed or {})


# --- Loads --------------------------------------------------------------------------------------------------


@on_devices
def test_adapter_on_the_host_is_usable_in_the_plan_that_loads_it(make_device_memory):
    memory = make_device_memory()
    memory.add(1, target_modules=ALL_MODULES)
    memory.add(2, rank=64)
    assert memory.manager.is_on_host(1)
    assert memory.plan({1: 3, 2: 0}) == loaded(1, 2)
    memory.assert_holds({1: 3, 2: 0})


@on_devices
def test_adapter_that_is_only_on_disk_is_read_again_before_a_plan_may_load_it(make_device_memory):
    memory = make_device_memory()
    memory.add(1)
    memory.add(2)
    memory.evict_from_host()
    assert not memory.manager.is_on_host(1)
    with pytest.raises(InternalError, match="generation 1, which is not on the host"):
        memory.manager.prepare_loads([1])

    memory.read_ahead(1)
    assert memory.residency(1).host.is_being_read
    wait_until(lambda: memory.poll() and memory.manager.is_on_host(1))
    assert memory.plan({1: 0}) == loaded(1)

    memory.assert_holds({1: 0})
    assert memory.residency(1).host.num_reads == 2
    assert memory.residency(2).host.num_reads == 1
    assert memory.news.arrived == [1]


@on_devices
def test_changed_folder_fails_its_own_read_only(make_device_memory):
    memory = make_device_memory()
    changed, _, gone = memory.add(1), memory.add(2), memory.add(3)
    memory.add(4)
    memory.evict_from_host()
    make_full_adapter(changed, rank=2, seed=99)
    shutil.rmtree(gone)

    memory.bring_to_host(1, 2, 3, 4)

    assert sorted(memory.news.arrived) == [2, 4]
    assert memory.news.failed.keys() == {1, 3}
    assert str(changed) in memory.news.failed[1]
    assert "the folder was changed" in memory.news.failed[1]
    assert str(gone) in memory.news.failed[3]
    assert memory.plan({2: 1, 4: 3}) == loaded(2, 4)
    for adapter_id in (1, 3):
        memory.manager.remove(adapter_id)
    make_full_adapter(changed, rank=2, seed=1)
    memory.add(5)
    memory.add(6)
    assert memory.plan({5: 0, 6: 2}) == loaded(5, 6)
    memory.assert_holds({2: 1, 4: 3, 5: 0, 6: 2})


def test_load_finds_the_adapter_described_by_the_thread_that_read_it(make_memory, monkeypatch):
    """To describe an adapter of many modules takes a millisecond, which no step should pay."""
    memory = make_memory()
    memory.add(1)
    memory.add(2)
    monkeypatch.setattr(memory.device, "describe", lambda layout: pytest.fail("described in a step"))
    assert memory.plan({1: 3, 2: 0}) == loaded(1, 2)
    memory.assert_holds({1: 3, 2: 0})
    memory.manager.evict(1)
    assert memory.plan({1: 1}) == loaded(1)
    memory.assert_holds({1: 1, 2: 0})


def test_load_that_contradicts_what_is_there_fails_and_leaves_the_others_alone(make_memory):
    memory = make_memory()
    memory.add(1)
    memory.add(2)
    memory.add(3, rank=64, target_modules=ALL_MODULES)
    memory.plan({1: 0})
    reports = memory.plan({2: 0, 3: 1})
    assert reports.loaded == [3]
    assert "slot 0, but has a slot or that one is taken" in reports.failed[2]
    memory.assert_holds({1: 0, 3: 1})
    wait_until(lambda: memory.poll() and memory.pool.snapshot().num_held_bytes == 0)


def test_load_that_finds_no_room_leaves_its_slot_without_modules(make_memory, tmp_path):
    memory = make_two_tier(make_memory, tmp_path, num_device=2)
    memory.add(1)
    memory.add(2, rank=5)
    reports = memory.plan({1: 0, 2: 7})
    assert reports.loaded == [1]
    assert "to be placed in the arena" in reports.failed[2]
    assert {target.table.get(7)[target.slice_index] for target in memory.targets.values()} == {None}
    memory.manager.remove(2)
    memory.add(3)
    assert memory.plan({3: 7}) == loaded(3)
    memory.assert_holds({1: 0, 3: 7})


def test_adapter_in_front_of_the_line_is_on_the_host_when_a_plan_loads_it(make_memory, monkeypatch):
    memory = make_memory()
    memory.add(1)
    memory.add(2)
    memory.plan({1: 0})
    memory.evict_from_host()
    gate, read_again = threading.Event(), memory.manager._reader.read_again

    def late(*arguments):
        gate.wait(TIMEOUT_S)
        return read_again(*arguments)

    monkeypatch.setattr(memory.manager._reader, "read_again", late)
    memory.read_ahead(2)
    memory.poll()
    assert [entry.host.is_being_read for entry in memory.manager.snapshot()] == [False, True]
    assert memory.manager.num_reads_under_way == 1
    gate.set()
    wait_until(lambda: memory.poll() and memory.news.arrived)
    assert [(entry.tier, entry.host.num_reads) for entry in memory.manager.snapshot()] == [
        ("device", 1),
        ("host", 2),
    ]
    assert memory.plan({2: 1}) == loaded(2)
    memory.assert_holds({1: 0, 2: 1})


# --- Removed ------------------------------------------------------------------------------------------------


def test_read_of_a_removed_adapter_that_ends_later_installs_nothing(make_memory, monkeypatch):
    memory = make_memory()
    path = memory.add(1)
    memory.evict_from_host()
    has_read, gate, read_again = threading.Event(), threading.Event(), memory.manager._reader.read_again

    def late(*arguments):
        adapter = read_again(*arguments)
        has_read.set()
        gate.wait(TIMEOUT_S)
        return adapter

    monkeypatch.setattr(memory.manager._reader, "read_again", late)
    memory.read_ahead(1)
    memory.line = Line()
    assert has_read.wait(TIMEOUT_S)
    memory.manager.remove(1)
    shutil.rmtree(path)
    memory.add(2, seed=5)  # the same name's next generation, perhaps
    assert memory.plan({2: 0}) == loaded(2)
    gate.set()
    wait_until(lambda: memory.poll() and memory.pool.snapshot().num_held_bytes == 0)

    assert (memory.news.arrived, memory.news.failed) == ([], {})
    memory.assert_holds({2: 0})
    assert [block.adapter_id for block in memory.pool.snapshot().adapters] == [2]


def test_removed_adapter_lets_go_of_the_block_that_a_plan_was_to_load(make_memory):
    memory = make_memory()
    memory.add(1)
    memory.manager.prepare_loads([1])
    assert memory.pool.snapshot().num_held_bytes > 0
    memory.manager.remove(1)
    memory.assert_at_start()


@on_devices
def test_nothing_is_left_when_everything_is_removed(make_device_memory):
    memory = make_device_memory()
    for adapter_id in range(1, 7):
        memory.add(adapter_id, rank=adapter_id, target_modules=ALL_MODULES)
    memory.plan({1: 0, 2: 1, 3: 2})
    memory.plan({4: 0}, drained=[1, 99], evicted=[2])
    memory.evict_from_host()
    memory.bring_to_host(2, 5, 6)
    memory.plan({5: 5, 6: 6})
    memory.plan(drained=[3, 4, 5, 6])
    for adapter_id in range(1, 7):
        memory.manager.remove(adapter_id)
    memory.assert_at_start()


def test_adapter_that_is_removed_before_its_copy_was_seen_to_end_leaves_nothing(make_memory):
    memory = make_memory()
    memory.add(1)
    memory.plan({1: 0})
    memory.plan(drained=[1])
    memory.manager.remove(1)
    memory.assert_at_start()


def test_unknown_adapter_is_an_error_and_changes_nothing(make_memory):
    memory = make_memory()
    memory.add(1)
    memory.plan({1: 0})
    manager = memory.manager
    for call in (manager.remove, manager.touch, lambda adapter_id: manager.prepare_loads([adapter_id])):
        with pytest.raises(AdapterNotFoundError, match="generation 9"):
            call(9)
    with pytest.raises(InternalError, match="generation 9 is evicted but is in no slot"):
        manager.evict(9)
    manager.free(9)
    memory.assert_holds({1: 0})


# --- Little memory ------------------------------------------------------------------------------------------


@on_devices
def test_evicted_bytes_are_used_by_a_load_of_the_same_plan(make_device_memory, tmp_path):
    memory = make_two_tier(make_device_memory, tmp_path, num_device=2)
    for adapter_id in (1, 2, 3, 4):
        memory.add(adapter_id)
    memory.plan({1: 0, 2: 1})
    assert memory.device.num_free_bytes == 0
    assert memory.plan({3: 0}, evicted=[1]) == loaded(3)
    assert memory.plan({4: 1, 1: 2}, evicted=[3], drained=[2]) == loaded(4, 1)
    memory.assert_holds({4: 1, 1: 2})


def test_blocks_leave_the_host_only_in_poll_and_never_while_a_plan_holds_them(make_memory, tmp_path):
    memory = make_two_tier(make_memory, tmp_path, num_host=2)
    memory.add(1)
    memory.add(2)
    manager = memory.manager
    path = make_full_adapter(tmp_path / "3", rank=2, seed=3)
    with ThreadPoolExecutor(1) as thread:
        manager.prepare_loads([1])
        read = thread.submit(manager.read, str(path))
        wait_until(lambda: memory.pool.snapshot().num_waiters == 1)
        assert [manager.is_on_host(i) for i in (1, 2)] == [True, True]
        assert manager.poll().evicted == [2]
        with read.result(TIMEOUT_S) as adapter:
            manager.add(3, adapter)
        again = thread.submit(manager.read, str(tmp_path / "2"))
        wait_until(lambda: memory.pool.snapshot().num_waiters == 1)
        assert manager.poll().evicted == [3]
        again.result(TIMEOUT_S).release()
        assert manager.is_on_host(1)
        assert manager.take_loads({1: 0}) == loaded(1)
    memory.assert_holds({1: 0})


@on_devices
def test_host_memory_for_one_adapter_lets_loads_go_one_after_the_other(make_device_memory, tmp_path):
    memory = make_two_tier(make_device_memory, tmp_path, num_host=1)
    slots = {adapter_id: 10 + adapter_id for adapter_id in range(1, 8)}
    for adapter_id in slots:
        memory.add(adapter_id)
    for adapter_id, slot in slots.items():
        memory.bring_to_host(adapter_id)
        assert memory.plan({adapter_id: slot}) == loaded(adapter_id)
    memory.assert_holds(slots)


def test_read_for_a_new_name_goes_on_beside_plans_when_copies_end(make_memory, tmp_path):
    memory = make_two_tier(make_memory, tmp_path, num_host=1)
    memory.add(1)
    manager = memory.manager
    manager.prepare_loads([1])
    with ThreadPoolExecutor(1) as thread:
        path = make_full_adapter(tmp_path / "2", rank=2, seed=2)
        read = thread.submit(manager.read, str(path))
        wait_until(lambda: memory.pool.snapshot().num_waiters == 1)
        assert manager.poll() == HostNews()
        assert manager.take_loads({1: 0}) == loaded(1)
        assert not read.done()
        wait_until(lambda: memory.poll() and read.done())
        with read.result() as adapter:
            manager.add(2, adapter)
    assert memory.news.evicted == [1]
    assert memory.plan({2: 1}) == loaded(2)
    memory.assert_holds({1: 0, 2: 1})


def test_caller_is_woken_when_room_is_wanted_and_when_a_read_has_ended(make_memory, tmp_path):
    memory = make_two_tier(make_memory, tmp_path, num_host=1)
    memory.add(1)
    memory.add(2)
    wakes = []
    memory.manager.set_wake(lambda: wakes.append("wake"))
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(memory.manager.read, str(tmp_path / "1"))
        wait_until(lambda: wakes)  # room is wanted
        assert memory.manager.poll().evicted == [2]
        read.result(TIMEOUT_S).release()
    wakes.clear()
    memory.read_ahead(1)
    wait_until(lambda: wakes)
    assert memory.manager.poll().arrived == [1]


def test_charge_of_an_adapter_is_its_bytes_and_never_lets_in_more_than_there_are_rows(make_memory):
    memory = make_memory(memory_bytes=16 * MIB)
    assert memory.manager.memory_bytes == 16 * MIB
    large = memory.read(make_full_adapter(memory.tmp_path / "large", rank=64))
    tiny = memory.read(
        make_full_adapter(memory.tmp_path / "tiny", rank=1, target_modules=["k_proj"], layers=[0])
    )
    assert memory.manager.charged_bytes(large) == large.num_bytes
    assert num_exact_bytes(memory.tmp_path / "large") == pytest.approx(large.num_bytes, rel=0.01)
    assert memory.manager.charged_bytes(tiny) == 16 * 1024 > tiny.num_bytes
    for adapter in (large, tiny):
        adapter.release()


# --- What is told -------------------------------------------------------------------------------------------


def test_snapshot_tells_tiers_bytes_ranks_and_the_stages_of_loads(make_memory):
    memory = make_memory()
    path = memory.add(1, rank=2, target_modules=["o_proj", "embed_tokens"])
    memory.add(2, rank=5)
    memory.add(3)
    memory.plan({2: 4})
    memory.evict_from_host()
    memory.add(4)
    memory.read_ahead(3)
    first, second, third, fourth = memory.manager.snapshot()
    assert [entry.adapter_id for entry in memory.manager.snapshot()] == [1, 2, 3, 4]
    assert [entry.tier for entry in (first, second, third, fourth)] == ["disk", "device", "disk", "host"]
    assert [entry.adapter_slot for entry in (first, second)] == [NO_SLOT, 4]
    assert [entry.host.is_being_read for entry in (first, second, third)] == [False, False, True]
    assert (first.host.layout.lora_rank, second.host.layout.lora_rank) == (2, 5)
    assert first.host.layout.target_modules == ("embed_tokens", "o_proj")
    assert num_exact_bytes(path) == pytest.approx(first.host.layout.num_bytes, abs=255)
    assert first.load_ms.keys() == {"locate", "check", "room", "read"}
    assert second.load_ms.keys() == {*first.load_ms, "copy"}
    assert all(0 <= milliseconds < 1e5 for milliseconds in second.load_ms.values())


def test_rank_limit_and_name_reach_the_error(make_memory, tmp_path):
    memory = make_memory(max_lora_rank=4)
    path = make_full_adapter(tmp_path / "a", rank=5)
    with pytest.raises(InvalidArgumentError, match="'sql' has lora_rank 5 but max_lora_rank is 4"):
        memory.manager.read(str(path), "sql")
    memory.assert_at_start()
    with pytest.raises(InvalidArgumentError, match="max_lora_rank is 0"):
        make_memory(max_lora_rank=0)


@on_devices
def test_weights_are_in_the_models_dtype(make_device_memory):
    memory = make_device_memory(dtype=torch.bfloat16)
    memory.add(1, rank=3, target_modules=ALL_MODULES)
    memory.plan({1: 0})
    memory.assert_holds({1: 0})


# --- Two threads --------------------------------------------------------------------------------------------


def test_adapters_can_be_added_and_looked_up_while_others_come_and_go(make_memory):
    memory = make_memory()
    memory.add(1)
    memory.add(2, rank=4)
    manager = memory.manager
    ends = threading.Event()
    turn, stepped = threading.Semaphore(0), threading.Semaphore(0)

    def run_steps():
        slot = 0
        while turn.acquire(timeout=TIMEOUT_S) and not ends.is_set():
            slot = 1 - slot
            assert sorted(manager.take_loads({1: slot, 2: 2 + slot}).loaded) == [1, 2]
            stepped.release()
            manager.evict(1)
            manager.free(2)

    with ThreadPoolExecutor(1) as pool:
        steps = pool.submit(run_steps)
        for adapter_id in range(3, 120):
            manager.prepare_loads([1, 2])
            turn.release()
            memory.add(adapter_id, rank=1, target_modules=["k_proj"], layers=[0])
            manager.poll()
            held = manager.snapshot()
            assert [entry.adapter_id for entry in held] == [1, 2, adapter_id]
            assert {entry.adapter_slot for entry in held} <= {NO_SLOT, 0, 1, 2, 3}
            manager.remove(adapter_id)
            assert stepped.acquire(timeout=TIMEOUT_S)
        ends.set()
        turn.release()
        steps.result(timeout=TIMEOUT_S)
    for adapter_id in (1, 2):
        manager.remove(adapter_id)
    memory.assert_at_start()


@on_devices
@pytest.mark.parametrize("seed", range(4))
def test_random_life_ends_as_it_began(make_device_memory, tmp_path, seed):
    """Plans as the scheduler makes them: bytes are counted, evictions come with the loads that need them."""
    rng = random.Random(seed)
    memory = make_two_tier(make_device_memory, tmp_path, num_device=5, num_host=4)
    manager = memory.manager
    added, slots, charged, next_id = set(), {}, {}, 1

    def run_plan():
        wanted = [i for i in sorted(added) if i not in slots and manager.is_on_host(i)]
        loads, evicted = {}, []
        for adapter_id in rng.sample(wanted, min(len(wanted), rng.randint(0, 3))):
            size = charged[adapter_id]
            held = sum(charged[i] for i in [*slots, *loads] if i not in evicted)
            while held + size > manager.memory_bytes and set(slots) - set(evicted):
                victim = rng.choice(sorted(set(slots) - set(evicted)))
                evicted.append(victim)
                held -= charged[victim]
            if held + size > manager.memory_bytes:
                break
            taken = {*loads.values(), *(slot for i, slot in slots.items() if i not in evicted)}
            loads[adapter_id] = min(set(range(20)) - taken)
        for adapter_id in evicted:
            del slots[adapter_id]
        assert memory.plan(loads, evicted) == loaded(*loads)
        slots.update(loads)

    for step in range(250):
        action = rng.random()
        if action < 0.15 and len(added) < 9:
            memory.add(next_id, rank=rng.choice([1, 2, 3]), target_modules=rng.sample(ALL_MODULES, 5))
            added.add(next_id)
            with memory.read(tmp_path / str(next_id)) as adapter:
                charged[next_id] = manager.charged_bytes(adapter)
            next_id += 1
        elif action < 0.25 and added:
            victim = rng.choice(sorted(added))
            if slots.pop(victim, None) is not None:
                memory.plan(drained=[victim])
            manager.remove(victim)
            added.discard(victim)
            memory.line = Line()
        elif action < 0.4 and added:
            memory.line = Line(*rng.sample(sorted(added), rng.randint(0, len(added))))
            manager.touch(rng.choice(sorted(added)))
        elif action < 0.7:
            memory.poll()
        else:
            memory.poll()
            run_plan()
        if step % 5 == 0:
            memory.assert_holds(slots)
    memory.assert_holds(slots)
    memory.plan(drained=list(slots))
    memory.line = Line()
    for adapter_id in added:
        manager.remove(adapter_id)
    memory.assert_at_start()
    assert memory.news.failed == {}


# --- The end ------------------------------------------------------------------------------------------------


@on_devices
def test_close_frees_what_plans_and_reads_held_and_twice_is_nothing(make_device_memory, tmp_path):
    memory = make_two_tier(make_device_memory, tmp_path, num_host=3)
    for adapter_id in (1, 2, 3, 4):
        memory.add(adapter_id)
    memory.plan({4: 0})
    memory.manager.prepare_loads([3])
    memory.read_ahead(1)
    with ThreadPoolExecutor(1) as thread:
        blocks = [memory.pool.reserve(1, lambda: False)] if memory.pool.snapshot().num_free_bytes else []
        memory.manager.close()
        memory.manager.close()
        with pytest.raises(LoadCancelledError):
            thread.submit(memory.manager.read, str(tmp_path / "1")).result(TIMEOUT_S)
    for block in blocks:
        block.release()
    # Whoever gives the last block back closes the slab, a moment later.
    wait_until(lambda: memory.pool.slab.tensor.numel() == 0)
    assert memory.pool.snapshot().num_free_bytes == memory.pool.snapshot().num_bytes


def test_close_ends_reads_that_wait_for_room(make_memory, tmp_path):
    memory = make_two_tier(make_memory, tmp_path, num_host=1)
    memory.add(1)
    memory.add(2)
    memory.manager.prepare_loads([2])
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(memory.manager.read, str(tmp_path / "1"))
        wait_until(lambda: memory.pool.snapshot().num_waiters == 1)
        memory.manager.close()
        with pytest.raises(LoadCancelledError):
            read.result(TIMEOUT_S)
    wait_until(lambda: memory.pool.snapshot().num_waiters == 0)
    assert memory.pool.snapshot().num_free_bytes == memory.pool.snapshot().num_bytes


def test_close_frees_the_host_also_where_the_device_cannot_be_waited_for(make_memory, tmp_path, monkeypatch):
    memory = make_two_tier(make_memory, tmp_path, num_host=1)
    memory.add(1)
    memory.add(2)
    memory.manager.prepare_loads([2])

    def fail():
        raise RuntimeError("CUDA error: unspecified launch failure")

    with ThreadPoolExecutor(1) as thread, monkeypatch.context() as patch:
        read = thread.submit(memory.manager.read, str(tmp_path / "1"))
        wait_until(lambda: memory.pool.snapshot().num_waiters == 1)
        patch.setattr(memory.manager._device, "close", fail)
        with pytest.raises(RuntimeError, match="launch failure"):
            memory.manager.close()
        with pytest.raises(LoadCancelledError):
            read.result(TIMEOUT_S)
    wait_until(lambda: memory.pool.snapshot().num_free_bytes == memory.pool.snapshot().num_bytes)
