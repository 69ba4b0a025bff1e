"""Deltas of logits, whose rows and dtype are not those of the hidden states' step."""

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
)
from lora_serve.kernels import (
    LoRALayerTable,
    LoRASliceWeights,
    add_lora_logits,
    build_lora_metadata,
    lora_shrink,
)
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.reference import lora_expand_reference, lora_shrink_reference

pytestmark = pytest.mark.usefixtures("each_way")

VOCAB_SIZE = 101
RANKS = {0: (3,), 1: (64,), 2: (8,), 4: (None,), LAST_SLOT: (5,)}
SAMPLED = [LAST_SLOT, -1, 0, 1, -1, 0, 4, 1]


def make_logits_case(mapping: list[int], ranks: dict[int, tuple[int | None, ...]], **options) -> LoRACase:
    """Logits are fp32 (fp64 for fp64 hidden states); rows without an adapter start as NaN."""
    case = make_case(mapping, ranks, output_slices=(VOCAB_SIZE,), in_features=33, **options)
    case.y = case.y.to(torch.promote_types(case.x.dtype, torch.float32))
    case.y[case.mapping < 0] = float("nan")
    return case


def check(case: LoRACase) -> None:
    v = lora_shrink(case.x, case.table, case.metadata, dtype=case.y.dtype)
    assert v.dtype == case.y.dtype
    expected_v = lora_shrink_reference(case.x, case.table, case.mapping, case.max_rank, dtype=case.y.dtype)
    assert_within_bounds(v, expected_v)
    expected = lora_expand_reference(case.y, v, case.table, case.mapping)
    first, second = case.y.clone(), case.y.clone()

    add_lora_logits(first, case.x, case.table, case.metadata)
    add_lora_logits(second, case.x, case.table, case.metadata)

    assert first.dtype == case.y.dtype
    assert_within_bounds(first, expected)
    untouched = expected.bound == 0
    assert has_same_bits(first[untouched], case.y[untouched])
    assert has_same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 5, 8, 64])
def test_logits_delta_is_exact_to_rounding_for_every_rank(rank, dtype):
    check(make_logits_case(SAMPLED, dict.fromkeys(RANKS, (rank,)), dtype=dtype, seed=rank))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_delta_is_exact_to_rounding_for_mixed_ranks_and_missing_modules(dtype):
    check(make_logits_case(SAMPLED, RANKS, dtype=dtype))


@pytest.mark.parametrize("mapping", [[LAST_SLOT], [-1], [0] * 17, [], [1, -1] * 9])
def test_logits_delta_is_exact_to_rounding_for_odd_sizes(mapping):
    check(make_logits_case(mapping, RANKS))


def test_delta_of_bf16_hidden_states_is_not_rounded_to_bf16():
    """In fp32 logits, a delta of 1/1024 beside a logit of 8 is there; in bf16 it would be lost."""
    table = LoRALayerTable((1,), 1)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    install_weights({table: {0: (LoRASliceWeights(one, one, (1 + 2**-10) * 2**-10),)}})
    logits = torch.full((1, 1), 8.0)
    add_lora_logits(logits, one, table, build_lora_metadata(torch.tensor([0]), 1))
    assert logits.item() == 8 + (1 + 2**-10) * 2**-10


def test_metadata_of_the_steps_tokens_is_refused():
    case = make_logits_case(SAMPLED, RANKS)
    of_all_tokens = build_lora_metadata(torch.tensor([*SAMPLED, 0, 0]), 8)
    before = case.y.clone()
    with pytest.raises(ValueError, match="x has shape"):
        add_lora_logits(case.y, case.x, case.table, of_all_tokens)
    assert has_same_bits(case.y, before)


def test_row_of_an_empty_slot_is_an_error_not_the_base_model():
    case = make_logits_case(SAMPLED, RANKS)
    empty_slot(case.table, 1)
    before = case.y.clone()
    with pytest.raises(LookupError, match="slot 1 holds no adapter but 2 tokens"):
        add_lora_logits(case.y, case.x, case.table, case.metadata)
    assert has_same_bits(case.y, before)


@pytest.mark.parametrize("metadata", [None, build_lora_metadata(torch.tensor([-1, -1]), 2)])
def test_rows_without_adapters_are_not_even_looked_at(metadata):
    logits = torch.tensor([[1.0, -0.0], [float("nan"), 2.0]])
    before = logits.clone()
    add_lora_logits(logits, torch.zeros(0), LoRALayerTable((2,), 4), metadata)
    assert has_same_bits(logits, before)
