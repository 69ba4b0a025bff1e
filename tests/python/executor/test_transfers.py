from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_serve.common.errors import InternalError
from lora_serve.executor.page_copies import CudaPageCopies, pieces_of
from lora_serve.executor.transfer_orders import LOAD_BACK, WRITE_BACK, Transfer
from lora_serve.executor.transfers import make_page_transfers

from .plans import PlanStandIn
from .transfer_setup import (
    NUM_DEVICE_PAGES,
    NUM_HOST_PAGES,
    TransferSetup,
    on_cuda,
    on_devices,
    random_pages,
)


@pytest.fixture
def setup(request):
    setup = TransferSetup(request.param)
    yield setup
    setup.close()


def random_ids(rng: np.random.Generator, num_pages: int, size: int) -> np.ndarray:
    """Different pages: one long run, or with short runs here and there."""
    if rng.random() < 0.3:
        return np.arange(size) + rng.integers(0, num_pages - size + 1)
    return np.sort(rng.choice(num_pages, size, replace=False))


on_cpu = pytest.mark.parametrize("setup", ["cpu"], indirect=True)


@on_devices
def test_write_back_copies_whole_pages_and_nothing_else(setup):
    before = setup.pool.cpu().clone()

    setup.start((7, WRITE_BACK, [4, 0, 5], [1, 8, 0]))

    reports = setup.wait_for_reports(1)
    assert (reports.completed, reports.failed) == ([7], {})
    assert torch.equal(setup.block[[1, 8, 0]], before[[4, 0, 5]])
    assert setup.block[[2, 3, 4, 5, 6, 7]].isnan().all()
    assert torch.equal(setup.pool.cpu(), before)


@on_devices
def test_load_back_restores_pages_bit_for_bit_at_other_places(setup):
    before = setup.pool.cpu().clone()
    setup.start((0, WRITE_BACK, [1, 2, 3], [3, 6, 4]))
    setup.wait_for_reports(1)
    setup.pool[1:4] = torch.nan
    host = setup.block.clone()

    setup.start((1, LOAD_BACK, [6, 3], [5, 1]))

    assert setup.wait_for_reports(1).completed == [1]
    after = setup.pool.cpu()
    assert torch.equal(after[[5, 1]], before[[2, 1]])
    assert torch.equal(after[[0, 4]], before[[0, 4]])
    assert after[[2, 3]].isnan().all()
    assert torch.equal(setup.block.nan_to_num(7.0), host.nan_to_num(7.0))


@on_devices
def test_random_copies_of_many_pages_bring_every_byte(setup):
    num_pages, seed = 200, 20261121
    rng = np.random.default_rng(seed)
    big = TransferSetup("cpu" if not setup.is_cuda else "cuda, one by one", num_pages, num_pages)
    if isinstance(setup.copies, CudaPageCopies):
        big.copies._batch = setup.copies._batch
    expected = [big.pool.cpu().clone(), big.block.clone()]
    for number in range(30):
        kind = number % 2
        size = int(rng.integers(1, num_pages))
        sources, destinations = (random_ids(rng, num_pages, size) for _ in range(2))
        big.start((number, kind, sources.tolist(), destinations.tolist()))
        big.wait_for_reports(1)
        expected[1 - kind][destinations] = expected[kind][sources]
        assert torch.equal(big.pool.cpu().nan_to_num(7.0), expected[0].nan_to_num(7.0)), (seed, number)
        assert torch.equal(big.block.nan_to_num(7.0), expected[1].nan_to_num(7.0)), (seed, number)
    big.close()


@on_devices
def test_each_copy_is_reported_once_and_in_order(setup):
    setup.start((3, WRITE_BACK, [0], [0]), (4, WRITE_BACK, [], []), (6, WRITE_BACK, [1, 2], [1, 2]))

    assert setup.wait_for_reports(3).completed == [3, 4, 6]
    assert setup.transfers.take_reports().completed == []


def test_copy_whose_end_cannot_be_marked_is_waited_for_and_fails():
    class BrokenStream:
        is_over = False

        def record_event(self):
            raise RuntimeError("no events left")

        def synchronize(self):
            self.is_over = True

    class Copies(CudaPageCopies):
        def __init__(self):
            self.stream = BrokenStream()

        def _stream_of(self, transfer):
            return self.stream

        def _submit(self, transfer):
            assert not self.stream.is_over

    copies = Copies()

    copy = copies._start(Transfer(0, WRITE_BACK, np.array([1]), np.array([2])))

    assert (copy.is_done(), str(copy.error), copies.stream.is_over) == (True, "no events left", True)


