from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora.adapter_setup import copy_adapter, make_adapter
from lora.peft_setup import (
    FUSED,
    check,
    digest_of,
    make_full_adapter,
    make_full_targets,
    new_block,
    read_block,
)
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.kernels import LoRALayerTable
from lora_serve.layers.linear import LoRATarget
from lora_serve.lora import read_plan
from lora_serve.lora.adapter_files import WEIGHTS_FILE
from lora_serve.lora.adapter_layout import MATRIX_ALIGNMENT, align, view_modules
from lora_serve.lora.load_cancelled import LoadCancelledError
from lora_serve.lora.peft_reader import read_into
from lora_serve.testing.adapters import (
    ALL_PROJECTIONS,
    read_adapter_config,
    read_adapter_tensors,
    write_adapter_config,
    write_adapter_tensors,
)
from lora_serve.testing.bad_adapters import BAD_ADAPTERS, corrupt_config

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERYTHING = (*ALL_PROJECTIONS, "embed_tokens", "lm_head")


@pytest.fixture
def small_tasks(monkeypatch):
    """A task a few matrices, so that small adapters have many."""
    monkeypatch.setattr(read_plan, "TASK_BYTES", 2000)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("file_dtype", DTYPES, ids=str)
def test_block_holds_exactly_the_converted_tensors_and_zeros(file_dtype, model_dtype, tmp_path, small_tasks):
    path = make_full_adapter(
        tmp_path / "adapter",
        rank=5,
        target_modules=EVERYTHING,
        rank_pattern={"q_proj": 1, "layers.2.mlp.up_proj": 7},
        dtype=file_dtype,
    )
    stored = read_adapter_tensors(path)
    layout, block, _ = read_block(path, model_dtype)

    expected = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = view_modules(layout, expected, make_full_targets(), model_dtype)
    assert len(views) == 30
    for module, weights in views.items():
        key = f"base_model.model.{module}"
        if module == "model.embed_tokens":
            weights.a.copy_(stored[f"{key}.lora_embedding_A"].T)
            weights.b.copy_(stored[f"{key}.lora_embedding_B"].T)
        else:
            weights.a.copy_(stored[f"{key}.lora_A.weight"])
            weights.b.copy_(stored[f"{key}.lora_B.weight"].T)
    assert torch.equal(block, expected)


def test_files_of_mixed_dtypes_are_read_tensor_by_tensor(tmp_path, small_tasks):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=EVERYTHING)
    tensors = {
        key: tensor.to(DTYPES[index % 3])
        for index, (key, tensor) in enumerate(read_adapter_tensors(path).items())
    }
    write_adapter_tensors(path, tensors)
    layout, block, _ = read_block(path, torch.bfloat16)
    views = view_modules(layout, block, make_full_targets(), torch.bfloat16)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head"):
        key = f"base_model.model.{module}"
        assert torch.equal(views[module].a, tensors[f"{key}.lora_A.weight"].bfloat16())
        assert torch.equal(views[module].b.T, tensors[f"{key}.lora_B.weight"].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_between_matrices_of_odd_sizes_are_zero(dtype, tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=3, target_modules=["q_proj", "up_proj"])
    names = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.1.mlp.up_proj")
    corrupt_config(path, target_modules=["q_proj", "k_proj", "up_proj"])
    stored = {}
    for name in names:
        stored[f"base_model.model.model.{name}.lora_A.weight"] = torch.randn(3, 5)
        stored[f"base_model.model.model.{name}.lora_B.weight"] = torch.randn(7, 3)
    write_adapter_tensors(path, stored)
    targets = {f"model.{name}": LoRATarget(LoRALayerTable((7,), 5), 0, 5, 7) for name in names}

    layout, block, _ = read_block(path, dtype, targets=targets, fused={})

    expected = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for module, weights in view_modules(layout, expected, targets, dtype).items():
        weights.a.copy_(stored[f"base_model.model.{module}.lora_A.weight"])
        weights.b.copy_(stored[f"base_model.model.{module}.lora_B.weight"].T)
    assert torch.equal(block, expected)
    with check(path, dtype, targets=targets, fused={}) as checked:
        (task,) = read_plan.plan_tasks(checked)
        holes = list(read_plan.gaps([task], layout.num_bytes))
        assert len(holes) == 6
        assert holes[0] == (15 * dtype.itemsize, align(15 * dtype.itemsize, MATRIX_ALIGNMENT))


def test_short_reads_are_gone_on_with(tmp_path, monkeypatch):
    path = make_full_adapter(tmp_path / "adapter", rank=5, target_modules=EVERYTHING, dtype=torch.bfloat16)
    _, block, digest = read_block(path)
    preadv, pread = os.preadv, os.pread

    def short_preadv(file, buffers, offset):
        return preadv(file, [buffers[0][:77]], offset)

    monkeypatch.setattr(os, "preadv", short_preadv)
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 100), offset))
    _, block_of_short_reads, same_digest = read_block(path)
    assert torch.equal(block_of_short_reads, block)
    assert same_digest == digest


