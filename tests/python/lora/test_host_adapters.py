from __future__ import annotations

import random
import threading

import pytest

from lora_serve.common.errors import AdapterNotFoundError, InternalError
from lora_serve.lora import host_adapters, loader_threads
from lora_serve.lora.adapter_layout import AdapterLayout
from lora_serve.lora.adapter_reader import HostAdapter
from lora_serve.lora.allowed_roots import AllowedRoots
from lora_serve.lora.host_adapters import HostAdapters, HostNews
from lora_serve.lora.host_pool import HostPool
from lora_serve.lora.sources import AdapterFolder

from .memory_setup import TIMEOUT_S, Line, block_of, make_reader, wait_until
from .peft_setup import make_full_adapter


class Host:
    """Host adapters in a pool that holds so many of rank 2, driven by one thread."""

    def __init__(self, tmp_path, num):
        self.tmp_path = tmp_path
        self.size = block_of(make_full_adapter(tmp_path / "1", rank=2, seed=1))
        self.pool = HostPool(self.size * num, is_pinned=False)
        self.reader = make_reader(self.pool)
        self.num_news = 0
        self.adapters = HostAdapters(self.reader, self.pool, self._count)
        self.news = HostNews()
        self.line = Line()

    def _count(self):
        self.num_news += 1

    def add(self, adapter_id, **options):
        path = make_full_adapter(
            self.tmp_path / str(adapter_id), **{"rank": 2, "seed": adapter_id, **options}
        )
        with self.reader.read(str(path)) as adapter:
            self.adapters.add(adapter_id, adapter)
        return path

    def poll(self):
        news = self.adapters.poll(self.line)
        self.news.arrived += news.arrived
        self.news.evicted += news.evicted
        self.news.failed.update(news.failed)
        return news

    def poll_until(self, condition):
        wait_until(lambda: (self.poll(), condition())[1])

    def bring(self, *adapter_ids):
        """Let these be the line until each has arrived or failed, and has left it."""
        self.news, self.line = HostNews(), Line(*adapter_ids)

        def all_are_done():
            done = {*self.news.arrived, *self.news.failed}
            self.line = Line(*(i for i in adapter_ids if i not in done))
            return len(done) == len(adapter_ids)

        self.poll_until(all_are_done)

    def begin_read(self, adapter_id):
        """Let this one be the line, and poll once; nobody is in line afterwards."""
        self.line = Line(adapter_id)
        self.poll()
        self.line = Line()

    def on_host(self):
        return [i for i in self.adapters.snapshot() if self.adapters.is_on_host(i)]

    def evict_all(self):
        blocks, num_bytes = [], self.pool.snapshot().num_bytes
        thread = threading.Thread(target=lambda: blocks.append(self.pool.reserve(num_bytes, lambda: False)))
        thread.start()
        self.poll_until(lambda: blocks)
        thread.join(TIMEOUT_S)
        blocks[0].release()
        assert self.on_host() == []
        self.news = HostNews()

    def close(self):
        self.adapters.close()
        self.reader.close()
        self.pool.close()


@pytest.fixture
def make_host(tmp_path):
    hosts = []

    def make(num=4):
        hosts.append(Host(tmp_path, num))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


# --- Added and removed --------------------------------------------------------------------------------------


def test_id_is_added_once_and_from_one(make_host):
    host = make_host()
    path = host.add(1)
    with host.reader.read(str(path)) as adapter:
        for adapter_id in (0, -1, 1):
            with pytest.raises(InternalError, match="expected a new number"):
                host.adapters.add(adapter_id, adapter)
    assert list(host.adapters.snapshot()) == [1]
    assert 1 in host.adapters
    assert 2 not in host.adapters


def test_adapter_without_weights_is_refused(make_host, tmp_path):
    host = make_host()
    folder = AdapterFolder(str(tmp_path), AllowedRoots(None))
    with pytest.raises(InternalError, match="without its weights"):
        host.adapters.add(1, HostAdapter(folder, AdapterLayout((), 0), "digest", None, {}))
    assert host.adapters.snapshot() == {}
    assert 1 not in host.adapters


