from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from lora_serve.common.errors import AdapterConflictError, CapacityError, InvalidArgumentError
from lora_serve.lora.adapter_files import UnreadableFileError
from lora_serve.lora.adapter_layout import view_modules
from lora_serve.lora.adapter_reader import AdapterReader, FolderChange, describe_error, release_unwanted
from lora_serve.lora.allowed_roots import AllowedRoots
from lora_serve.lora.host_pool import HostPool
from lora_serve.lora.load_cancelled import LoadCancelledError
from lora_serve.lora.sources import AdapterFolder, AdapterSources
from lora_serve.testing.adapters import read_adapter_tensors, write_adapter_tensors

from .adapter_setup import expected_modules
from .memory_setup import ALL_MODULES, MIB, TIMEOUT_S, block_of, make_memory_targets, make_reader, wait_until
from .peft_setup import make_full_adapter


@pytest.fixture
def pool():
    pool = HostPool(4 * MIB, is_pinned=False)
    yield pool
    pool.close()


@pytest.fixture
def reader(pool):
    reader = make_reader(pool)
    yield reader
    reader.close()


def assert_all_free(pool: HostPool) -> None:
    snapshot = pool.snapshot()
    assert (snapshot.num_free_bytes, snapshot.num_waiters) == (snapshot.num_bytes, 0)


def read_again(reader: AdapterReader, adapter, folder: AdapterFolder | None = None):
    room, _ = reader._pool.try_reserve(adapter.num_bytes)
    return reader.read_again(folder or adapter.folder, adapter.layout, adapter.content_digest, room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_holds_what_the_file_holds_in_the_models_dtype(pool, tmp_path, dtype):
    path = make_full_adapter(tmp_path / "a", rank=3, target_modules=ALL_MODULES)
    reader = make_reader(pool, dtype)
    with reader.read(str(path)) as adapter:
        assert (adapter.path, adapter.lora_rank) == (str(path), 3)
        assert adapter.num_bytes == adapter.layout.num_bytes == adapter.block.tensor.numel()
        assert adapter.load_ms.keys() == {"locate", "check", "room", "read"}
        views = view_modules(adapter.layout, adapter.block.tensor, make_memory_targets(), dtype)
        expected = expected_modules(path, dtype)
        assert views.keys() == expected.keys()
        for module, weights in expected.items():
            assert torch.equal(views[module].a, weights.a)
            assert torch.equal(views[module].b, weights.b)
            assert views[module].scaling == pytest.approx(weights.scaling, rel=1e-15)
    assert_all_free(pool)
    adapter.release()
    assert_all_free(pool)
    reader.close()


def test_rank_limit_and_name_reach_the_error(pool, tmp_path):
    reader = make_reader(pool, max_lora_rank=4)
    path = make_full_adapter(tmp_path / "a", rank=5)
    with pytest.raises(InvalidArgumentError, match="'sql' has lora_rank 5 but max_lora_rank is 4"):
        reader.read(str(path), "sql")
    assert_all_free(pool)
    reader.close()


def test_folder_outside_the_roots_is_not_read(pool, tmp_path):
    (tmp_path / "allowed").mkdir()
    reader = make_reader(pool, sources=AdapterSources(allowed_roots=[str(tmp_path / "allowed")]))
    path = make_full_adapter(tmp_path / "a", rank=2)
    with pytest.raises(InvalidArgumentError, match="allowed"):
        reader.read(str(path))
    reader.read(str(make_full_adapter(tmp_path / "allowed" / "a", rank=2))).release()
    reader.close()


def test_adapter_larger_than_the_host_memory_is_refused_with_numbers(tmp_path):
    path = make_full_adapter(tmp_path / "a", rank=2)
    num_bytes = block_of(path)
    pool = HostPool(num_bytes - 256, is_pinned=False)
    reader = make_reader(pool)
    with pytest.raises(
        CapacityError,
        match=rf"takes {num_bytes} bytes .* is {num_bytes - 256} bytes; .*--lora-host-memory-gb",
    ):
        reader.read(str(path))
    assert_all_free(pool)
    reader.close()


def test_failed_read_frees_its_block(pool, reader, tmp_path):
    path = make_full_adapter(tmp_path / "a", rank=2)
    tensors = read_adapter_tensors(path)
    key = min(tensors)
    tensors[key][0, 0] = torch.nan
    write_adapter_tensors(path, tensors)
    with pytest.raises(InvalidArgumentError, match=f"{key}.* holds NaN"):
        reader.read(str(path))
    assert_all_free(pool)


def test_reads_in_several_threads_give_what_one_thread_gives(pool, reader, tmp_path):
    paths = [str(make_full_adapter(tmp_path / str(seed), rank=3, seed=seed)) for seed in range(4)]

    def digest_of(path):
        with reader.read(path) as adapter:
            return adapter.content_digest

    alone = [digest_of(path) for path in paths]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(digest_of, paths * 5))
    assert together == alone * 5
    assert len(set(alone)) == 4
    assert_all_free(pool)