def test_more_buffers_than_the_system_takes_at_once_are_filled(tmp_path, monkeypatch):
    path = make_adapter(tmp_path / "adapter", rank=4)
    data = (path / WEIGHTS_FILE).read_bytes()
    preadv, counts = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *args: counts.append(len(args[1])) or preadv(*args))
    with check(path) as checked:
        buffers = [bytearray(1 + index % 3) for index in range(3000)]
        checked.weights.read_into(11, [memoryview(buffer) for buffer in buffers])
    content = b"".join(buffers)
    assert content == data[11 : 11 + len(content)]
    assert len(counts) < 10


def test_error_of_the_system_while_reading_is_told(tmp_path, monkeypatch):
    path = make_adapter(tmp_path / "adapter", rank=4)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with check(path) as checked:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(InvalidArgumentError, match=f"{WEIGHTS_FILE}: Input/output error"):
            read_into(checked, new_block(checked.layout), threads=None, is_cancelled=lambda: False)


def test_fused_module_is_split_by_the_widths_of_its_members(tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["qkv_proj", "gate_up_proj"])
    stored = read_adapter_tensors(path)
    layout, block, _ = read_block(path)
    views = view_modules(layout, block, make_full_targets(), torch.float32)
    offsets = {module.module: module.a_offset for module in layout.modules}
    assert len(views) == 20
    for fused, members in FUSED.items():
        rows = stored[f"base_model.model.{fused}.lora_B.weight"]
        assert torch.equal(torch.cat([views[member].b.T for member in members]), rows)
        for member in members:
            assert torch.equal(views[member].a, stored[f"base_model.model.{fused}.lora_A.weight"])
            assert offsets[member] == offsets[members[0]]
    assert len(set(offsets.values())) == len(FUSED)


def test_fused_module_of_rank_1_is_split_too(tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=1, target_modules=["qkv_proj"], layers=[2])
    stored = read_adapter_tensors(path)
    layout, block, _ = read_block(path)
    views = view_modules(layout, block, make_full_targets(), torch.float32)
    rows = torch.cat([views[member].b.T for member in FUSED["model.layers.2.self_attn.qkv_proj"]])
    assert torch.equal(rows, stored["base_model.model.model.layers.2.self_attn.qkv_proj.lora_B.weight"])


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_read_the_same_bytes_and_digest(model_dtype, tmp_path, small_tasks, pool):
    path = make_full_adapter(tmp_path / "adapter", rank=6, target_modules=EVERYTHING)
    layout, block, digest = read_block(path, model_dtype)
    for _ in range(5):
        layout_of_threads, block_of_threads, digest_of_threads = read_block(path, model_dtype, threads=pool)
        assert layout_of_threads == layout
        assert torch.equal(block_of_threads, block)
        assert digest_of_threads == digest