def test_unknown_adapter_is_an_error_in_every_call(make_host):
    host = make_host()
    host.add(1)
    host.adapters.remove(1)
    for adapter_id in (1, 9):
        calls = (host.adapters.remove, host.adapters.touch, host.adapters.lease, host.adapters.layout)
        for call in calls:
            with pytest.raises(AdapterNotFoundError, match=f"generation {adapter_id} was not added"):
                call(adapter_id)
        assert not host.adapters.is_on_host(adapter_id)
    assert host.adapters.snapshot() == {}


def test_removed_adapter_gives_its_bytes_back_when_its_last_lease_ends(make_host):
    host = make_host()
    host.add(1)
    lease = host.adapters.lease(1)
    host.adapters.remove(1)
    assert host.pool.snapshot().num_free_bytes == 3 * host.size
    lease.release()
    assert host.pool.snapshot().num_free_bytes == 4 * host.size


def test_block_may_go_when_the_reader_of_an_added_adapter_lets_go_of_it(make_host):
    host = make_host(1)
    path = host.add(1)
    host.adapters.remove(1)
    adapter = host.reader.read(str(path))
    host.adapters.add(2, adapter)
    assert host.pool.snapshot().num_held_bytes == host.size
    adapter.release()
    assert host.pool.snapshot().num_held_bytes == 0
    assert host.adapters.is_on_host(2)


# --- Evicted and read again ---------------------------------------------------------------------------------


def test_blocks_leave_only_in_poll_least_recently_used_first_and_never_while_leased(make_host):
    host = make_host(3)
    for adapter_id in (1, 2, 3):
        host.add(adapter_id)
    host.adapters.lease(1).release()  # 2 is the oldest now
    lease = host.adapters.lease(2)
    path = make_full_adapter(host.tmp_path / "4", rank=2, seed=4)
    results = []
    thread = threading.Thread(target=lambda: results.append(host.reader.read(str(path))))
    thread.start()
    wait_until(lambda: host.pool.snapshot().num_waiters == 1)

    assert host.on_host() == [1, 2, 3]
    assert host.num_news == 0  # the pool's own callback tells of the waiter, not this
    assert host.poll().evicted == [3]
    assert host.on_host() == [1, 2]
    thread.join(TIMEOUT_S)
    host.adapters.add(4, results[0])
    results[0].release()
    assert host.on_host() == [1, 2, 4]
    assert lease.tensor.numel() == host.size
    lease.release()


def test_touch_counts_as_a_use(make_host):
    host = make_host(2)
    host.add(1)
    host.add(2)
    host.adapters.touch(1)
    assert host.adapters.snapshot()[1].num_reads == 1
    block = []
    thread = threading.Thread(target=lambda: block.append(host.pool.reserve(host.size, lambda: False)))
    thread.start()
    host.poll_until(lambda: block)
    thread.join(TIMEOUT_S)
    assert host.on_host() == [1]
    block[0].release()


def test_evicted_adapter_is_read_again_once_and_is_the_same(make_host):
    host = make_host(2)
    host.add(1)
    before = host.adapters.lease(1)
    content = before.tensor.clone()
    before.release()
    first = host.adapters.snapshot()[1]
    host.evict_all()
    assert host.adapters.lease(1) is None
    assert not host.adapters.snapshot()[1].is_on_host

    host.begin_read(1)
    assert host.adapters.snapshot()[1].is_being_read
    assert not host.adapters.is_on_host(1)
    wait_until(lambda: host.num_news == 1)
    assert not host.adapters.is_on_host(1), "it arrives in poll, not before"
    host.poll_until(lambda: host.news.arrived)

    again = host.adapters.snapshot()[1]
    assert (host.news.arrived, host.news.failed) == ([1], {})
    assert (again.is_on_host, again.is_being_read, again.num_reads) == (True, False, 2)
    assert again.layout == first.layout
    assert again.load_ms.keys() == {"check", "room", "read"}
    with host.adapters.lease(1) as block:
        assert block.tensor.equal(content)
    assert host.pool.snapshot().num_held_bytes == 0
    assert host.num_news == 1