@on_devices
def test_failed_copy_is_logged_and_reported_and_the_others_are_done(setup, monkeypatch, caplog):
    before = setup.pool.cpu().clone()
    submit = setup.copies._submit

    def fail(transfer):
        if transfer.transfer_id == 2:
            raise OSError("the bus is gone")
        submit(transfer)

    monkeypatch.setattr(setup.copies, "_submit", fail)
    setup.start((1, WRITE_BACK, [0], [0]), (2, LOAD_BACK, [5], [4]), (3, WRITE_BACK, [1], [1]))

    reports = setup.wait_for_reports(3)
    assert reports.completed == [1, 3]
    assert reports.failed == {2: "OSError: the bus is gone"}
    assert torch.equal(setup.block[:2], before[:2])
    assert "load-back 2 of 1 KV pages failed" in caplog.text
    assert "the bus is gone" in caplog.text
    assert setup.transfers.take_reports().failed == {}


@on_cuda
def test_write_back_brings_what_earlier_steps_write_and_is_not_reported_before(setup):
    step_end = setup.keep_steps_busy()
    setup.pool[2].fill_(5.0)

    setup.start((1, WRITE_BACK, [2, 3], [4, 5]))

    assert setup.transfers.take_reports().completed == []
    assert not step_end.query(), "starting or asking has waited for the step"
    assert setup.wait_for_reports(1).completed == [1]
    assert step_end.query()
    assert bool((setup.block[4] == 5.0).all())
    assert torch.equal(setup.block[5], setup.pool[3].cpu())


@on_cuda
def test_write_back_does_not_wait_for_steps_submitted_after_it(setup):
    setup.start((1, WRITE_BACK, [2], [4]))
    step_end = setup.keep_steps_busy()

    assert setup.wait_for_reports(1).completed == [1]
    assert not step_end.query()


@on_cuda
def test_load_back_leaves_its_destination_to_the_steps_before_it(setup):
    old, new = setup.pool[3].cpu().clone(), random_pages(1, seed=1)[0]
    setup.block[7] = new

    step_end = setup.keep_steps_busy()
    read = setup.pool[3].clone()
    setup.start((1, LOAD_BACK, [7], [3]))

    assert setup.transfers.take_reports().completed == []
    assert not step_end.query(), "starting or asking has waited for the step"
    assert setup.wait_for_reports(1).completed == [1]
    assert torch.equal(read.cpu(), old)
    assert torch.equal(setup.pool[3].cpu(), new)


@on_cuda
def test_steps_do_not_wait_for_copies(setup):
    content = setup.pool[0].cpu().clone()
    setup.block[7] = content
    copy_begin = setup.hold_copies_up()
    setup.start((1, LOAD_BACK, [7], [3]), (2, WRITE_BACK, [0], [8]))

    step = setup.pool[1].clone()
    setup.execution.synchronize()

    assert not copy_begin.query()
    assert setup.transfers.take_reports().completed == []
    assert torch.equal(step.cpu(), setup.pool[1].cpu())
    assert sorted(setup.wait_for_reports(2).completed) == [1, 2]
    assert torch.equal(setup.pool[3].cpu(), content)


@on_cuda
def test_neither_direction_waits_for_the_other(setup):
    setup.block[7] = 1.0
    with torch.cuda.stream(setup.copies._load_backs):
        torch.cuda._sleep(1_000_000_000)
    setup.start((1, LOAD_BACK, [7], [3]), (2, WRITE_BACK, [0], [8]))

    assert setup.wait_for_reports(1).completed == [2]
    assert setup.wait_for_reports(1).completed == [1]


@on_cuda
def test_copy_that_fails_half_way_is_reported_when_its_first_half_is_over(setup, monkeypatch):
    submit = setup.copies._submit

    def fail_at_the_end(transfer):
        submit(transfer)
        raise OSError("the bus is gone")

    monkeypatch.setattr(setup.copies, "_submit", fail_at_the_end)
    copy_begin = setup.hold_copies_up()
    setup.start((1, WRITE_BACK, [0], [0]))

    assert setup.transfers.take_reports().failed == {}
    assert not copy_begin.query()
    assert setup.wait_for_reports(1).failed == {1: "OSError: the bus is gone"}
    assert bool((setup.block[0] == setup.pool[0].cpu()).all()), "the first half was over"