def test_file_order_does_not_matter_to_the_reader(tmp_path, small_tasks):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=ALL_PROJECTIONS)
    _, block, digest = read_block(path)
    data = (path / WEIGHTS_FILE).read_bytes()
    tensors = read_adapter_tensors(path)
    # Bigger tensors first and the rest backwards, written by hand: the library sorts by name.
    keys = sorted(tensors, key=lambda key: (-tensors[key].numel(), key), reverse=True)
    entries, body = [], b""
    for key in keys:
        content = tensors[key].numpy().tobytes()
        shape = list(tensors[key].shape)
        entries.append(
            f'"{key}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [{len(body)}, '
            f"{len(body) + len(content)}]}}"
        )
        body += content
    header = ("{" + ", ".join(entries) + "} ").encode()
    (path / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + body)
    assert (path / WEIGHTS_FILE).read_bytes()[-len(body) :] != data[-len(body) :]
    _, reordered, same_digest = read_block(path)
    assert torch.equal(reordered, block)
    assert same_digest == digest


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_bad_adapter_is_refused_where_embeddings_may_have_adapters_too(kind, tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    BAD_ADAPTERS[kind].corrupt(path)
    with pytest.raises(InvalidArgumentError) as caught:
        read_block(path)
    message = str(caught.value)
    assert message.startswith(f"adapter '{path}' ")
    for text in BAD_ADAPTERS[kind].message_has:
        assert text in message


def test_every_tensor_that_is_not_finite_is_named_in_order(tmp_path, small_tasks, pool):
    path = make_adapter(tmp_path / "adapter", rank=4, target_modules=["q_proj", "v_proj"])
    tensors = read_adapter_tensors(path)
    keys = sorted(tensors)
    for key, value in ((keys[1], float("nan")), (keys[4], float("-inf")), (keys[-1], 3e38)):
        tensors[key][-1, -1] = value
    write_adapter_tensors(path, tensors)
    for threads in (None, pool):
        with pytest.raises(InvalidArgumentError) as caught:
            read_block(path, torch.float16, threads=threads)
        message = str(caught.value)
        assert "it has 3 problems" in message
        assert f"(1) {WEIGHTS_FILE}: key '{keys[1]}' holds NaN or Inf" in message
        assert f"(2) {WEIGHTS_FILE}: key '{keys[4]}' holds NaN or Inf" in message
        assert (
            f"(3) {WEIGHTS_FILE}: key '{keys[-1]}' holds values up to 3e+38, which torch.float16" in message
        )


@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("file_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", "AB")
def test_nan_of_either_sign_is_found_in_any_tensor(half, file_dtype, model_dtype, tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=3, target_modules=["q_proj"], layers=[1], dtype=file_dtype)
    tensors = read_adapter_tensors(path)
    (key,) = (key for key in tensors if f".lora_{half}." in key)
    # All bits set: adding to it wraps around to a small number.
    tensors[key].view(torch.int16 if file_dtype.itemsize == 2 else torch.int32)[0, 1] = -1
    write_adapter_tensors(path, tensors)
    with pytest.raises(InvalidArgumentError, match=f"key '{re.escape(key)}' holds NaN or Inf"):
        read_block(path, model_dtype)


class TestFileThatChanges:
    def refused_after(self, path, change):
        with check(path) as checked:
            block = new_block(checked.layout)
            change()
            with pytest.raises(
                InvalidArgumentError, match=f"{WEIGHTS_FILE} is broken: it changed while"
            ) as caught:
                read_into(checked, block, threads=None, is_cancelled=lambda: pytest.fail("the read began"))
        assert "copy or save the adapter again" in str(caught.value)

    @pytest.mark.parametrize("num_bytes", [0, 5, 3000, -1])
    def test_shrinks_between_check_and_read(self, num_bytes, tmp_path):
        weights = make_adapter(tmp_path / "adapter", rank=4) / WEIGHTS_FILE
        size = weights.stat().st_size
        self.refused_after(weights.parent, lambda: os.truncate(weights, num_bytes % size))

    def test_grows_between_check_and_read(self, tmp_path):
        weights = make_adapter(tmp_path / "adapter", rank=4) / WEIGHTS_FILE
        self.refused_after(weights.parent, lambda: os.truncate(weights, weights.stat().st_size + 1))

    def test_is_written_to_between_check_and_read(self, tmp_path):
        weights = make_adapter(tmp_path / "adapter", rank=4) / WEIGHTS_FILE
        status = weights.stat()

        def write_last_byte():
            with open(weights, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x00")
            os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))

        self.refused_after(weights.parent, write_last_byte)

    def test_has_another_header_at_the_same_time(self, tmp_path):
        weights = make_adapter(tmp_path / "adapter", rank=4) / WEIGHTS_FILE
        status = weights.stat()

        def swap_two_keys():
            data = weights.read_bytes()
            swapped = (
                data.replace(b"q_proj", b"x_proj").replace(b"k_proj", b"q_proj").replace(b"x_proj", b"k_proj")
            )
            assert len(swapped) == len(data)
            with open(weights, "r+b") as file:
                file.write(swapped)
            os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))

        self.refused_after(weights.parent, swap_two_keys)

    @pytest.mark.parametrize("with_threads", [False, True])
    def test_shrinks_in_the_middle_of_the_read(self, with_threads, tmp_path, small_tasks, pool):
        path = make_adapter(tmp_path / "adapter", rank=4)
        calls = []

        def shrink_and_go_on():
            calls.append(1)
            if len(calls) >= 10:
                os.truncate(path / WEIGHTS_FILE, 30_000)
            return False

        with check(path) as checked:
            block = new_block(checked.layout)
            with pytest.raises(InvalidArgumentError, match="it changed while it was read"):
                read_into(
                    checked, block, threads=pool if with_threads else None, is_cancelled=shrink_and_go_on
                )

    def test_is_written_to_in_the_middle_of_the_read(self, tmp_path, small_tasks):
        path = make_adapter(tmp_path / "adapter", rank=4)
        calls = []

        def touch_and_go_on():
            calls.append(1)
            if len(calls) == 20:
                os.utime(path / WEIGHTS_FILE, ns=(1, 1))
            return False

        with pytest.raises(InvalidArgumentError, match="it changed while it was read"):
            read_block(path, is_cancelled=touch_and_go_on)

    def test_is_replaced_and_the_old_one_is_read_to_its_end(self, tmp_path):
        path = make_adapter(tmp_path / "adapter", rank=4, seed=1)
        other = make_adapter(tmp_path / "other", rank=4, seed=2)
        expected = digest_of(path)
        with check(path) as checked:
            os.replace(other / WEIGHTS_FILE, path / WEIGHTS_FILE)
            block = new_block(checked.layout)
            assert read_into(checked, block, threads=None, is_cancelled=lambda: False) == expected
        assert digest_of(path) != expected

    def test_folder_is_gone_and_the_file_is_read_to_its_end(self, tmp_path):
        path = make_adapter(tmp_path / "adapter", rank=4)
        expected = digest_of(path)
        with check(path) as checked:
            shutil.rmtree(path)
            block = new_block(checked.layout)
            assert read_into(checked, block, threads=None, is_cancelled=lambda: False) == expected