def test_adapters_whose_folders_were_changed_fail_and_the_others_arrive(make_host):
    host = make_host()
    paths = {adapter_id: host.add(adapter_id) for adapter_id in (1, 2, 3)}
    host.evict_all()
    make_full_adapter(paths[1], rank=2, seed=99)
    (paths[2] / "adapter_config.json").unlink()

    host.bring(1, 2, 3)

    assert host.news.arrived == [3]
    assert host.news.failed.keys() == {1, 2}
    assert str(paths[1]) in host.news.failed[1]
    assert "the folder was changed" in host.news.failed[1]
    assert str(paths[2]) in host.news.failed[2]
    assert host.on_host() == [3]
    assert [host.adapters.snapshot()[i].is_being_read for i in (1, 2)] == [False, False]
    assert host.pool.snapshot().num_held_bytes == 0

    make_full_adapter(paths[1], rank=2, seed=1)
    host.bring(1)  # what failed once may be tried again
    assert host.on_host() == [1, 3]


def test_read_of_a_removed_adapter_that_ends_later_leaves_nothing(make_host, monkeypatch):
    host = make_host(2)
    path = host.add(1)
    host.evict_all()
    has_read, gate, read_again = threading.Event(), threading.Event(), host.reader.read_again

    def late(*arguments):
        adapter = read_again(*arguments)
        has_read.set()
        gate.wait(TIMEOUT_S)
        return adapter

    monkeypatch.setattr(host.reader, "read_again", late)
    host.begin_read(1)
    assert has_read.wait(TIMEOUT_S)
    host.adapters.remove(1)
    make_full_adapter(path, rank=2, seed=7)
    host.add(2)
    gate.set()
    wait_until(lambda: host.pool.snapshot().num_free_bytes == host.size)
    assert host.poll() == HostNews()
    assert host.on_host() == [2]
    assert list(host.adapters.snapshot()) == [2]


def test_more_adapters_than_loaders_and_a_pool_for_one_arrive_one_after_the_other(make_host):
    host = make_host(1)
    ids = range(1, host_adapters.NUM_LOADERS + 4)
    for adapter_id in ids:
        if adapter_id > 1:
            host.evict_all()
        host.add(adapter_id)
    host.evict_all()

    host.bring(*ids)

    assert sorted(host.news.arrived) == list(ids)
    assert len(host.news.evicted) == len(ids) - 1
    assert len(host.on_host()) == 1
    assert host.news.failed == {}


def test_time_of_the_last_lease_is_told(make_host, monkeypatch):
    host = make_host()
    now = [100.0]
    monkeypatch.setattr(host_adapters.time, "time", lambda: now[0])
    host.add(1)
    now[0] = 107.5
    host.adapters.is_on_host(1)
    assert host.adapters.snapshot()[1].last_used_s == 100
    host.adapters.lease(1).release()
    assert host.adapters.snapshot()[1].last_used_s == 107.5


# --- Read ahead ---------------------------------------------------------------------------------------------


@pytest.fixture
def hold_reads(monkeypatch):
    """Lets reads of a host begin and not end; gives the folders that they began with, and what ends them."""
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", 1e9)  # None is given up, however slow the machine is.
    gates = []

    def hold(host):
        begun, gate, read_again = [], threading.Event(), host.reader.read_again

        def late(folder, *arguments):
            begun.append(int(folder.path.rsplit("/", 1)[1]))
            gate.wait(2 * TIMEOUT_S)  # Longer than the test waits for what must begin beside it.
            return read_again(folder, *arguments)

        monkeypatch.setattr(host.reader, "read_again", late)
        gates.append(gate)
        return begun, gate

    yield hold
    for gate in gates:
        gate.set()