@on_cuda
def test_close_waits_for_copies_and_gives_the_page_locked_memory_back(setup):
    content = setup.pool[0].cpu().clone()
    block = setup.block
    assert setup.host_pages.is_page_locked
    copy_begin = setup.hold_copies_up()
    setup.start((1, WRITE_BACK, [0], [8]))
    assert not copy_begin.query()

    setup.transfers.close()

    assert copy_begin.query()
    assert torch.equal(block[8], content)
    assert not setup.host_pages.is_page_locked
    setup.transfers.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_made_transfers_copy_on_their_device(device):
    pool = random_pages(4).to(device)
    transfers = make_page_transfers(pool, 5)

    transfers.start(PlanStandIn(transfers=[(1, WRITE_BACK, [0, 1], [3, 4])]))
    completed = []
    while not completed:
        completed = transfers.take_reports().completed
    pool[0] = torch.nan
    transfers.start(PlanStandIn(plan_id=2, transfers=[(2, LOAD_BACK, [3], [2])]))
    while len(completed) < 2:
        completed += transfers.take_reports().completed

    assert completed == [1, 2]
    assert torch.equal(pool[2].cpu(), random_pages(4)[0])
    transfers.close()


def test_without_a_host_tier_plans_without_copies_start_and_report_nothing():
    transfers = make_page_transfers(random_pages(4), 0)

    transfers.start(PlanStandIn())
    assert transfers.take_reports().completed == []
    transfers.close()


@pytest.mark.parametrize(
    ("sources", "destinations", "max_pages", "expected"),
    [
        ([], [], 4, []),
        ([3], [5], 4, [(3, 5, 1)]),
        ([3, 4, 5], [5, 6, 7], 4, [(3, 5, 3)]),
        ([3, 4, 5], [5, 6, 7], 2, [(3, 5, 2), (5, 7, 1)]),
        ([3, 4, 5], [5, 6, 8], 4, [(3, 5, 2), (5, 8, 1)]),
        ([3, 4, 6], [5, 6, 7], 4, [(3, 5, 2), (6, 7, 1)]),
        ([5, 4, 3], [5, 6, 7], 4, [(5, 5, 1), (4, 6, 1), (3, 7, 1)]),
        ([0, 1, 2, 3, 4, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7], 3, [(0, 0, 3), (3, 3, 2), (9, 5, 3)]),
        ([0, 1], [0, 1], 1, [(0, 0, 1), (1, 1, 1)]),
    ],
)
def test_pieces_are_the_runs_of_both_tiers_cut_at_the_longest(sources, destinations, max_pages, expected):
    pages = [np.array(ids, dtype=np.int32) for ids in (sources, destinations)]

    found = pieces_of(Transfer(1, WRITE_BACK, *pages), max_pages)

    columns = (found.sources.tolist(), found.destinations.tolist(), found.lengths.tolist())
    assert list(zip(*columns, strict=True)) == expected


@on_cpu
@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        ((1, WRITE_BACK, [NUM_DEVICE_PAGES], [0]), r"write-back 1 names source pages .* \[0, 6\)"),
        ((1, WRITE_BACK, [0], [NUM_HOST_PAGES]), r"write-back 1 names destination pages .* \[0, 9\)"),
        ((1, LOAD_BACK, [NUM_HOST_PAGES], [0]), r"load-back 1 names source pages .* \[0, 9\)"),
        ((1, LOAD_BACK, [8], [NUM_DEVICE_PAGES]), r"load-back 1 names destination pages .* \[0, 6\)"),
        ((1, LOAD_BACK, [-1], [0]), "source pages -1"),
        ((1, 2, [0], [0]), "transfer 1 has the kind 2"),
    ],
)
def test_page_or_kind_that_does_not_exist_is_an_internal_error_before_anything_is_copied(
    setup, transfer, message
):
    with pytest.raises(InternalError, match=message):
        setup.start((0, WRITE_BACK, [0], [0]), transfer)
    assert setup.block.isnan().all()
    assert setup.transfers.take_reports().completed == []


@on_cpu
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transfer_offsets", []),
        ("transfer_offsets", [0]),
        ("transfer_offsets", [0, 3]),
        ("transfer_offsets", [1, 2]),
        ("transfer_kinds", []),
        ("transfer_source_pages", [1]),
        ("transfer_destination_pages", [1, 2, 3]),
    ],
)
def test_arrays_that_do_not_fit_together_are_an_internal_error(setup, field, value):
    plan = PlanStandIn(transfers=[(0, WRITE_BACK, [0, 1], [0, 1])])
    setattr(plan, field, np.array(value, dtype=np.int32))

    with pytest.raises(InternalError, match="plan 1 has 1 transfers"):
        setup.transfers.start(plan)
