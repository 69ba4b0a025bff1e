from __future__ import annotations

import threading

import pytest

from lora_serve.common.errors import AdapterNotFoundError, InternalError
from lora_serve.lora import host_adapters
from lora_serve.lora.adapter_layout import AdapterLayout
from lora_serve.lora.adapter_reader import HostAdapter
from lora_serve.lora.allowed_roots import AllowedRoots
from lora_serve.lora.host_adapters import HostAdapters, HostNews
from lora_serve.lora.host_pool import HostPool
from lora_serve.lora.sources import AdapterFolder

from .memory_setup import TIMEOUT_S, block_of, make_reader, wait_until
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
        news = self.adapters.poll()
        self.news.arrived += news.arrived
        self.news.evicted += news.evicted
        self.news.failed.update(news.failed)
        return news

    def poll_until(self, condition):
        wait_until(lambda: (self.poll(), condition())[1])

    def bring(self, *adapter_ids):
        """Stage and wait until each has arrived or failed."""
        self.news = HostNews()
        for adapter_id in adapter_ids:
            self.adapters.stage(adapter_id)
        self.poll_until(lambda: len(self.news.arrived) + len(self.news.failed) == len(adapter_ids))

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
        for call in (host.adapters.remove, host.adapters.stage, host.adapters.lease, host.adapters.layout):
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


def test_use_by_stage_counts_as_one(make_host):
    host = make_host(2)
    host.add(1)
    host.add(2)
    host.adapters.stage(1)
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

    for _ in range(3):
        host.adapters.stage(1)
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
    host.adapters.stage(1)
    assert has_read.wait(TIMEOUT_S)
    host.adapters.remove(1)
    make_full_adapter(path, rank=2, seed=7)
    host.add(2)
    gate.set()
    wait_until(lambda: host.pool.snapshot().num_free_bytes == host.size)
    assert host.poll() == HostNews()
    assert host.on_host() == [2]
    assert list(host.adapters.snapshot()) == [2]


def test_read_of_a_removed_adapter_that_waits_for_room_ends(make_host):
    host = make_host(1)
    host.add(1)
    host.evict_all()
    host.add(2)
    lease = host.adapters.lease(2)
    host.adapters.stage(1)
    wait_until(lambda: host.pool.snapshot().num_waiters == 1)
    host.adapters.remove(1)
    wait_until(lambda: host.pool.snapshot().num_waiters == 0)
    lease.release()
    assert host.on_host() == [2]


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


# --- The end ------------------------------------------------------------------------------------------------


def test_close_ends_reads_and_leaves_no_block_held(make_host):
    host = make_host(2)
    for adapter_id in (1, 2, 3):
        if adapter_id == 3:
            host.evict_all()
        host.add(adapter_id)
    host.evict_all()
    host.adapters.stage(1)
    wait_until(lambda: host.num_news == 1)  # read, and not taken up
    block = host.pool.reserve(host.size, lambda: False)
    host.adapters.stage(2)
    wait_until(lambda: host.pool.snapshot().num_waiters == 1)
    for _ in range(2):
        host.close()
    wait_until(lambda: host.num_news >= 2)
    block.release()
    wait_until(lambda: host.pool.snapshot().num_free_bytes == 2 * host.size)