def test_front_of_the_line_is_read_ahead_as_many_at_once_as_there_are_loaders(make_host, hold_reads):
    host = make_host(10)
    for adapter_id in range(1, 10):
        host.add(adapter_id)
    host.evict_all()
    begun, gate = hold_reads(host)
    host.line = Line(7, 2, 9, 1, 5, 3)
    host.poll()
    host.poll()
    assert [i for i, state in host.adapters.snapshot().items() if state.is_being_read] == [1, 2, 7, 9]
    assert host.adapters.num_reads_under_way == 4
    wait_until(lambda: len(begun) == host_adapters.NUM_LOADERS)
    gate.set()
    host.poll_until(lambda: len(host.news.arrived) == 6)
    assert sorted(begun) == [1, 2, 3, 5, 7, 9]
    assert set(begun[4:]) == {5, 3}
    assert host.news.evicted == []
    for _ in range(3):
        host.poll()
    assert len(begun) == 6, "who is there is not read again"


def test_read_ahead_takes_the_room_of_those_nobody_waits_for_least_recently_used_first(make_host):
    host = make_host(4)
    for adapter_id in range(1, 8):
        if adapter_id == 4:
            host.evict_all()
        host.add(adapter_id)
    host.adapters.touch(4)
    host.line = Line(6, 1, 2)
    host.poll_until(lambda: len(host.news.arrived) == 2)
    assert host.news.evicted == [5, 7]
    assert host.on_host() == [1, 2, 4, 6]


def test_adapter_is_never_evicted_for_one_whose_turn_comes_later(make_host):
    host = make_host(2)
    for adapter_id in (1, 2, 3, 4):
        if adapter_id == 3:
            host.evict_all()
        host.add(adapter_id)
    host.line = Line(3, 4, 1, 2)
    for _ in range(5):
        host.poll()
    assert (host.on_host(), host.news) == ([3, 4], HostNews())
    assert not any(state.is_being_read for state in host.adapters.snapshot().values())
    assert host.adapters.num_reads_under_way == 0

    host.line = Line(3, 1, 4, 2)
    host.poll_until(lambda: host.news.arrived)
    assert (host.news.evicted, host.news.arrived) == ([4], [1])

    host.line = Line(1, 4)  # nobody waits for 3 any more
    host.poll_until(lambda: host.news.arrived == [1, 4])
    assert host.news.evicted == [4, 3]


def test_nobody_behind_takes_the_room_that_the_first_waits_for(make_host):
    host = make_host(4)
    host.add(1, rank=6)
    host.add(2)
    host.evict_all()
    held = [host.pool.try_reserve(host.size)[0] for _ in range(3)]
    host.line = Line(1, 2)
    host.poll()
    assert [host.adapters.snapshot()[i].is_being_read for i in (1, 2)] == [False, False]
    host.line = Line(2, 1)
    host.poll_until(lambda: host.news.arrived)
    assert host.news.arrived == [2]
    for block in held:
        block.release()


def test_new_adapter_takes_the_room_of_the_last_in_line(make_host):
    host = make_host(3)
    for adapter_id in (2, 3, 4):
        host.add(adapter_id)
    host.line = Line(2, 4, 3)  # 2 is the least recently used
    path = make_full_adapter(host.tmp_path / "1", rank=2, seed=1)
    results = []
    thread = threading.Thread(target=lambda: results.append(host.reader.read(str(path))))
    thread.start()
    host.poll_until(lambda: results)
    thread.join(TIMEOUT_S)
    results[0].release()
    assert host.news == HostNews(evicted=[3])


