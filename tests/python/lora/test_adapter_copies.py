from __future__ import annotations

import random
import threading

import pytest
import torch

from lora_serve.common.errors import InternalError
from lora_serve.lora import adapter_copies

from .device_setup import BOUNCE_BYTES, on_devices, random_bytes, wait_done


@on_devices
@pytest.mark.parametrize("num_bytes", [1, 255, 100_003, (1 << 20) + 1])
def test_load_brings_every_byte_and_no_more(setup, num_bytes):
    buffer = torch.zeros(num_bytes + 512, dtype=torch.uint8, device=setup.device)
    content = random_bytes(num_bytes)

    copy = setup.copies.start_load(setup.host_bytes(content), buffer[256 : 256 + num_bytes])
    wait_done(copy)
    assert torch.equal(buffer[256 : 256 + num_bytes].cpu(), content)
    assert not bool(buffer[:256].any())
    assert not bool(buffer[256 + num_bytes :].any())
    assert copy.copy_ms is not None
    assert copy.copy_ms >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("setup", ["cuda"], indirect=True)
def test_load_runs_beside_the_step_that_runs_now(setup):
    content = random_bytes(1 << 20)
    buffer = torch.zeros(2 << 20, dtype=torch.uint8, device=setup.device)
    source = setup.host_bytes(content)

    setup.keep_steps_busy()
    step_end = setup.execution.record_event()
    wait_done(setup.copies.start_load(source, buffer[: 1 << 20]))
    assert not step_end.query()
    assert torch.equal(buffer[: 1 << 20].cpu(), content)


@on_devices
def test_load_into_bytes_that_were_moved_away_begins_after_the_move(setup):
    old, new = random_bytes(4096, 1), random_bytes(4096, 2)
    buffer = torch.zeros(3 * 4096, dtype=torch.uint8, device=setup.device)
    buffer[4096 : 2 * 4096].copy_(old)
    source = setup.host_bytes(new)

    setup.keep_steps_busy()
    setup.copies.move(buffer, 4096, 0, 4096)
    wait_done(setup.copies.start_load(source, buffer[4096 : 2 * 4096]))
    assert torch.equal(buffer[:4096].cpu(), old)
    assert torch.equal(buffer[4096 : 2 * 4096].cpu(), new)


@on_devices
def test_nothing_waits_for_a_load(setup):
    buffer = torch.zeros(4096, dtype=torch.uint8, device=setup.device)
    content = random_bytes(1024)
    source = setup.host_bytes(content)

    with setup.loads_held_up():
        copy = setup.copies.start_load(source, buffer[:1024])
        setup.copies.move(buffer, 2048, 3072, 1024)
        setup.copies.write_row(buffer[2048:2064], torch.ones(16, dtype=torch.uint8))
        step = buffer[2048:2064].clone()
        setup.wait()
        assert not copy.is_done()
        assert copy.copy_ms is None
        assert copy.error is None
        assert bool((step == 1).all())
    wait_done(copy)
    assert torch.equal(buffer[:1024].cpu(), content)


@on_devices
def test_joined_load_is_over_before_the_steps_that_follow(setup):
    content = random_bytes(1 << 20)
    target = torch.zeros(1 << 20, dtype=torch.uint8, device=setup.device)
    source = setup.host_bytes(content)

    setup.slow_loads_down()
    copy = setup.copies.start_load(source, target)
    copy.join()
    read = target.clone()
    if setup.device.type == "cuda":  # where the stream waited, not the host
        assert not copy.is_done()
    assert torch.equal(read.cpu(), content)
    wait_done(copy)
    copy.join()


@on_devices
def test_row_source_may_be_reused_before_the_row_is_written(setup):
    num_rows, row_bytes = 64, 6144
    rows = torch.zeros((num_rows, row_bytes), dtype=torch.uint8, device=setup.device)
    source = torch.empty(row_bytes, dtype=torch.uint8)

    setup.keep_steps_busy()
    for index in range(num_rows):
        source.fill_(index + 1)
        setup.copies.write_row(rows[index], source)
        source.fill_(0xEE)
    setup.wait()
    expected = torch.arange(1, num_rows + 1, dtype=torch.uint8)[:, None].expand(-1, row_bytes)
    assert torch.equal(rows.cpu(), expected)


