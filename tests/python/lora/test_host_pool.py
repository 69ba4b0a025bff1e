from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from lora_serve.common.errors import CapacityError, InternalError, InvalidArgumentError
from lora_serve.lora import host_pool
from lora_serve.lora.adapter_layout import BLOCK_ALIGNMENT
from lora_serve.lora.eviction_order import EvictionOrder
from lora_serve.lora.host_pool import HostBlock, HostPool
from lora_serve.lora.load_cancelled import LoadCancelledError

UNIT = BLOCK_ALIGNMENT
CUDA = pytest.param(True, marks=pytest.mark.gpu, id="pinned")
TIMEOUT_S = 60


def never() -> bool:
    return False


def keep_new(pool: HostPool, adapter_id: int, num_units: int) -> None:
    with pool.reserve(num_units * UNIT, never) as block:
        pool.keep(adapter_id, block)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def kept(pool: HostPool) -> list[int]:
    return [state.adapter_id for state in pool.snapshot().adapters]


class Loaders:
    """Threads in `HostPool.reserve`, begun one after another, each seen waiting before the next begins."""

    def __init__(self, pool: HostPool) -> None:
        self.pool = pool
        self.threads = ThreadPoolExecutor(8)
        self.num_waiting = 0

    def reserve(self, num_units: int, is_cancelled: Callable[[], bool] = never) -> Future[HostBlock]:
        future = self.threads.submit(self.pool.reserve, num_units * UNIT, is_cancelled)
        self.num_waiting += 1
        wait_until(lambda: self.pool.snapshot().num_waiters == self.num_waiting or future.done())
        return future

    def served(self, *futures: Future[HostBlock]) -> list[HostBlock]:
        blocks = [future.result(TIMEOUT_S) for future in futures]
        self.num_waiting -= len(blocks)
        return blocks


@pytest.fixture(autouse=True)
def waiting_has_no_end(request, monkeypatch):
    """A lost wake-up shows as a thread that never comes back, not as one that comes a little later."""
    if "cancel" not in request.node.name:
        monkeypatch.setattr(host_pool, "_CANCEL_POLL_S", 1000.0)


@pytest.fixture
def pool():
    pool = HostPool(10 * UNIT, is_pinned=False)
    yield pool
    pool.close()


@pytest.fixture
def loaders(pool):
    loaders = Loaders(pool)
    yield loaders
    pool.close()
    loaders.threads.shutdown()


def test_kept_block_is_found_with_its_content(pool):
    with pool.reserve(3 * UNIT - 1, never) as block:
        assert block.tensor.shape == (3 * UNIT - 1,)
        assert block.tensor.is_contiguous()
        assert block.tensor.data_ptr() % UNIT == 0
        block.tensor.fill_(7)
        assert pool.lease(1) is None
        pool.keep(1, block)

    with pool.lease(1) as leased:
        assert bool((leased.tensor == 7).all())
    assert pool.lease(2) is None
    assert pool.contains(1)
    assert not pool.contains(2)


def test_block_that_was_not_kept_is_free_after_its_release(pool):
    block = pool.reserve(10 * UNIT, never)
    assert pool.snapshot().num_free_bytes == 0
    block.release()
    block.release()
    assert pool.snapshot().num_free_bytes == 10 * UNIT


def test_released_block_cannot_be_used(pool):
    block = pool.reserve(UNIT, never)
    block.release()
    with pytest.raises(InternalError, match="after its release"):
        _ = block.tensor
    with pytest.raises(InternalError, match="released"):
        pool.keep(1, block)


def test_second_block_of_an_adapter_is_refused(pool):
    keep_new(pool, 1, 1)
    with pool.reserve(UNIT, never) as block:
        with pytest.raises(InternalError, match="kept twice"):
            pool.keep(1, block)
        pool.keep(2, block)
        with pytest.raises(InternalError, match="kept twice"):
            pool.keep(3, block)
    assert kept(pool) == [1, 2]


def test_block_larger_than_the_pool_is_refused_with_both_sizes(pool):
    with pytest.raises(CapacityError, match=f"takes {10 * UNIT + 1} bytes .* is {10 * UNIT} bytes; raise"):
        pool.reserve(10 * UNIT + 1, never)
    assert pool.snapshot().num_waiters == 0


def test_least_recently_used_block_makes_room(pool, loaders):
    for adapter_id in (1, 2, 3, 4, 5):
        keep_new(pool, adapter_id, 2)
    pool.lease(1).release()
    pool.touch(2)

    reserving = loaders.reserve(2)
    assert not reserving.done()
    assert pool.make_room() == [3]
    (block,) = loaders.served(reserving)
    block.release()
    assert kept(pool) == [1, 2, 4, 5]
    assert pool.snapshot().num_evictions == 1


