"""Shrink, expand and both together against an exact oracle, element by element."""

from __future__ import annotations

import pytest
import torch

from kernels.lora_cases import (
    DTYPES,
    LAST_SLOT,
    LoRACase,
    assert_within_bounds,
    empty_slot,
    has_same_bits,
    make_case,
    random_weights,
    signed,
)
from lora_serve.kernels import (
    LoRALayerTable,
    LoRASliceWeights,
    add_lora_linear,
    build_lora_metadata,
    lora_expand,
    lora_shrink,
)
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.reference import lora_expand_reference, lora_shrink_reference

pytestmark = pytest.mark.usefixtures("each_way")

RANKS = [1, 3, 5, 8, 64]

# Interleaved adapters of unequal ranks, modules missing on some slices, one adapter without any, base tokens
# between, the last slot in use, and slot 2 installed but absent from the step.
MIXED_RANKS = {
    0: (3, None, 5),
    1: (None, 1, 64),
    2: (8, 8, 8),
    4: (None, None, None),
    LAST_SLOT: (8, 64, 1),
}
MIXED = [LAST_SLOT, -1, 0, 1, -1, 0, LAST_SLOT, 4, 1, 0, -1]


def check_shrink(case: LoRACase) -> None:
    v = lora_shrink(case.x, case.table, case.metadata)
    assert v.dtype == case.x.dtype
    assert_within_bounds(v, lora_shrink_reference(case.x, case.table, case.mapping, case.max_rank))