def test_read_waits_until_there_is_room(tmp_path):
    paths = [make_full_adapter(tmp_path / str(seed), rank=3, seed=seed) for seed in range(2)]
    pool = HostPool(block_of(paths[0]), is_pinned=False)
    reader = make_reader(pool)
    first = reader.read(str(paths[0]))
    pool.keep(1, first.block)
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(reader.read, str(paths[1]))
        wait_until(lambda: pool.snapshot().num_waiters == 1)
        assert pool.make_room() == []
        first.release()
        assert not read.done()
        assert pool.make_room() == [1]
        with read.result(TIMEOUT_S) as second:
            assert second.load_ms["room"] > 0
            assert second.content_digest != first.content_digest
    reader.close()
    pool.close()


# --- Again --------------------------------------------------------------------------------------------------


def test_content_is_the_same_when_it_is_read_again(pool, reader, tmp_path):
    path = make_full_adapter(tmp_path / "a", rank=3)
    with reader.read(str(path)) as adapter:
        tensors = read_adapter_tensors(path)
        write_adapter_tensors(path, dict(reversed(tensors.items())))  # a new file, the same content
        with read_again(reader, adapter) as again:
            assert (again.content_digest, again.layout) == (adapter.content_digest, adapter.layout)
            assert torch.equal(again.block.tensor, adapter.block.tensor)
            assert again.block.tensor.data_ptr() != adapter.block.tensor.data_ptr()
    assert_all_free(pool)


@pytest.mark.parametrize("change", [{"seed": 2}, {"rank": 5}, {"alpha": 7}, {"layers": [1]}], ids=str)
def test_folder_that_was_changed_is_refused_with_what_it_holds(pool, reader, tmp_path, change):
    """Another layout is seen before it is read; what differs in numbers only is read first."""
    path = make_full_adapter(tmp_path / "a", rank=3)
    with reader.read(str(path)) as adapter:
        pass
    make_full_adapter(path, **{"rank": 3, **change})
    with reader.read(str(path)) as other:
        assert other.content_digest != adapter.content_digest
    with pytest.raises(AdapterConflictError, match="the folder was changed; load it again") as caught:
        read_again(reader, adapter)
    reason = describe_error(caught.value)
    assert isinstance(reason, FolderChange)
    found = other.content_digest if "seed" in change else "holds other modules, ranks or scalings"
    for text in (str(path), adapter.content_digest, found):
        assert text in reason
    assert_all_free(pool)


@pytest.mark.parametrize("change", [{}, {"seed": 2}, {"rank": 5}, {"rank": 1}, None], ids=str)
def test_room_that_was_taken_before_is_read_into_or_given_back(pool, reader, tmp_path, change):
    path = make_full_adapter(tmp_path / "a", rank=3)
    with reader.read(str(path)) as adapter:
        content = adapter.block.tensor.clone()
    if change is None:
        shutil.rmtree(path)
    else:
        make_full_adapter(path, **{"rank": 3, **change})
    room, _ = pool.try_reserve(adapter.num_bytes)
    again = (adapter.folder, adapter.layout, adapter.content_digest, room)
    if change == {}:
        with reader.read_again(*again) as found:
            assert found.block is room
            assert torch.equal(room.tensor, content)
    else:
        with pytest.raises(AdapterConflictError, match=re.escape(str(path)) + ".*was changed"):
            reader.read_again(*again)
    assert_all_free(pool)