def test_nothing_is_evicted_before_somebody_makes_room(pool, loaders):
    keep_new(pool, 1, 10)
    reserving = loaders.reserve(1)
    assert pool.contains(1)
    with pool.lease(1) as block:
        assert block.tensor.numel() == 10 * UNIT
        assert pool.make_room() == []
    assert pool.make_room() == [1]
    loaders.served(reserving)[0].release()


def test_leased_block_stays_until_its_last_lease_ends(pool, loaders):
    keep_new(pool, 1, 10)
    leases = [pool.lease(1), pool.lease(1)]
    leases[0].tensor.fill_(9)

    reserving = loaders.reserve(4)
    leases[0].release()
    assert pool.make_room() == []
    assert bool((leases[1].tensor == 9).all())
    leases[1].release()
    assert pool.make_room() == [1]
    loaders.served(reserving)[0].release()


def test_block_is_not_evicted_between_keep_and_release(pool, loaders):
    block = pool.reserve(10 * UNIT, never)
    reserving = loaders.reserve(4)
    pool.keep(1, block)
    assert pool.make_room() == []
    block.release()
    assert pool.make_room() == [1]
    loaders.served(reserving)[0].release()


def test_dropped_block_is_not_found_and_freed_with_its_last_lease(pool):
    keep_new(pool, 1, 10)
    lease = pool.lease(1)
    lease.tensor.fill_(5)
    pool.drop(1)
    pool.drop(1)

    assert pool.lease(1) is None
    snapshot = pool.snapshot()
    assert (snapshot.num_free_bytes, snapshot.num_held_bytes, snapshot.adapters) == (0, 10 * UNIT, ())
    assert bool((lease.tensor == 5).all())
    lease.release()
    assert pool.snapshot().num_free_bytes == 10 * UNIT


def test_block_that_was_dropped_while_held_cannot_be_kept_again(pool):
    with pool.reserve(UNIT, never) as block:
        pool.keep(1, block)
        pool.drop(1)
        with pytest.raises(InternalError, match="kept twice"):
            pool.keep(1, block)
    assert kept(pool) == []


def test_waiters_are_served_in_their_order_though_a_later_one_would_fit(pool, loaders):
    large, small = pool.reserve(7 * UNIT, never), pool.reserve(3 * UNIT, never)
    first, second, third = loaders.reserve(6), loaders.reserve(3), loaders.reserve(1)

    small.release()
    time.sleep(0.02)
    assert not second.done()
    assert not third.done()
    large.release()
    blocks = loaders.served(first, second, third)
    assert [block.tensor.numel() for block in blocks] == [6 * UNIT, 3 * UNIT, UNIT]
    for block in blocks:
        block.release()


def test_one_call_makes_room_for_all_waiters_as_far_as_leases_allow(pool, loaders):
    for adapter_id in (1, 2, 3, 4, 5):
        keep_new(pool, adapter_id, 2)
    lease = pool.lease(3)
    waiting = [loaders.reserve(2) for _ in range(5)]

    assert pool.make_room() == [1, 2, 4, 5]
    blocks = loaders.served(*waiting[:4])
    assert not waiting[4].done()
    for block in blocks:
        block.tensor.fill_(1)
    lease.release()
    assert waiting[4].done() or pool.make_room() in ([3], [])
    for block in blocks:
        block.release()
    loaders.served(waiting[4])[0].release()


@pytest.mark.parametrize("is_first", [True, False])
def test_cancelled_waiter_leaves_and_lets_the_next_one_through(pool, loaders, is_first):
    full = pool.reserve(10 * UNIT, never)
    cancelled = threading.Event()
    others = [] if is_first else [loaders.reserve(1)]
    waiting = loaders.reserve(9, cancelled.is_set)
    others.append(loaders.reserve(1))

    cancelled.set()
    with pytest.raises(LoadCancelledError, match="cancelled"):
        waiting.result(TIMEOUT_S)
    loaders.num_waiting -= 1
    full.release()
    for block in loaders.served(*others):
        block.release()
    assert pool.snapshot().num_free_bytes == 10 * UNIT


def test_cancelled_first_waiter_passes_on_the_room_that_was_too_small_for_it(pool, loaders):
    held = pool.reserve(8 * UNIT, never)
    cancelled = threading.Event()
    large, small = loaders.reserve(5, cancelled.is_set), loaders.reserve(2)
    cancelled.set()
    with pytest.raises(LoadCancelledError):
        large.result(TIMEOUT_S)
    loaders.num_waiting -= 1
    loaders.served(small)[0].release()
    held.release()


def test_cancelled_load_takes_no_room_even_where_there_is_some(pool):
    with pytest.raises(LoadCancelledError):
        pool.reserve(UNIT, lambda: True)
    snapshot = pool.snapshot()
    assert (snapshot.num_free_bytes, snapshot.num_waiters) == (10 * UNIT, 0)


