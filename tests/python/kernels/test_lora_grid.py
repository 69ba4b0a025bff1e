"""The LoRA kernels on the grid of sizes, ranks, adapters and mixes: a choice that has every pair of values.

On one GPU the cases are independent of each other: several processes may share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICES
from kernels.lora_cases import assert_within_bounds, has_same_bits
from kernels.lora_grid_cases import (
    CPU_FACTORS,
    GPU_FACTORS,
    NAN,
    GridCase,
    expand_oracle,
    make_grid_case,
    shrink_oracle,
)
from kernels.pairwise import choose_covering_cases
from lora_serve.kernels import triton_lora_expand as expand_module
from lora_serve.kernels import triton_lora_shrink as shrink_module
from lora_serve.kernels.reference import ReferenceResult, lora_expand_reference, lora_shrink_reference
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import (
    lora_scratch_elements,
    make_shrunk,
    triton_add_lora_linear,
)
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink

# Columns of v above the rank of an adapter are added up and dropped, whatever the memory holds; NumPy, which
# the interpreter computes with, warns where that is not finite. A GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def cases_of(factors: Mapping[str, Any]) -> list[Any]:
    cases = []
    for case in choose_covering_cases(factors):
        widths = "+".join(map(str, case["output_slices"]))
        dtype = str(case["dtype"]).removeprefix("torch.")
        name = (
            f"{case['num_tokens']} tokens {case['in_features']} to {widths} rank {case['rank']} "
            f"{case['mix']} of {case['max_loras']} {dtype}"
        )
        cases.append(pytest.param(case, id=name.replace(" ", "-")))
    return cases


CPU_CASES, GPU_CASES = cases_of(CPU_FACTORS), cases_of(GPU_FACTORS)
SOME_CASES = CPU_CASES[::7]
LARGE_CASES = [case for case in CPU_CASES if case.values[0]["num_tokens"] == 33][:4]


def new_v(case: GridCase) -> Tensor:
    """NaN, in as many parts as a layer has them."""
    return make_shrunk(case.x, case.table.num_slices, case.max_rank, dtype=case.y.dtype).fill_(NAN)


def check_shrink(case: GridCase) -> None:
    """Complete v within the bounds, twice the same; without zeros, nothing else is written."""
    step = (case.x, case.table.arena, case.table, case.metadata)
    v, again, partial = (new_v(case) for _ in range(3))
    triton_lora_shrink(v, *step, fill_zeros=True)
    triton_lora_shrink(again, *step, fill_zeros=True)
    triton_lora_shrink(partial, *step)

    expected = shrink_oracle(case, v.dtype)
    assert_within_bounds(v.double().sum(0), expected)
    assert has_same_bits(v, again)
    written = (expected.bound > 0).expand(v.shape)
    assert has_same_bits(partial[written], v[written])
    assert partial[~written].isnan().all()


def check_expand(case: GridCase, *, add_inputs: bool) -> None:
    """Rows of slot -1 and columns around the slices keep their bits; nothing is read that is not written."""
    is_written = (shrink_oracle(case, torch.float32).bound > 0)[None]
    parts = new_v(case)
    generator = torch.Generator(case.x.device).manual_seed(len(case.x))
    numbers = torch.randn(parts.shape, generator=generator, device=case.x.device).to(parts.dtype)
    parts = torch.where(is_written, numbers, parts)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    y = case.y if add_inputs else torch.full_like(case.y, NAN)
    before = GridCase(**{**vars(case), "y": y})
    expected = expand_oracle(before, total.to(y.dtype), add_inputs=add_inputs)
    first, second = y.clone(), y.clone()

    for out in (first, second):
        triton_lora_expand(
            out,
            parts,
            case.table.arena,
            case.table,
            case.metadata,
            output_slices=case.table.output_slices,
            offset_start=case.offset_start,
            add_inputs=add_inputs,
        )

    check_output(first, y, expected)
    assert has_same_bits(first, second)


def check_linear(case: GridCase) -> None:
    """Both halves together, whatever the memory between them held before."""
    first, second = case.y.clone(), case.y.clone()
    sizes = (len(case.x), case.table.num_slices, case.x.shape[1], case.max_rank)
    scratch = torch.full((lora_scratch_elements(*sizes),), NAN, device=case.x.device)

    add_linear(case, first)
    add_linear(case, second, scratch)

    v = shrink_oracle(case, case.y.dtype)
    check_output(first, case.y, expand_oracle(case, v.value, v.bound))
    assert has_same_bits(first, second)


def add_linear(case: GridCase, y: Tensor, scratch: Tensor | None = None) -> None:
    triton_add_lora_linear(
        y,
        case.x,
        case.table.arena,
        case.table,
        case.metadata,
        output_slices=case.table.output_slices,
        max_rank=case.max_rank,
        scratch=scratch,
        offset_start=case.offset_start,
    )


def check_output(found: Tensor, before: Tensor, expected: ReferenceResult) -> None:
    assert found.dtype == before.dtype
    assert_within_bounds(found, expected)
    untouched = (expected.bound == 0) & (expected.value.isnan() | (expected.value == before))
    assert has_same_bits(found[untouched], before[untouched])


def check(factors: Mapping[str, Any], device: str) -> None:
    case = make_grid_case(factors, device)
    check_shrink(case)
    check_expand(case, add_inputs=True)
    check_expand(case, add_inputs=False)
    check_linear(case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU")
@pytest.mark.parametrize("factors", CPU_CASES)
def test_halves_and_layer_are_exact_to_rounding_on_the_small_grid(factors):
    check(factors, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("factors", GPU_CASES)
def test_halves_and_layer_are_exact_to_rounding_on_the_whole_grid(factors):
    check(factors, "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factors", LARGE_CASES)
def test_programs_that_take_several_tiles_of_tokens_do_them_all(factors, device, monkeypatch):
    case = make_grid_case(factors, device)
    alone, together = case.y.clone(), case.y.clone()
    add_linear(case, alone)
    for module in (shrink_module, expand_module):
        monkeypatch.setattr(module, "choose_num_tile_programs", lambda *_: 2)
    add_linear(case, together)
    assert has_same_bits(alone, together)


@pytest.mark.parametrize("factors", [case.values[0] for case in SOME_CASES])
def test_oracles_by_adapter_equal_those_by_token(factors):
    case = make_grid_case(factors, "cpu")
    v = shrink_oracle(case, torch.float32)
    expected_v = lora_shrink_reference(case.x, case.table, case.mapping, case.max_rank, dtype=torch.float32)
    assert_equal_results(v, expected_v)
    for add_inputs in (True, False):
        expected = lora_expand_reference(
            *(case.y, v.value, case.table, case.mapping),
            offset_start=case.offset_start,
            add_inputs=add_inputs,
        )
        assert_equal_results(expand_oracle(case, v.value, add_inputs=add_inputs), expected)


def assert_equal_results(found: ReferenceResult, expected: ReferenceResult) -> None:
    """To the last bits of fp64: sums are in another order."""
    torch.testing.assert_close(found.value, expected.value, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(found.bound, expected.bound, rtol=1e-9, atol=1e-15)
    assert torch.equal(found.bound == 0, expected.bound == 0)
