"""Look-up and embedding delta against an exact oracle, element by element."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.lora_cases import (
    DTYPES,
    LAST_SLOT,
    MAX_LORAS,
    assert_within_bounds,
    empty_slot,
    has_same_bits,
    random_weights,
    signed,
)
from lora_serve.kernels import (
    LoRALayerTable,
    LoRAMetadata,
    LoRASliceWeights,
    add_lora_embedding,
    build_lora_metadata,
    lora_expand,
    lora_lookup,
    lora_shrink,
)
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.reference import lora_expand_reference, lora_lookup_reference

pytestmark = pytest.mark.usefixtures("each_way")

VOCAB_SIZE = 29
# Interleaved adapters of unequal ranks, one without a module, base tokens between, the last slot in use.
MIXED_RANKS = {0: 3, 1: 64, 2: 8, 4: None, LAST_SLOT: 5}
MIXED = [LAST_SLOT, -1, 0, 1, -1, 0, LAST_SLOT, 4, 1, 0, -1]


@dataclass
class EmbeddingCase:
    """One step on one embedding; token ids repeat within an adapter and between adapters."""

    y: Tensor
    token_ids: Tensor
    table: LoRALayerTable
    mapping: Tensor
    metadata: LoRAMetadata
    max_rank: int


def make_embedding_case(
    mapping: list[int],
    rank_of_slot: dict[int, int | None],
    *,
    hidden_size: int = 13,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> EmbeddingCase:
    generator = torch.Generator().manual_seed(seed)
    table = LoRALayerTable((hidden_size,), VOCAB_SIZE, is_embedding=True)
    install_weights(
        {
            table: {
                slot: random_weights(generator, (rank,), table, dtype) for slot, rank in rank_of_slot.items()
            }
        }
    )
    token_ids = torch.randint(0, VOCAB_SIZE, (len(mapping),), generator=generator)
    if len(mapping) > 6:
        token_ids[[0, 2, 6]] = VOCAB_SIZE - 1
        token_ids[[3, 5]] = 0
    tokens = torch.tensor(mapping, dtype=torch.int32)
    return EmbeddingCase(
        y=signed(generator, len(mapping), hidden_size, dtype=dtype),
        token_ids=token_ids,
        table=table,
        mapping=tokens,
        metadata=build_lora_metadata(tokens, MAX_LORAS),
        max_rank=max((rank_of_slot[slot] or 0 for slot in set(mapping) if slot >= 0), default=0),
    )


def check(case: EmbeddingCase) -> None:
    dtype = case.y.dtype
    v = lora_lookup(case.token_ids, case.table, case.metadata, dtype=dtype)
    assert v.dtype == dtype
    expected_v = lora_lookup_reference(case.token_ids, case.table, case.mapping, case.max_rank, dtype=dtype)
    assert_within_bounds(v, expected_v)
    case.y[case.mapping < 0] = float("nan")
    expected = lora_expand_reference(case.y, v, case.table, case.mapping)
    first, second = case.y.clone(), case.y.clone()

    add_lora_embedding(first, case.token_ids, case.table, case.metadata)
    add_lora_embedding(second, case.token_ids.to(torch.int32), case.table, case.metadata)

    assert first.dtype == dtype
    assert_within_bounds(first, expected)
    untouched = expected.bound == 0
    assert has_same_bits(first[untouched], case.y[untouched])
    assert has_same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 5, 8, 64])
def test_embedding_delta_is_exact_to_rounding_for_every_rank(rank, dtype):
    check(make_embedding_case(MIXED, dict.fromkeys(MIXED_RANKS, rank), dtype=dtype, seed=rank))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_delta_is_exact_to_rounding_for_mixed_ranks_and_missing_modules(dtype):
    case = make_embedding_case(MIXED, MIXED_RANKS, dtype=dtype)
    changed = case.y.clone()
    add_lora_embedding(changed, case.token_ids, case.table, case.metadata)
    has_module = [slot in (0, 1, LAST_SLOT) for slot in MIXED]
    assert (changed != case.y).any(dim=1).tolist() == has_module
    check(case)


@pytest.mark.parametrize("mapping", [[LAST_SLOT], [-1], [0] * 17, [-1] * 5, [], [1, -1] * 9])
@pytest.mark.parametrize("hidden_size", [1, 67])
def test_embedding_delta_is_exact_to_rounding_for_odd_sizes(mapping, hidden_size):
    check(make_embedding_case(mapping, {0: 5, 1: 3, LAST_SLOT: 8}, hidden_size=hidden_size))


def test_lookup_has_the_dtype_that_is_asked_for_and_zeros_without_adapter():
    case = make_embedding_case(MIXED, MIXED_RANKS, dtype=torch.bfloat16)
    v = lora_lookup(case.token_ids, case.table, case.metadata, dtype=torch.float32)
    expected = lora_lookup_reference(
        case.token_ids, case.table, case.mapping, case.max_rank, dtype=torch.float32
    )
    assert_within_bounds(v, expected)
    assert (v[:, case.mapping < 0] == 0).all()


def test_lookup_scales_in_fp32_before_rounding():
    table = LoRALayerTable((1,), 2, is_embedding=True)
    weights = LoRASliceWeights(torch.full((2, 1), 6e4).half(), torch.ones(1, 1).half(), 1.5e-3)
    install_weights({table: {0: (weights,)}})
    metadata = build_lora_metadata(torch.tensor([0]), 1)
    v = lora_lookup(torch.tensor([1]), table, metadata, dtype=torch.float16)
    assert v.item() == pytest.approx(90.0, rel=1e-3)


@pytest.mark.parametrize("metadata", [None, build_lora_metadata(torch.tensor([-1, -1]), 2)])
def test_step_without_adapters_does_not_even_look_at_its_inputs(metadata):
    y = torch.tensor([[1.0, -0.0], [float("nan"), 2.0]])
    before = y.clone()
    add_lora_embedding(y, torch.zeros(0), LoRALayerTable((2,), 4), metadata)
    assert has_same_bits(y, before)


def test_token_ids_without_adapter_are_not_read():
    case = make_embedding_case(MIXED, MIXED_RANKS)
    expected = case.y.clone()
    add_lora_embedding(expected, case.token_ids, case.table, case.metadata)
    case.token_ids[case.mapping < 0] = 10**6
    add_lora_embedding(case.y, case.token_ids, case.table, case.metadata)
    assert has_same_bits(case.y, expected)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_token_id_outside_the_vocabulary_is_an_error(token_id):
    case = make_embedding_case(MIXED, MIXED_RANKS)
    case.token_ids[2] = token_id
    before = case.y.clone()
    with pytest.raises(IndexError):
        add_lora_embedding(case.y, case.token_ids, case.table, case.metadata)
    assert has_same_bits(case.y, before)


def test_token_of_an_empty_slot_is_an_error_not_the_base_model():
    case = make_embedding_case(MIXED, MIXED_RANKS)
    empty_slot(case.table, 1)
    before = case.y.clone()
    with pytest.raises(LookupError, match="slot 1 holds no adapter but 2 tokens"):
        add_lora_embedding(case.y, case.token_ids, case.table, case.metadata)
    assert has_same_bits(case.y, before)


def test_wrong_inputs_are_refused():
    case = make_embedding_case(MIXED, MIXED_RANKS)
    dtype = torch.float32
    with pytest.raises(ValueError, match="token_ids has shape"):
        lora_lookup(case.token_ids[:-1], case.table, case.metadata, dtype=dtype)
    with pytest.raises(ValueError, match="token_ids has shape"):
        lora_lookup(case.token_ids.double(), case.table, case.metadata, dtype=dtype)
    with pytest.raises(ValueError, match="of a linear layer"):
        lora_lookup(case.token_ids, LoRALayerTable((13,), VOCAB_SIZE), case.metadata, dtype=dtype)
    with pytest.raises(ValueError, match="is an embedding's"):
        lora_shrink(torch.zeros(len(MIXED), VOCAB_SIZE), case.table, case.metadata)
    with pytest.raises(ValueError, match="y has shape"):
        add_lora_embedding(case.y[:, :-1], case.token_ids, case.table, case.metadata)
    v = lora_lookup(case.token_ids, case.table, case.metadata, dtype=dtype)
    with pytest.raises(ValueError, match="v has shape"):
        lora_expand(case.y.half(), v, case.table, case.metadata)