def test_error_in_the_cancel_check_leaves_no_trace(pool):
    def broken() -> bool:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        pool.reserve(UNIT, broken)
    snapshot = pool.snapshot()
    assert (snapshot.num_free_bytes, snapshot.num_waiters) == (10 * UNIT, 0)


def test_callbacks_may_use_the_pool():
    wanted = threading.Event()
    pool = HostPool(10 * UNIT, is_pinned=False, on_room_wanted=lambda: pool.make_room() and wanted.set())
    keep_new(pool, 1, 10)

    with pool.reserve(UNIT, lambda: pool.contains(99)) as block:
        assert block.tensor.numel() == UNIT
    assert wanted.is_set()
    pool.close()


# --- Room at once -------------------------------------------------------------------------------------------


def test_room_at_once_evicts_nobody_unless_told_in_which_order(pool):
    keep_new(pool, 1, 4)
    keep_new(pool, 2, 4)
    block, evicted = pool.try_reserve(2 * UNIT)
    assert (block.tensor.numel(), evicted) == (2 * UNIT, [])
    assert pool.try_reserve(UNIT) == (None, [])
    assert kept(pool) == [1, 2]
    block.release()

    block, evicted = pool.try_reserve(5 * UNIT, EvictionOrder([1]))
    assert evicted == [2]
    assert kept(pool) == [1]
    assert pool.snapshot().num_evictions == 1
    with block:
        assert pool.try_reserve(10 * UNIT, EvictionOrder()) == (None, []), "one part of it is held"
    assert kept(pool) == [1]


def test_room_at_once_is_not_taken_from_those_whose_turn_comes_first(pool):
    for adapter_id in range(1, 6):
        keep_new(pool, adapter_id, 2)
    taken = []
    while True:
        block, evicted = pool.try_reserve(2 * UNIT, EvictionOrder([4, 2, 9, 1], for_adapter=9))
        taken += evicted
        if block is None:
            break
    assert taken == [3, 5, 1]
    assert kept(pool) == [2, 4]


def test_room_at_once_overtakes_nobody_who_waits(pool, loaders):
    keep_new(pool, 1, 6)
    lease = pool.lease(1)
    reserving = loaders.reserve(6)
    assert pool.has_waiters
    assert pool.try_reserve(UNIT, EvictionOrder()) == (None, [])
    lease.release()
    pool.make_room()
    loaders.served(reserving)[0].release()
    assert not pool.has_waiters
    pool.try_reserve(UNIT)[0].release()
    pool.close()
    assert pool.try_reserve(UNIT, EvictionOrder()) == (None, [])


def test_waiters_take_the_room_of_the_last_in_line_when_all_are_waited_for(pool, loaders):
    for adapter_id in (1, 2, 3, 4, 5):
        keep_new(pool, adapter_id, 2)
    reserving = loaders.reserve(2)
    assert pool.make_room(EvictionOrder([2, 1, 4, 5, 3])) == [3]
    loaders.served(reserving)[0].release()


@pytest.fixture
def asked():
    """Names of the threads that a pool has told that room is wanted."""
    return []


@pytest.fixture
def asking_pool(asked):
    pool = HostPool(
        10 * UNIT, is_pinned=False, on_room_wanted=lambda: asked.append(threading.current_thread().name)
    )
    yield pool
    pool.close()


@pytest.mark.parametrize("what", ["release", "drop"])
def test_room_is_asked_for_when_a_block_becomes_evictable(asking_pool, asked, what):
    loaders = Loaders(asking_pool)
    keep_new(asking_pool, 1, 5)
    keep_new(asking_pool, 2, 5)
    lease = asking_pool.lease(1)
    reserving = loaders.reserve(10)
    own_name = threading.current_thread().name
    wait_until(lambda: bool(asked))
    assert own_name not in asked

    if what == "release":
        lease.release()
    else:
        asking_pool.drop(2)
    assert own_name in asked
    lease.release()
    asking_pool.make_room()
    loaders.served(reserving)[0].release()


def test_closed_pool_raises_in_waiters_and_newcomers(pool, loaders):
    held = pool.reserve(4 * UNIT, never)
    keep_new(pool, 1, 6)
    lease = pool.lease(1)
    waiting = [loaders.reserve(10), loaders.reserve(1)]

    pool.close()
    pool.close()
    for future in waiting:
        with pytest.raises(LoadCancelledError, match="closed"):
            future.result(TIMEOUT_S)
    with pytest.raises(LoadCancelledError, match="closed"):
        pool.reserve(UNIT, never)
    with pytest.raises(LoadCancelledError, match="closed"):
        pool.keep(2, held)
    assert pool.lease(1) is None
    assert pool.make_room() == []
    held.tensor.fill_(1)  # a read that is under way may end
    lease.release()
    held.release()
    assert pool.snapshot().num_free_bytes == 10 * UNIT


