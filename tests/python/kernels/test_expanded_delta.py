"""Deltas that the expand has written to memory, added where a packed layer's output is read next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES
from kernels.lora_cases import LAST_SLOT, assert_within_bounds
from kernels.lora_delta_cases import (
    BAD_SLOTS,
    DeltaCase,
    make_bad,
    make_delta_case,
    padded,
    random_mapping,
)
from kernels.triton_lora_cases import MIXED, NAN, assert_same_on_cpu
from lora_serve.kernels import LoRADelta, cuda_lora
from lora_serve.kernels.lora_rotary_store import lora_norm_rotary_store
from lora_serve.kernels.lora_silu_mul import lora_silu_mul
from lora_serve.kernels.reference_lora_elementwise import lora_silu_mul_reference
from lora_serve.kernels.rotary_store import norm_rotary_store
from lora_serve.kernels.silu_mul import silu_mul
from lora_serve.kernels.triton_lora_expand import triton_lora_expand

# NumPy, which the interpreter computes with, warns where exp gives infinity. A GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, PAGES = 4, 2, 16, 4, 60
RANKS: dict[int, tuple[int | None, ...]] = {
    0: (5, 9, 1),
    1: (16, None, 16),
    2: (None, None, None),
    4: (None, 3, None),
    LAST_SLOT: (20, 4, 33),
}
MAPPINGS = [pytest.param(MIXED, id="mixed"), pytest.param(random_mapping(75), id="75 tokens")]


def make(
    device: str, dtype: torch.dtype, mapping: list[int], slices: tuple[int, ...], num_parts: int = 1
) -> DeltaCase:
    """A step whose output is -0 in places, which a delta that is not there must not turn into 0."""
    ranks = {slot: ranks[: len(slices)] for slot, ranks in RANKS.items()}
    step = make_delta_case(mapping, ranks, slices, dtype, device, num_parts=num_parts)
    step.y[:, ::7] = step.case.y[:, ::7] = -0.0
    return step


def make_gated(device: str, dtype: torch.dtype, mapping: list[int] = MIXED, **options: int) -> DeltaCase:
    return make(device, dtype, mapping, (70, 70), **options)


def make_attention(device: str, dtype: torch.dtype, mapping: list[int] = MIXED, **options: int) -> DeltaCase:
    sizes = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    return make(device, dtype, mapping, sizes, **options)


def expanded(delta: LoRADelta) -> LoRADelta:
    """The same delta, written to memory that is NaN wherever the expand does not write."""
    table, num_tokens = delta.table, delta.metadata.num_tokens
    slices = table.output_slices
    values = delta.v.new_full((num_tokens, sum(slices)), NAN, dtype=torch.float32)
    triton_lora_expand(
        *(values, delta.v, table.arena, table, delta.metadata),
        output_slices=slices,
        add_inputs=False,
        rounds_v_as_arena=True,
    )
    return replace(delta, expanded=values)


def added_in_torch(y: Tensor, delta: LoRADelta) -> Tensor:
    assert delta.expanded is not None
    is_added = (delta.metadata.token_lora_mapping >= 0)[:, None] & (delta.expanded != 0)
    return torch.where(is_added, (y + delta.expanded).to(y.dtype), y)


def rotate(qkv: Tensor, delta: LoRADelta | None) -> list[Tensor]:
    """Queries and the whole pool, which was NaN; every third token has no slot."""
    device, num_tokens = qkv.device, len(qkv)
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(PAGES * PAGE_SIZE, generator=generator)[:num_tokens]
    slots[::3] = -1
    positions = torch.randint(0, 50, (num_tokens,), generator=generator)
    cos_sin = torch.randn(50, HEAD_DIM, generator=generator)
    weights = torch.randn(2, HEAD_DIM, generator=generator).to(qkv.dtype).to(device)
    pages = torch.full((PAGES, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM), NAN, dtype=qkv.dtype, device=device)
    places = (positions.to(device), cos_sin.to(device), slots.to(device), pages[:, 0], pages[:, 1])
    if delta is None:
        return [norm_rotary_store(qkv.clone(), *places, *weights, 1e-6), pages]
    return [lora_norm_rotary_store(qkv.clone(), delta, *places, *weights, 1e-6), pages]


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_activation_is_exact_to_rounding(mapping, num_parts, device, dtype):
    step = make_gated(device, dtype, mapping, num_parts=num_parts)
    case = step.case

    found = lora_silu_mul(step.y, expanded(step.delta))

    assert_within_bounds(found.cpu(), lora_silu_mul_reference(case.y, step.v, case.table, case.mapping))
    assert_same_on_cpu(found, lora_silu_mul(step.y, expanded(step.delta)))
    assert_same_on_cpu(step.y, case.y)


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_results_have_the_bits_of_a_sum_and_the_plain_kernels(mapping, device, dtype):
    gated, attention = (make_one(device, dtype, mapping) for make_one in (make_gated, make_attention))
    delta = expanded(gated.delta)
    assert_same_on_cpu(lora_silu_mul(gated.y, delta), silu_mul(added_in_torch(gated.y, delta)))
    delta = expanded(attention.delta)
    found, expected = rotate(attention.y, delta), rotate(added_in_torch(attention.y, delta), None)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_on_cpu(ours, theirs)
    assert not torch.equal(found[0].nan_to_num(), rotate(attention.y, None)[0].nan_to_num())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_an_adapter_have_the_bits_of_the_plain_kernels(device):
    """Their rows of the delta are NaN: nothing has written them."""
    gated, attention = (make_one(device, torch.float16) for make_one in (make_gated, make_attention))
    is_plain = ((gated.case.mapping < 0) | (gated.case.mapping == 2)).to(device)
    delta = expanded(gated.delta)
    assert delta.expanded is not None
    assert delta.expanded[gated.case.mapping.to(device) < 0].isnan().all()
    assert_same_on_cpu(lora_silu_mul(gated.y, delta)[is_plain], silu_mul(gated.y)[is_plain])
    query, _ = rotate(attention.y, expanded(attention.delta))
    assert_same_on_cpu(query[is_plain], rotate(attention.y, None)[0][is_plain])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", BAD_SLOTS)
def test_rows_that_cannot_have_their_adapter_become_nan_and_no_others(how, device):
    for make_one, run in ((make_gated, lora_silu_mul), (make_attention, lambda y, d: rotate(y, d)[0])):
        step = make_one(device, torch.float16)
        expected = run(step.y, expanded(step.delta))
        make_bad(step.delta, how)
        found, is_bad = run(step.y, expanded(step.delta)), (step.case.mapping == LAST_SLOT).to(device)
        assert found[is_bad].isnan().all()
        assert expected.isfinite().all()
        assert_same_on_cpu(found[~is_bad], expected[~is_bad])


@pytest.mark.parametrize("device", DEVICES)
def test_padded_rows_change_no_others(device):
    step = make_gated(device, torch.float16)
    expected = lora_silu_mul(step.y, expanded(step.delta))
    y = torch.cat([step.y, step.y.new_full((21, step.y.shape[1]), NAN)])
    found = lora_silu_mul(y, expanded(padded(step.delta, 21)))
    assert_same_on_cpu(found[: len(MIXED)], expected)


@pytest.mark.parametrize("device", DEVICES)
def test_delta_is_added_in_place_where_no_kernel_takes_it_along(device):
    step = make_gated(device, torch.float16)
    delta, y = expanded(step.delta), step.y.clone()
    cuda_lora.add_delta(y, delta)
    assert_same_on_cpu(y, added_in_torch(step.y, delta))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_at_a_distance_get_their_own_delta(device):
    step = make_gated(device, torch.float16)
    wide = torch.full((len(MIXED), 200), NAN, dtype=torch.float16, device=device)
    wide[:, 10:150] = step.y
    found = lora_silu_mul(wide[:, 10:150], expanded(step.delta))
    assert_same_on_cpu(found, lora_silu_mul(step.y, expanded(step.delta)))


def test_deltas_of_another_output_are_refused_by_name():
    step = make_gated("cpu", torch.float32)
    delta = expanded(step.delta)
    assert delta.expanded is not None
    with pytest.raises(ValueError, match="the delta is not expanded, expected"):
        silu_mul(step.y, delta=step.delta)
    with pytest.raises(
        ValueError, match=r"the delta is \(11, 138\) torch\.float32, expected \(11, 140\) float32"
    ):
        silu_mul(step.y, delta=replace(delta, expanded=delta.expanded[:, :-2]))
    with pytest.raises(ValueError, match=r"torch\.float16, expected \(11, 140\) float32"):
        silu_mul(step.y, delta=replace(delta, expanded=delta.expanded.half()))
    with pytest.raises(ValueError, match=r"strides \(1, 11\)"):
        silu_mul(step.y, delta=replace(delta, expanded=delta.expanded.t().contiguous().t()))
    with pytest.raises(ValueError, match=r"\(12,\) slots on cpu, expected contiguous rows and \(11,\) slots"):
        silu_mul(step.y, delta=replace(delta, metadata=padded(step.delta, 1).metadata))
