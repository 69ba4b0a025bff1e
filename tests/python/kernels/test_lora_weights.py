from __future__ import annotations

import pytest
import torch

from lora_serve.kernels import LoRALayerTable, LoRASliceWeights


def module(rank=2, in_features=4, out_features=6, scaling=0.5, dtype=torch.float32):
    return LoRASliceWeights(
        torch.ones(rank, in_features, dtype=dtype), torch.ones(rank, out_features), scaling
    )


def test_install_replaces_a_slot_as_a_whole():
    table = LoRALayerTable((6, 6), 4)
    table.install(3, (module(), module()))
    later = (None, module(rank=5))
    table.install(3, later)
    assert table.get(3) == later
    assert table.installed_slots == (3,)


def test_empty_slot_differs_from_an_adapter_without_modules():
    table = LoRALayerTable((6,), 4)
    table.install(0, (None,))
    assert table.get(0) == (None,)
    assert table.get(1) is None


def test_cleared_slot_is_empty_and_clearing_again_is_nothing():
    table = LoRALayerTable((6,), 4)
    table.install(0, (module(),))
    table.clear(0)
    table.clear(0)
    assert table.get(0) is None
    assert table.installed_slots == ()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((module(),), "2 slices"),
        ((module(in_features=5), None), "slice 0"),
        ((None, module(out_features=7)), "slice 1"),
        ((module(rank=0), None), "R >= 1"),
        ((module(dtype=torch.bfloat16), None), "expected the same"),
        ((module(scaling=float("nan")), None), "scaling is nan"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(weights, message):
    table = LoRALayerTable((6, 6), 4)
    before = (module(), None)
    table.install(1, before)
    with pytest.raises(ValueError, match=message):
        table.install(1, weights)
    assert table.get(1) == before


def test_negative_slot_is_refused():
    with pytest.raises(ValueError, match="slot is -1"):
        LoRALayerTable((6,), 4).install(-1, (None,))


@pytest.mark.parametrize(("slices", "in_features"), [((), 4), ((0,), 4), ((3,), 0)])
def test_layer_without_width_is_refused(slices, in_features):
    with pytest.raises(ValueError, match="at least 1"):
        LoRALayerTable(slices, in_features)


def test_embedding_keeps_a_row_of_a_for_each_token():
    table = LoRALayerTable((6,), 40, is_embedding=True)
    weights = LoRASliceWeights(torch.ones(40, 3), torch.ones(3, 6), 0.5)
    table.install(0, (weights,))
    assert table.get(0) == (weights,)
    assert weights.lora_rank == 3
    assert weights.num_bytes == 4 * 3 * (40 + 6)
    with pytest.raises(ValueError, match=r"expected \(40, R\) and \(R, 6\)"):
        table.install(0, (LoRASliceWeights(torch.ones(3, 40), torch.ones(3, 6), 0.5),))
    with pytest.raises(ValueError, match="R >= 1"):
        table.install(0, (LoRASliceWeights(torch.ones(40, 0), torch.ones(0, 6), 0.5),))
    assert table.get(0) == (weights,)


def test_embedding_of_several_slices_is_refused():
    with pytest.raises(ValueError, match="expected one"):
        LoRALayerTable((6, 6), 4, is_embedding=True)