def test_closed_pool_makes_no_room_for_a_waiter_that_has_not_left_yet(pool, loaders):
    held = pool.reserve(10 * UNIT, never)
    gate = threading.Event()
    reserving = loaders.reserve(1, lambda: not gate.wait(TIMEOUT_S))

    pool.close()
    held.release()
    assert pool.make_room() == []
    assert pool.snapshot().num_free_bytes == 10 * UNIT
    gate.set()
    with pytest.raises(LoadCancelledError, match="closed"):
        reserving.result(TIMEOUT_S)


def test_memory_that_the_machine_lacks_is_refused_with_the_option():
    with pytest.raises(InvalidArgumentError, match="lower --lora-host-memory-gb"):
        HostPool(1 << 60, is_pinned=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_not_taken_before_it_is_used():
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    pool = HostPool(1 << 30, is_pinned=False)
    with pool.reserve(1 << 20, never) as block:
        block.tensor.fill_(1)
        assert resident_bytes() - before < 1 << 28
    pool.close()


@pytest.mark.gpu
def test_pinned_pool_is_page_locked_until_its_last_hold_ends():
    pool = HostPool((3 << 20) + 5, is_pinned=True)
    assert pool.snapshot().num_bytes == 3 << 20
    block = pool.reserve((2 << 20) + 1, never)
    assert pool.slab.is_page_locked
    assert pool.slab.tensor.numel() == 3 << 20
    pool.close()
    assert pool.slab.is_page_locked
    block.release()
    assert not pool.slab.is_page_locked


@pytest.mark.parametrize("is_pinned", [pytest.param(False, id="pageable"), CUDA])
def test_random_use_by_many_threads_never_overwrites_a_held_block_and_ends_with_all_free(is_pinned):
    """Loaders reserve, fill and keep; readers lease and look twice; some cancel; one thread makes room."""
    seed, num_threads, num_operations = 20260707, 8, 150
    pool = HostPool(40 * UNIT, is_pinned=is_pinned)
    next_id = iter(range(1, 10**6))
    newest = [0]
    is_over = threading.Event()

    def run(index: int) -> int:
        rng = random.Random(seed + index)
        num_found = 0
        for _ in range(num_operations):
            action = rng.random()
            if action < 0.45:
                adapter_id = next(next_id)
                polls_left = [rng.choice([0, 1, 5, 10**9])]
                try:
                    with pool.reserve(rng.randint(1, 20 * UNIT), partial(is_past, polls_left)) as block:
                        check_constant(block, adapter_id % 251, rng)
                        if rng.random() < 0.8:
                            pool.keep(adapter_id, block)
                            newest[0] = adapter_id
                            check_constant(block, adapter_id % 251, rng, fill=False)
                except LoadCancelledError:
                    pass
            elif action < 0.9:
                adapter_id = max(newest[0] - rng.randint(0, 8), 1)
                lease = pool.lease(adapter_id)
                if lease is not None:
                    num_found += 1
                    with lease:
                        check_constant(lease, adapter_id % 251, rng, fill=False)
            elif action < 0.95:
                block, _ = pool.try_reserve(rng.randint(1, 9 * UNIT), EvictionOrder([newest[0]]))
                if block is not None:
                    with block:
                        check_constant(block, 255, rng)
            else:
                pool.drop(max(newest[0] - rng.randint(0, 8), 1))
        return num_found

    def is_past(polls_left: list[int]) -> bool:
        polls_left[0] -= 1
        return polls_left[0] < 0

    def check_constant(block: HostBlock, value: int, rng: random.Random, fill: bool = True) -> None:
        if fill:
            block.tensor.fill_(value)
        for _ in range(2):
            low, high = torch.aminmax(block.tensor)
            assert (int(low), int(high)) == (value, value), f"seed {seed}"
            time.sleep(rng.random() * 0.0005)

    def make_room() -> None:
        while not is_over.is_set():
            pool.make_room()
            time.sleep(0.0002)

    room_maker = threading.Thread(target=make_room)
    room_maker.start()
    try:
        with ThreadPoolExecutor(num_threads) as threads:
            futures = [threads.submit(run, index) for index in range(num_threads)]
            found = sum(future.result(120) for future in futures)
    finally:
        is_over.set()
        room_maker.join()
    assert found > 10
    assert pool.snapshot().num_evictions > 10
    assert pool.snapshot().num_held_bytes == 0
    pool.close()
    snapshot = pool.snapshot()
    assert (snapshot.num_free_bytes, snapshot.num_waiters) == (40 * UNIT, 0)