def test_reads_that_hang_hold_up_nobody_else(make_host, hold_reads, monkeypatch):
    host = make_host(host_adapters.NUM_LOADERS + 1)
    ids = range(1, host_adapters.NUM_LOADERS + 2)
    for adapter_id in ids:
        host.add(adapter_id)
    host.evict_all()
    begun, _ = hold_reads(host)
    host.line = Line(*ids)
    host.poll()
    wait_until(lambda: len(begun) == host_adapters.NUM_LOADERS)
    host.poll()
    assert not host.adapters.snapshot()[ids[-1]].is_being_read
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", 0.0)
    host.poll()
    wait_until(lambda: ids[-1] in begun)
    assert host.adapters.num_reads_under_way == len(ids)


def test_room_of_reads_that_are_not_over_comes_back_after_the_end(make_host, hold_reads):
    host = make_host(host_adapters.NUM_LOADERS + 2)
    ids = range(1, host_adapters.NUM_LOADERS + 1)
    for adapter_id in ids:
        host.add(adapter_id)
    host.evict_all()
    begun, gate = hold_reads(host)
    host.line = Line(*ids)
    host.poll()
    wait_until(lambda: len(begun) == len(ids))
    host.adapters.remove(ids[0])
    assert host.pool.snapshot().num_held_bytes == len(ids) * host.size
    host.adapters.close()
    gate.set()
    wait_until(lambda: host.pool.snapshot().num_held_bytes == 0)


@pytest.mark.parametrize("seed", range(3))
def test_adapters_that_take_turns_are_read_once_a_turn_however_many_are_asked_for(make_host, seed):
    """Requests come faster than turns, for many more adapters than the host holds."""
    rng = random.Random(seed)
    host = make_host(4)
    ids = range(1, 15)
    for adapter_id in ids:
        host.add(adapter_id)
        host.evict_all()
    num_turns = num_turns_from_disk = 0
    waits_on_disk = set()
    while num_turns < 60:
        for adapter_id in rng.sample(ids, rng.randint(0, 4)):
            host.adapters.touch(adapter_id)
            if adapter_id not in host.line.adapter_ids:
                host.line.adapter_ids.append(adapter_id)
                if not host.adapters.is_on_host(adapter_id):
                    waits_on_disk.add(adapter_id)
        before = host.on_host()
        news = host.poll()
        assert not set(news.arrived) & set(news.evicted)
        assert set(host.on_host()) == set(before) - set(news.evicted) | set(news.arrived)
        front = host.line.adapter_ids[:1]
        if front and host.adapters.is_on_host(front[0]):
            host.adapters.lease(front[0]).release()
            num_turns += 1
            num_turns_from_disk += front[0] in waits_on_disk
            waits_on_disk.discard(front[0])
            del host.line.adapter_ids[0]
    num_reads = sum(state.num_reads - 1 for state in host.adapters.snapshot().values())
    # Who was on the host when its first request came can have lost its room to those before it.
    assert num_turns_from_disk <= num_reads <= num_turns + len(host.line.adapter_ids)
    assert (host.news.failed, num_turns_from_disk > 20) == ({}, True)


# --- The end ------------------------------------------------------------------------------------------------


def test_close_ends_reads_and_leaves_no_block_held(make_host, monkeypatch):
    host = make_host(2)
    for adapter_id in (1, 2, 3):
        if adapter_id == 3:
            host.evict_all()
        host.add(adapter_id)
    host.evict_all()
    gate, read_again = threading.Event(), host.reader.read_again

    def read_second_late(folder, *arguments):
        if folder.path.endswith("/2"):
            gate.wait(TIMEOUT_S)
        return read_again(folder, *arguments)

    monkeypatch.setattr(host.reader, "read_again", read_second_late)
    host.line = Line(1, 2)
    host.poll()
    wait_until(lambda: host.num_news == 1)  # read, and not taken up
    for _ in range(2):
        host.close()
    gate.set()
    wait_until(lambda: host.num_news == 2)
    wait_until(lambda: host.pool.snapshot().num_free_bytes == 2 * host.size)