@on_devices
def test_row_changes_between_the_steps_around_it(setup):
    old, new = random_bytes(6144, 1), random_bytes(6144, 2)
    row = setup.on_device(old)

    setup.keep_steps_busy()
    before = row.clone()
    setup.copies.write_row(row, new)
    after = row.clone()
    assert torch.equal(before.cpu(), old)
    assert torch.equal(after.cpu(), new)


@on_devices
def test_move_happens_between_the_steps_around_it(setup):
    content = random_bytes(10_000)
    buffer = setup.on_device(content)

    setup.keep_steps_busy()
    before = buffer.clone()
    setup.copies.move(buffer, 1000, 999, 9000)
    after = buffer.clone()
    expected = content.clone()
    expected[999:9999] = content[1000:]
    assert torch.equal(before.cpu(), content)
    assert torch.equal(after.cpu(), expected)


@on_devices
def test_move_keeps_every_byte_however_the_ranges_overlap(setup):
    total = 8 * BOUNCE_BYTES
    content = random_bytes(total)
    rng = random.Random(3)
    edges = [
        0,
        1,
        7,
        BOUNCE_BYTES - 1,
        BOUNCE_BYTES,
        BOUNCE_BYTES + 1,
        2 * BOUNCE_BYTES,
        2 * BOUNCE_BYTES + 1,
    ]
    cases = [(size, distance) for size in edges for distance in edges]
    cases += [(rng.randrange(total // 2), rng.randrange(total // 2)) for _ in range(100)]
    for size, distance in cases:
        for source, target in ((distance, 0), (0, distance), (total - size, total - size - distance)):
            buffer = setup.on_device(content)
            setup.copies.move(buffer, source, target, size)
            expected = content.clone()
            expected[target : target + size] = content[source : source + size]
            assert torch.equal(buffer.cpu(), expected), f"{size} bytes from {source} to {target}"


@on_devices
@pytest.mark.parametrize("move", [(-1, 0, 1), (0, -1, 1), (0, 91, 10), (91, 0, 10), (0, 0, -1)])
def test_move_outside_the_buffer_is_refused(setup, move):
    buffer = torch.zeros(100, dtype=torch.uint8, device=setup.device)
    with pytest.raises(InternalError, match="in 100 bytes"):
        setup.copies.move(buffer, *move)


@on_devices
@pytest.mark.parametrize(
    "source",
    [
        torch.zeros(9, dtype=torch.uint8),
        torch.zeros(10, dtype=torch.int8),
        torch.zeros(20, dtype=torch.uint8)[::2],
        torch.zeros((2, 5), dtype=torch.uint8),
    ],
)
def test_source_that_does_not_fit_is_refused(setup, source):
    target = torch.ones(10, dtype=torch.uint8, device=setup.device)
    for copy in (setup.copies.start_load, lambda s, t: setup.copies.write_row(t, s)):
        with pytest.raises(InternalError, match="a copy of"):
            copy(source, target)
    assert bool((target == 1).all())


@on_devices
def test_close_waits_for_loads_and_lets_none_follow(setup):
    content = random_bytes(1 << 20)
    target = torch.zeros(1 << 20, dtype=torch.uint8, device=setup.device)
    source = setup.host_bytes(content)

    with setup.loads_held_up():
        copy = setup.copies.start_load(source, target)
        assert not copy.is_done()
        closing = threading.Thread(target=setup.copies.close)
        closing.start()
    closing.join()
    assert copy.is_done()
    assert torch.equal(target.cpu(), content)
    setup.copies.close()
    with pytest.raises(InternalError, match="closed"):
        setup.copies.start_load(source, target)


@pytest.mark.parametrize("setup", ["cpu"], indirect=True)
def test_failed_load_is_done_and_tells_why(setup, monkeypatch):
    def fail(source, target):
        raise MemoryError("planted")

    monkeypatch.setattr(adapter_copies, "_timed_copy_ms", fail)
    memory = torch.zeros(10, dtype=torch.uint8)
    with setup.loads_held_up():
        copy = setup.copies.start_load(memory, memory.clone())
        assert copy.error is None
    setup.copies.close()
    assert copy.is_done()
    assert "planted" in str(copy.error)
    assert copy.copy_ms is None