def test_folder_that_is_gone_is_refused_by_its_path(pool, reader, tmp_path):
    path = make_full_adapter(tmp_path / "a", rank=3)
    with reader.read(str(path)) as adapter:
        pass
    shutil.rmtree(path)
    with pytest.raises(AdapterConflictError, match=f"{path}.*does not exist.*the folder was changed"):
        read_again(reader, adapter)
    assert_all_free(pool)


def test_folder_whose_file_is_half_written_is_refused_as_changed(pool, reader, tmp_path):
    path = make_full_adapter(tmp_path / "a", rank=3)
    with reader.read(str(path)) as adapter:
        pass
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterConflictError, match=r"truncated.*the folder was changed"):
        read_again(reader, adapter)
    assert_all_free(pool)


@pytest.mark.parametrize("call", ["open", "pread", "preadv"])
def test_error_of_the_disk_is_not_taken_for_a_change(pool, reader, tmp_path, monkeypatch, call):
    path = make_full_adapter(tmp_path / "a", rank=3)
    with reader.read(str(path)) as adapter:
        pass

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UnreadableFileError, match="Input/output error") as caught:
        read_again(reader, adapter)
    assert "changed" not in describe_error(caught.value)
    assert not isinstance(describe_error(caught.value), FolderChange)
    assert_all_free(pool)


def test_folder_of_another_source_is_read_again_under_its_own_rules(pool, tmp_path):
    """What the hub or a resolver gave is not among the allowed roots, on purpose."""
    path = make_full_adapter(tmp_path / "cache" / "a", rank=3)
    (tmp_path / "roots").mkdir()
    open_reader = make_reader(pool)
    with open_reader.read(str(path)) as adapter:
        pass
    reader = make_reader(pool, sources=AdapterSources(allowed_roots=[str(tmp_path / "roots")]))
    held = AdapterFolder(str(path), AllowedRoots([str(path)]))
    read_again(reader, adapter, held).release()
    outside = AdapterFolder(str(path), AllowedRoots([str(tmp_path / "roots")]))
    with pytest.raises(AdapterConflictError, match="allowed"):
        read_again(reader, adapter, outside)
    assert_all_free(pool)
    reader.close()
    open_reader.close()


# --- The end ------------------------------------------------------------------------------------------------


def test_close_ends_reads_that_wait_for_room_and_twice_is_nothing(tmp_path):
    path = make_full_adapter(tmp_path / "a", rank=3)
    pool = HostPool(block_of(path), is_pinned=False)
    reader = make_reader(pool)
    first = reader.read(str(path))
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(reader.read, str(path))
        wait_until(lambda: pool.snapshot().num_waiters == 1)
        reader.close()
        reader.close()
        with pytest.raises(LoadCancelledError):
            read.result(TIMEOUT_S)
    with pytest.raises(LoadCancelledError):
        reader.read(str(path))
    first.release()
    assert_all_free(pool)


def test_close_ends_a_read_in_the_midst_of_its_tensors(pool, tmp_path, monkeypatch):
    path = make_full_adapter(tmp_path / "a", rank=3)
    reader = make_reader(pool)
    begun, closed = threading.Event(), threading.Event()
    reader._threads.submit(lambda: (begun.set(), closed.wait(TIMEOUT_S)))
    begun.wait(TIMEOUT_S)
    reserve = pool.reserve
    has_room = threading.Event()
    monkeypatch.setattr(
        pool, "reserve", lambda *arguments: (block := reserve(*arguments), has_room.set())[0] and block
    )
    with ThreadPoolExecutor(1) as loaders:
        read = loaders.submit(reader.read, str(path))
        assert has_room.wait(TIMEOUT_S)
        reader.close()
        closed.set()
        with pytest.raises(LoadCancelledError):
            read.result(TIMEOUT_S)
    assert_all_free(pool)


def test_result_that_nobody_wants_is_released_however_the_read_ended(pool, reader, tmp_path):
    adapter = reader.read(str(make_full_adapter(tmp_path / "a", rank=3)))
    good, failed, cancelled = Future(), Future(), Future()
    for future in (good, failed, cancelled):
        future.add_done_callback(release_unwanted)
    good.set_result(adapter)
    assert_all_free(pool)
    failed.set_exception(OSError("no"))
    assert cancelled.cancel()


def test_own_errors_are_described_by_their_message_and_others_with_their_type():
    assert describe_error(InvalidArgumentError("bad rank")) == "bad rank"
    assert describe_error(ValueError("odd")) == "ValueError: odd"
