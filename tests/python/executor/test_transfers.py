from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_serve.common.errors import InternalError
from lora_serve.executor.host_pages import HostPages
from lora_serve.executor.transfers import LOAD_BACK, WRITE_BACK, PageTransfers
from lora_serve.layers.attention import KVLayer

from .plans import PlanStandIn

NUM_DEVICE_PAGES = 6
NUM_HOST_PAGES = 9
NUM_LAYERS = 3
PAGE_SHAPE = (4, 2, 8)  # G, kv_heads, D


def make_layers(seed: int = 0) -> list[KVLayer]:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_DEVICE_PAGES, *PAGE_SHAPE)
    return [
        KVLayer(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(NUM_LAYERS)
    ]


def make_transfers(layers: list[KVLayer]) -> tuple[PageTransfers, torch.Tensor]:
    """The host block is full of NaN, so that nothing that was never copied goes unseen."""
    block = torch.full((NUM_HOST_PAGES, NUM_LAYERS, 2, *PAGE_SHAPE), torch.nan)
    return PageTransfers(HostPages(block, layers), NUM_DEVICE_PAGES), block


def pages_of(layers: list[KVLayer]) -> torch.Tensor:
    """[P, num_layers, 2, G, kv_heads, D], a copy."""
    return torch.stack([torch.stack([layer.k, layer.v], dim=1) for layer in layers], dim=1)


def test_write_back_copies_keys_and_values_of_every_layer_and_nothing_else():
    layers = make_layers()
    before = pages_of(layers)
    transfers, block = make_transfers(layers)

    transfers.start(PlanStandIn(transfers=[(7, WRITE_BACK, [4, 0, 5], [1, 8, 0])]))

    reports = transfers.take_reports()
    assert (reports.completed, reports.failed) == ([7], {})
    assert torch.equal(block[[1, 8, 0]], before[[4, 0, 5]])
    assert block[[2, 3, 4, 5, 6, 7]].isnan().all()
    assert torch.equal(pages_of(layers), before)


def test_load_back_restores_pages_bit_for_bit_at_other_places():
    layers = make_layers()
    before = pages_of(layers)
    transfers, block = make_transfers(layers)
    transfers.start(PlanStandIn(transfers=[(0, WRITE_BACK, [1, 2, 3], [3, 6, 4])]))
    for layer in layers:
        layer.k[1:4], layer.v[1:4] = torch.nan, torch.nan
    host = block.clone()

    transfers.start(PlanStandIn(plan_id=2, transfers=[(1, LOAD_BACK, [6, 3], [5, 1])]))

    assert transfers.take_reports().completed == [0, 1]
    after = pages_of(layers)
    assert torch.equal(after[[5, 1]], before[[2, 1]])
    assert torch.equal(after[[0, 4]], before[[0, 4]])
    assert after[[2, 3]].isnan().all()
    assert torch.equal(block.nan_to_num(7.0), host.nan_to_num(7.0))


def test_each_copy_is_reported_once_and_in_order():
    transfers, _ = make_transfers(make_layers())
    plan = PlanStandIn(
        transfers=[(3, WRITE_BACK, [0], [0]), (4, WRITE_BACK, [], []), (6, WRITE_BACK, [1, 2], [1, 2])]
    )

    transfers.start(plan)

    assert transfers.take_reports().completed == [3, 4, 6]
    assert transfers.take_reports().completed == []


def test_failed_copy_is_logged_and_reported_and_the_others_are_done(monkeypatch, caplog):
    layers = make_layers()
    before = pages_of(layers)
    transfers, block = make_transfers(layers)

    def fail(host_pages, device_pages):
        raise OSError("the bus is gone")

    monkeypatch.setattr(transfers._host_pages, "load_back", fail)
    transfers.start(
        PlanStandIn(
            transfers=[(1, WRITE_BACK, [0], [0]), (2, LOAD_BACK, [5], [4]), (3, WRITE_BACK, [1], [1])]
        )
    )

    reports = transfers.take_reports()
    assert reports.completed == [1, 3]
    assert reports.failed == {2: "OSError: the bus is gone"}
    assert torch.equal(block[:2], before[:2])
    assert "load-back 2 of 1 KV pages failed" in caplog.text
    assert "the bus is gone" in caplog.text
    assert transfers.take_reports().failed == {}


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
def test_page_or_kind_that_does_not_exist_is_an_internal_error_before_anything_is_copied(transfer, message):
    layers = make_layers()
    transfers, block = make_transfers(layers)

    with pytest.raises(InternalError, match=message):
        transfers.start(PlanStandIn(transfers=[(0, WRITE_BACK, [0], [0]), transfer]))
    assert block.isnan().all()
    assert transfers.take_reports().completed == []


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
def test_arrays_that_do_not_fit_together_are_an_internal_error(field, value):
    transfers, _ = make_transfers(make_layers())
    plan = PlanStandIn(transfers=[(0, WRITE_BACK, [0, 1], [0, 1])])
    setattr(plan, field, np.array(value, dtype=np.int32))

    with pytest.raises(InternalError, match="plan 1 has 1 transfers"):
        transfers.start(plan)
