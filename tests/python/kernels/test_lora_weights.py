"""A layer's view of arena and tables, and the builder that tests and tuners make both with."""

from __future__ import annotations

import pytest
import torch

from kernels.lora_cases import empty_slot
from lora_serve.kernels import LoRALayerTable, LoRASliceWeights
from lora_serve.kernels.device_tables import DeviceTables
from lora_serve.kernels.lora_builder import install_weights


def module(rank=2, in_features=4, out_features=6, scaling=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, in_features, generator=generator)
    return LoRASliceWeights(
        a.to(dtype), torch.randn(rank, out_features, generator=generator).to(dtype), scaling
    )


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.a, other.a)
            assert torch.equal(one.b, other.b)
            assert one.scaling == other.scaling


def test_built_layers_hold_what_they_were_given_at_every_slot():
    first, second = LoRALayerTable((6, 3), 4), LoRALayerTable((6,), 5)
    weights = {
        first: {0: (module(1), None), 3: (module(3), module(5, out_features=3, scaling=-2.0))},
        second: {3: (module(2, in_features=5),)},
    }
    tables = install_weights(weights, num_slots=6)
    for layer, by_slot in weights.items():
        assert layer.installed_slots == (0, 3)
        assert layer.tables is tables
        assert layer.lora_rank.shape == (6, layer.num_slices)
        for slot, expected in by_slot.items():
            assert_same(layer.get(slot), expected)
    assert second.get(0) == (None,)
    assert first.get(1) is None


def test_offsets_are_elements_of_the_arena_and_all_between_matrices_is_nan():
    table = LoRALayerTable((6, 3), 4)
    weights = (module(3), module(5, out_features=3))
    install_weights({table: {1: weights}})
    is_covered = torch.zeros(len(table.arena), dtype=torch.bool)
    for index, given in enumerate(weights):
        for matrix, offset in ((given.a, table.a_offset[1, index]), (given.b, table.b_offset[1, index])):
            assert int(offset) * matrix.itemsize % 16 == 0
            stored = slice(int(offset), int(offset) + matrix.numel())
            assert torch.equal(table.arena[stored].view(matrix.shape), matrix)
            assert not is_covered[int(offset) - 1 : int(offset) + matrix.numel() + 1].any()
            is_covered[stored] = True
    assert table.arena[~is_covered].isnan().all()


def test_empty_slot_differs_from_an_adapter_without_modules():
    table = LoRALayerTable((6,), 4)
    install_weights({table: {0: (None,), 2: (module(),)}}, num_slots=4)
    assert table.get(0) == (None,)
    assert [table.get(slot) for slot in (-1, 1, 3, 4)] == [None] * 4
    empty_slot(table, 2)
    assert table.get(2) is None
    assert table.installed_slots == (0,)


def test_layer_that_was_never_bound_is_empty():
    table = LoRALayerTable((6, 6), 4)
    assert table.installed_slots == ()
    assert table.get(0) is None
    assert table.lora_rank.shape == (1, 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((module(),), "2 slices"),
        ((module(in_features=5), None), "slice 0"),
        ((None, module(out_features=7)), "slice 1"),
        ((module(rank=0), None), "R >= 1"),
        ((module(), module(dtype=torch.bfloat16)), "expected the same"),
        ((module(scaling=float("nan")), None), "scaling is nan"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(weights, message):
    table = LoRALayerTable((6, 6), 4)
    before = (module(), None)
    install_weights({table: {1: before}})
    with pytest.raises(ValueError, match=message):
        install_weights({table: {1: weights}})
    assert_same(table.get(1), before)


@pytest.mark.parametrize("slot", [-1, 2])
def test_slot_out_of_range_is_refused(slot):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        install_weights({LoRALayerTable((6,), 4): {slot: (None,)}}, num_slots=2)


@pytest.mark.parametrize(("slices", "in_features"), [((), 4), ((0,), 4), ((3,), 0)])
def test_layer_without_width_is_refused(slices, in_features):
    with pytest.raises(ValueError, match="at least 1"):
        LoRALayerTable(slices, in_features)


def test_arena_or_tables_that_do_not_fit_the_layer_are_refused():
    table = LoRALayerTable((6, 3), 4)
    arena, tables = torch.zeros(64), DeviceTables((2, 1), 3, "cpu")
    with pytest.raises(ValueError, match="2 slices is bound to one of 1"):
        table.bind(arena, tables, 1)
    with pytest.raises(ValueError, match="contiguous"):
        table.bind(arena[::2], tables, 0)
    table.bind(arena, tables, 0)
    assert table.lora_rank.shape == (3, 2)


def test_embedding_keeps_a_row_of_a_for_each_token():
    table = LoRALayerTable((6,), 40, is_embedding=True)
    weights = LoRASliceWeights(torch.randn(40, 3), torch.ones(3, 6), 0.5)
    install_weights({table: {0: (weights,)}})
    assert_same(table.get(0), (weights,))
    assert weights.lora_rank == 3
    assert weights.num_bytes == 4 * 3 * (40 + 6)
    with pytest.raises(ValueError, match=r"expected \(40, R\) and \(R, 6\)"):
        install_weights({table: {0: (LoRASliceWeights(torch.ones(3, 40), torch.ones(3, 6), 0.5),)}})


def test_embedding_of_several_slices_is_refused():
    with pytest.raises(ValueError, match="expected one"):
        LoRALayerTable((6, 6), 4, is_embedding=True)