class TestCancel:
    @pytest.mark.parametrize("after", [0, 1, 15])
    @pytest.mark.parametrize("with_threads", [False, True])
    def test_ends_the_read_and_nothing_writes_to_the_block_afterwards(
        self, with_threads, after, tmp_path, small_tasks, pool
    ):
        path = make_adapter(tmp_path / "adapter", rank=4)
        calls = []

        def is_cancelled():
            calls.append(1)
            return len(calls) > after

        with check(path) as checked:
            block = new_block(checked.layout)
            with pytest.raises(LoadCancelledError):
                read_into(checked, block, threads=pool if with_threads else None, is_cancelled=is_cancelled)
            num_calls, before = len(calls), block.clone()
            pool.submit(int).result()
            assert len(calls) == num_calls
            assert torch.equal(block, before)
            assert bool((block == 0xAA).any())

    def test_answer_is_asked_for_before_each_task_is_fetched_and_placed(self, tmp_path, small_tasks):
        path = make_adapter(tmp_path / "adapter", rank=4)
        with check(path) as checked:
            num_tasks = len(read_plan.plan_tasks(checked))
        calls = []
        read_block(path, is_cancelled=lambda: bool(calls.append(1)))
        assert num_tasks > 5
        assert len(calls) >= 2 * num_tasks

    def test_error_of_one_task_wins_over_those_that_stop_because_of_it(self, tmp_path, small_tasks, pool):
        path = make_adapter(tmp_path / "adapter", rank=4)
        calls = []

        def fail_once():
            calls.append(1)
            if len(calls) >= 30:
                raise ZeroDivisionError
            return False

        with pytest.raises(ZeroDivisionError):
            read_block(path, threads=pool, is_cancelled=fail_once)

    def test_error_of_a_later_task_wins_over_an_earlier_one_that_it_stopped(
        self, tmp_path, small_tasks, pool
    ):
        path = make_adapter(tmp_path / "adapter", rank=4)
        order: list[int] = []
        failed = threading.Event()

        def fail_in_second_thread():
            thread = threading.get_ident()
            if thread == threading.main_thread().ident:
                return False
            order.append(thread)
            if thread == order[0]:
                failed.wait(60)
                return False
            failed.set()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            read_block(path, threads=pool, is_cancelled=fail_in_second_thread)

    @pytest.mark.parametrize(("cancels", "error"), [(False, RuntimeError), (True, LoadCancelledError)])
    def test_pool_that_is_shut_down_fails_the_read_unless_it_was_cancelled_too(
        self, cancels, error, tmp_path, small_tasks, pool
    ):
        path = make_adapter(tmp_path / "adapter", rank=4)
        calls = []

        def shut_down():
            calls.append(1)
            if len(calls) >= 3:
                pool.shutdown(wait=False)
            return cancels and len(calls) > 3

        with pytest.raises(error):
            read_block(path, threads=pool, is_cancelled=shut_down)