def check_expand(case: LoRACase, *, offset_start: int = 0) -> None:
    v = lora_shrink(case.x, case.table, case.metadata)
    wide = torch.cat([case.y.new_full((len(case.y), offset_start), float("nan")), case.y], dim=1)
    expected = lora_expand_reference(wide, v, case.table, case.mapping, offset_start=offset_start)
    y = wide.clone()
    lora_expand(y, v, case.table, case.metadata, offset_start=offset_start)
    assert_within_bounds(y, expected)
    untouched = expected.bound == 0
    assert has_same_bits(y[untouched], wide[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_shrink_and_expand_are_exact_to_rounding_for_every_rank(rank, dtype):
    case = make_case(MIXED, dict.fromkeys(MIXED_RANKS, (rank, rank, rank)), dtype=dtype, seed=rank)
    check_shrink(case)
    check_expand(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_and_expand_are_exact_to_rounding_for_mixed_ranks_and_missing_modules(dtype):
    case = make_case(MIXED, MIXED_RANKS, dtype=dtype)
    check_shrink(case)
    check_expand(case)


@pytest.mark.parametrize("mapping", [[LAST_SLOT], [-1], [0] * 17, [-1] * 5, [], [1, -1] * 9])
@pytest.mark.parametrize(("output_slices", "in_features"), [((1,), 1), ((31,), 67), ((9, 2, 2, 11, 1), 33)])
def test_shrink_and_expand_are_exact_to_rounding_for_odd_sizes(mapping, output_slices, in_features):
    ranks: dict[int, tuple[int | None, ...]] = {
        slot: tuple(rank for _ in output_slices) for slot, rank in ((0, 5), (1, 3), (LAST_SLOT, 8))
    }
    case = make_case(mapping, ranks, output_slices=output_slices, in_features=in_features)
    check_shrink(case)
    check_expand(case)


@pytest.mark.parametrize("offset_start", [1, 6])
def test_expand_writes_from_offset_start_on_and_nothing_before(offset_start):
    check_expand(make_case(MIXED, MIXED_RANKS), offset_start=offset_start)


def test_expand_without_add_inputs_overwrites_nan_in_adapter_rows_only():
    case = make_case(MIXED, MIXED_RANKS)
    v = lora_shrink(case.x, case.table, case.metadata)
    y = torch.full((len(MIXED), 18), float("nan"))
    expected = lora_expand_reference(y, v, case.table, case.mapping, offset_start=2, add_inputs=False)

    lora_expand(y, v, case.table, case.metadata, offset_start=2, add_inputs=False)

    assert_within_bounds(y, expected)
    has_adapter = case.mapping >= 0
    assert y[has_adapter, 2:17].isfinite().all()
    assert y[~has_adapter].isnan().all()
    assert y[:, :2].isnan().all()
    assert y[:, 17:].isnan().all()


def test_expand_without_add_inputs_gives_zero_where_the_adapter_has_no_module():
    case = make_case([0, 4], MIXED_RANKS)
    y = torch.full_like(case.y, float("nan"))
    lora_expand(
        y, lora_shrink(case.x, case.table, case.metadata), case.table, case.metadata, add_inputs=False
    )
    assert (y[0, 7:12] == 0).all()
    assert (y[1] == 0).all()


def test_negative_zeros_stay_where_the_adapter_has_no_module():
    case = make_case([0, 1, 4], MIXED_RANKS)
    case.y.fill_(-0.0)
    before = case.y.clone()
    add_lora_linear(case.y, case.x, case.table, case.metadata)
    assert has_same_bits(case.y[0, 7:12], before[0, 7:12])
    assert has_same_bits(case.y[1, :7], before[1, :7])
    assert has_same_bits(case.y[2], before[2])
    alone = build_lora_metadata(torch.tensor([-1, 1, -1]), 1)
    case.y.copy_(before)
    add_lora_linear(case.y, case.x, case.table, alone)
    assert has_same_bits(case.y[1, :7], before[1, :7])


def test_shrink_rows_without_adapter_are_zero_even_for_nan_inputs():
    case = make_case(MIXED, MIXED_RANKS)
    without = case.mapping < 0
    case.x[without] = float("nan")
    v = lora_shrink(case.x, case.table, case.metadata)
    assert (v[:, without] == 0).all()
    assert v.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaling_is_applied_before_rounding(dtype):
    """A product that overflows or loses bits unscaled is right when it is scaled in fp32 first."""
    table = LoRALayerTable((1,), 3)
    large = torch.full((1, 3), 250.0, dtype=dtype)
    install_weights({table: {0: (LoRASliceWeights(large, torch.ones(1, 1, dtype=dtype), 1e-3),)}})
    v = lora_shrink(large, table, build_lora_metadata(torch.tensor([0]), 1))
    assert v.item() == pytest.approx(187.5, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_the_output_never_changes_with_fp32_scaling(dtype):
    case = make_case(MIXED, MIXED_RANKS, dtype=dtype)
    assert lora_shrink(case.x, case.table, case.metadata).dtype == dtype
    assert lora_shrink(case.x, case.table, case.metadata, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_lora_linear_equals_expand_of_shrink_and_repeats_bit_for_bit(dtype):
    case = make_case(MIXED, MIXED_RANKS, dtype=dtype)
    expected = case.y.clone()
    lora_expand(expected, lora_shrink(case.x, case.table, case.metadata), case.table, case.metadata)
    first, second = case.y.clone(), case.y.clone()
    add_lora_linear(first, case.x, case.table, case.metadata)
    add_lora_linear(second, case.x, case.table, case.metadata)
    assert has_same_bits(first, expected)
    assert has_same_bits(first, second)
    assert has_same_bits(first[case.mapping < 0], case.y[case.mapping < 0])
    assert not torch.equal(first[0], case.y[0])


def test_add_lora_linear_changes_a_view_of_a_larger_output():
    case = make_case(MIXED, MIXED_RANKS)
    expected = case.y.clone()
    add_lora_linear(expected, case.x, case.table, case.metadata)
    outer = torch.full((len(MIXED) + 2, 20), float("nan"))
    view = outer[1:-1, 3:18]
    view.copy_(case.y)
    add_lora_linear(view, case.x, case.table, case.metadata)
    assert has_same_bits(view, expected)
    assert outer[0].isnan().all()
    assert outer[:, 18:].isnan().all()


@pytest.mark.parametrize("metadata", [None, build_lora_metadata(torch.tensor([-1, -1]), 2)])
def test_step_without_adapters_does_not_even_look_at_its_inputs(metadata):
    y = torch.tensor([[1.0, -0.0], [float("nan"), 2.0]])
    before = y.clone()
    add_lora_linear(y, torch.zeros(0), LoRALayerTable((2,), 4), metadata)
    assert has_same_bits(y, before)


def test_token_of_an_empty_slot_is_an_error_not_the_base_model():
    case = make_case(MIXED, MIXED_RANKS)
    empty_slot(case.table, 1)
    before = case.y.clone()
    with pytest.raises(LookupError, match="slot 1 holds no adapter but 2 tokens"):
        add_lora_linear(case.y, case.x, case.table, case.metadata)
    assert has_same_bits(case.y, before)


def test_adapter_of_many_tokens_beside_single_ones_is_exact_to_rounding():
    mapping = [1, *[0] * 23, LAST_SLOT, -1, *[0] * 9, 4]
    case = make_case(mapping, MIXED_RANKS)
    check_shrink(case)
    check_expand(case)


def test_layers_of_one_step_each_read_their_own_weights():
    """What the first layer derives from the tables is kept for all of them."""
    generator = torch.Generator().manual_seed(3)
    layers = [LoRALayerTable((7, 5), 13), LoRALayerTable((3,), 11), LoRALayerTable((5, 7), 13)]
    ranks: list[dict[int, tuple[int | None, ...]]] = [
        {0: (3, None), LAST_SLOT: (1, 8)},
        {LAST_SLOT: (5,)},
        {0: (2, 2), LAST_SLOT: (None, 16)},
    ]
    install_weights(
        {
            layer: {slot: random_weights(generator, own, layer) for slot, own in ranks_of_slot.items()}
            for layer, ranks_of_slot in zip(layers, ranks, strict=True)
        }
    )
    of_another_model = LoRALayerTable((7, 5), 13)
    install_weights(
        {of_another_model: {slot: random_weights(generator, (2, 4), layers[0]) for slot in (0, LAST_SLOT)}}
    )
    mapping = torch.tensor([LAST_SLOT, 0, -1, LAST_SLOT])
    metadata = build_lora_metadata(mapping, 2)
    for layer in [*layers, of_another_model]:
        x = signed(generator, 4, layer.in_features)
        y = signed(generator, 4, layer.out_features)
        v = lora_shrink(x, layer, metadata)
        expected = lora_expand_reference(y, v, layer, mapping)
        assert_within_bounds(v, lora_shrink_reference(x, layer, mapping, v.shape[2]))
        add_lora_linear(y, x, layer, metadata)
        assert_within_bounds(y, expected)


def test_wrong_shapes_are_refused():
    case = make_case(MIXED, MIXED_RANKS)
    v = lora_shrink(case.x, case.table, case.metadata)
    with pytest.raises(ValueError, match="x has shape"):
        lora_shrink(case.x[:, :-1], case.table, case.metadata)
    with pytest.raises(ValueError, match="x has shape"):
        lora_shrink(case.x[:-1], case.table, case.metadata)
    with pytest.raises(ValueError, match="O >= 15"):
        lora_expand(case.y[:, :-1], v, case.table, case.metadata)
    with pytest.raises(ValueError, match="offset_start 1"):
        lora_expand(case.y, v, case.table, case.metadata, offset_start=1)
    with pytest.raises(ValueError, match="offset_start -1"):
        lora_expand(case.y, v, case.table, case.metadata, offset_start=-1)
    with pytest.raises(ValueError, match="y has shape"):
        lora_expand(case.y[:-1], v, case.table, case.metadata)
    with pytest.raises(ValueError, match="v has shape"):
        lora_expand(case.y, v[:-1], case.table, case.metadata)
    with pytest.raises(ValueError, match="v has shape"):
        lora_expand(case.y, v.half(), case.table, case.metadata)
    with pytest.raises(ValueError, match="columns of rank"):
        lora_expand(case.y, v[:, :, :3], case.table, case.metadata)