def test_nothing_is_mapped(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    maps = []

    def look():
        with open("/proc/self/maps", encoding="utf-8") as file:
            maps.append(str(path) in file.read())
        return False

    layout, block, _ = read_block(path, is_cancelled=look)
    assert maps
    assert not any(maps)
    before = block.clone()
    os.truncate(path / WEIGHTS_FILE, 0)
    assert torch.equal(block, before)
    assert layout.num_bytes == len(block)


def test_file_is_closed_with_the_checked_adapter_and_after_a_refusal(tmp_path):
    def num_open_files():
        return len(os.listdir("/proc/self/fd"))

    path = make_adapter(tmp_path / "adapter", rank=4)
    before = num_open_files()
    checked = check(path)
    assert num_open_files() == before + 1
    checked.close()
    checked.close()
    assert num_open_files() == before
    BAD_ADAPTERS["wrong_shape"].corrupt(path)
    with pytest.raises(InvalidArgumentError):
        check(path)
    (path / WEIGHTS_FILE).unlink()
    (path / WEIGHTS_FILE).mkdir()
    with pytest.raises(InvalidArgumentError, match="is not a regular file"):
        check(path)
    assert num_open_files() == before


def test_check_reads_no_tensor(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    tensors = read_adapter_tensors(path)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    write_adapter_tensors(path, tensors)
    with check(path) as checked:
        assert len(checked.layout.modules) == 28


def test_checked_adapter_can_be_read_again(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    with check(path) as checked:
        blocks = [new_block(checked.layout) for _ in range(2)]
        digests = {read_into(checked, block, threads=None, is_cancelled=lambda: False) for block in blocks}
    assert len(digests) == 1
    assert torch.equal(*blocks)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda block: block[:-1],
        lambda block: torch.cat([block, block]),
        lambda block: block.view(torch.int16),
        lambda block: torch.cat([block, block])[::2],
        lambda block: torch.cat([block, block])[1 : len(block) + 1],
        lambda block: block.view(2, -1),
    ],
)
def test_block_that_does_not_fit_is_refused(spoil, tmp_path):
    with check(make_adapter(tmp_path / "adapter", rank=4)) as checked:
        block = spoil(new_block(checked.layout))
        with pytest.raises(ValueError, match=f"expected .{checked.layout.num_bytes}. bytes"):
            read_into(checked, block, threads=None, is_cancelled=lambda: False)


def test_reads_of_many_adapters_share_a_pool(tmp_path, small_tasks, pool):
    paths = [make_adapter(tmp_path / str(seed), rank=4, seed=seed) for seed in range(6)]
    expected = [digest_of(path) for path in paths]
    found = [""] * len(paths)

    def read(index):
        found[index] = read_block(paths[index], threads=pool)[2]

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert len(set(found)) == len(paths)


def test_read_ends_as_cancelled_where_the_pool_is_closed_with_it(tmp_path, small_tasks):
    path = make_full_adapter(tmp_path / "adapter", rank=3, target_modules=EVERYTHING)
    is_closed = False

    def is_cancelled() -> bool:
        return is_closed

    class ClosedInTime(ThreadPoolExecutor):
        """Closed, and the read cancelled, when something is submitted for the second time."""

        num_submitted = 0

        def submit(self, *arguments):
            nonlocal is_closed
            self.num_submitted += 1
            if self.num_submitted == 2:
                is_closed = True
                self.shutdown(wait=False)
            return super().submit(*arguments)

    with check(path) as checked, ClosedInTime(1) as threads, pytest.raises(LoadCancelledError):
        read_into(checked, new_block(checked.layout), threads=threads, is_cancelled=is_cancelled)


class TestDigest:
    def test_is_made_of_every_field_of_every_module_in_the_order_of_paths(self, tmp_path):
        path = make_full_adapter(
            tmp_path / "adapter",
            rank=3,
            target_modules=["qkv_proj", "o_proj"],
            layers=[1],
            dtype=torch.float16,
        )
        stored = read_adapter_tensors(path)
        key = "base_model.model.model.layers.1.self_attn"
        # q, k and v have 32, 16 and 16 rows; A is that of q for all three.
        shared = struct.pack("<Q", 3) + b"model.layers.1.self_attn.q_proj"
        modules = [
            ("k_proj", shared, "qkv_proj", 16),
            ("o_proj", b"", "o_proj", 24),
            ("q_proj", shared, "qkv_proj", 32),
            ("v_proj", shared, "qkv_proj", 16),
        ]
        fields = []
        for name, shared_a, trained, width in modules:
            a = stored[f"{key}.{trained}.lora_A.weight"]
            fields += [f"model.layers.1.self_attn.{name}".encode(), shared_a, struct.pack("<Qd", 3, 2.0)]
            fields += [b"F16", struct.pack("<QQ", *a.shape), b"F16", struct.pack("<QQ", width, 3)]
        # What is stored, in the order of the modules that it begins with: one task.
        content = b""
        for trained in ("o_proj", "qkv_proj"):
            for half in ("A", "B"):
                data = stored[f"{key}.{trained}.lora_{half}.weight"].contiguous().numpy().tobytes()
                content += data.ljust(align(len(data), MATRIX_ALIGNMENT), b"\0")
        fields.append(hashlib.sha256(content).digest())
        expected = hashlib.sha256(b"lora_serve adapter content 3")
        for value in fields:
            expected.update(struct.pack("<Q", len(value)) + value)
        assert digest_of(path) == expected.hexdigest()

    def test_is_the_same_for_a_scaling_of_either_zero(self, tmp_path):
        path = make_adapter(tmp_path / "adapter", rank=3)
        digests = set()
        for alpha in (0.0, -0.0):
            corrupt_config(path, lora_alpha=alpha)
            digests.add(digest_of(path))
        assert len(digests) == 1

    def test_changes_with_every_stored_byte(self, tmp_path):
        path = make_adapter(tmp_path / "adapter", rank=3, target_modules=["q_proj"])
        data = (path / WEIGHTS_FILE).read_bytes()
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        digests = {digest_of(path)}
        places = [*range(begin, len(data), 4 * 37), len(data) - 4]
        for place in places:
            (path / WEIGHTS_FILE).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            digests.add(digest_of(path))
        assert len(digests) == 1 + len(places)

    def test_is_the_same_with_buffers_that_were_used_before(self, tmp_path, small_tasks):
        path = make_full_adapter(tmp_path / "adapter", rank=3, target_modules=EVERYTHING)
        digest = digest_of(path)
        with ThreadPoolExecutor(2) as threads, check(path) as checked:
            # The last tensors of a task are larger or smaller than those before them, with gaps elsewhere.
            assert len(read_plan.plan_tasks(checked)) > 5
            block = new_block(checked.layout)
            found = read_into(checked, block, threads=threads, is_cancelled=lambda: False)
        assert found == digest

    def test_is_that_of_the_content_not_of_path_spelling_or_dtype_of_the_model(self, tmp_path, small_tasks):
        options = {"rank": 4, "seed": 3, "target_modules": EVERYTHING}
        path = make_full_adapter(tmp_path / "peft", **options)
        digest = digest_of(path)
        same = [copy_adapter(path, tmp_path / "copy")]
        for style in ("named", "bare_decoder", "no_prefix", "language_model"):
            same.append(make_full_adapter(tmp_path / style, key_style=style, **options))
        config = dict(reversed(read_adapter_config(path).items()))
        same.append(copy_adapter(path, tmp_path / "config"))
        write_adapter_config(same[-1], {**config, "lora_dropout": 0.1, "base_model_name_or_path": "x"})
        assert re.fullmatch("[0-9a-f]{64}", digest)
        assert {digest_of(other) for other in same} == {digest}
        assert {digest_of(path, dtype) for dtype in DTYPES} == {digest}

    @pytest.mark.parametrize(
        "module", ["layers.0.mlp.down_proj", "layers.3.self_attn.v_proj", "lm_head", "embed_tokens"]
    )
    @pytest.mark.parametrize("half", "AB")
    @pytest.mark.parametrize("where", [0, -1])
    def test_changes_with_any_bit(self, where, half, module, tmp_path):
        path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=EVERYTHING)
        before = digest_of(path, torch.bfloat16)
        tensors = read_adapter_tensors(path)
        (key,) = (
            k for k in tensors if f"{module}." in k and (f"lora_{half}." in k or k.endswith(f"_{half}"))
        )
        # The last bit of a float32 does not survive the conversion.
        tensors[key].view(torch.int32).view(-1)[where] ^= 1
        write_adapter_tensors(path, tensors)
        assert digest_of(path, torch.bfloat16) != before

    def test_changes_with_rank_scaling_module_and_stored_dtype(self, tmp_path):
        path = make_adapter(tmp_path / "0", rank=4, target_modules=["down_proj", "k_proj"], layers=[1])
        digests = [digest_of(path)]

        def changed(change):
            other = copy_adapter(path, tmp_path / str(len(digests)))
            change(other, read_adapter_tensors(other))
            digests.append(digest_of(other))

        def rename(other, tensors):
            corrupt_config(other, target_modules=["down_proj", "v_proj"])
            write_adapter_tensors(other, {key.replace("k_proj", "v_proj"): t for key, t in tensors.items()})

        def pad_rank(other, tensors):
            # The same product: a fifth row and column of zeros, the scaling unchanged.
            corrupt_config(other, r=5, lora_alpha=10, layers_to_transform=None)
            padded = {
                key: torch.nn.functional.pad(t, (0, 0, 0, 1) if ".lora_A." in key else (0, 1))
                for key, t in tensors.items()
            }
            write_adapter_tensors(other, padded)

        changed(rename)
        changed(pad_rank)
        changed(lambda other, tensors: corrupt_config(other, lora_alpha=9))
        changed(lambda other, tensors: corrupt_config(other, use_rslora=True))
        changed(lambda other, tensors: corrupt_config(other, alpha_pattern={"k_proj": 1}))
        halves = {key: t.half() for key, t in read_adapter_tensors(path).items()}
        changed(lambda other, tensors: write_adapter_tensors(other, halves))
        changed(
            lambda other, tensors: write_adapter_tensors(
                other, {key: t.view(torch.bfloat16) for key, t in halves.items()}
            )
        )
        assert len(set(digests)) == len(digests) == 8

    def test_swapped_halves_of_the_same_shape_differ(self, tmp_path):
        path = make_adapter(tmp_path / "adapter", rank=24, target_modules=["o_proj"], layers=[0])
        tensors = read_adapter_tensors(path)
        a, b = sorted(tensors)
        square = {a: torch.randn(24, 32), b: torch.randn(24, 24)}
        write_adapter_tensors(path, square)
        before = digest_of(path)
        write_adapter_tensors(path, {a: square[a], b: square[b].T.contiguous()})
        assert digest_of(path) != before

    def test_fused_and_separate_spelling_differ_because_their_layouts_do(self, tmp_path):
        fused = make_full_adapter(tmp_path / "fused", rank=4, target_modules=["qkv_proj"])
        tensors = read_adapter_tensors(fused)
        separate = copy_adapter(fused, tmp_path / "separate")
        split = {}
        for path, members in FUSED.items():
            if "qkv" in path:
                start = 0
                for member in members:
                    width = make_full_targets()[member].out_features
                    key = f"base_model.model.{path}.lora_"
                    split[f"base_model.model.{member}.lora_A.weight"] = tensors[f"{key}A.weight"].clone()
                    split[f"base_model.model.{member}.lora_B.weight"] = tensors[f"{key}B.weight"][
                        start : start + width
                    ].clone()
                    start += width
        write_adapter_tensors(separate, split)
        corrupt_config(separate, target_modules=["q_proj", "k_proj", "v_proj"])
        layout, block, digest = read_block(fused)
        other_layout, other_block, other_digest = read_block(separate)
        assert layout.num_bytes < other_layout.num_bytes
        assert digest != other_digest
        views = view_modules(layout, block, make_full_targets(), torch.float32)
        for module, weights in view_modules(
            other_layout, other_block, make_full_targets(), torch.float32
        ).items():
            assert torch.equal(weights.a, views[module].a)
            assert torch.equal(weights.b, views[module].b)
