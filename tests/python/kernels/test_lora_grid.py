"""The LoRA kernels on the grid of sizes, ranks, adapters and mixes: a choice that has every pair of values.

On one GPU the cases are independent of each other: several processes may share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICES
from kernels.lora_cases import has_same_bits
from kernels.lora_grid_cases import (
    CPU_FACTORS,
    GPU_FACTORS,
    can_have_adapter,
    choose_grid_cases,
    expand_oracle,
    make_grid_case,
    shrink_oracle,
)
from kernels.lora_grid_checks import add_linear, check_expand, check_linear, check_shrink
from lora_serve.kernels import triton_lora_expand as expand_module
from lora_serve.kernels import triton_lora_shrink as shrink_module
from lora_serve.kernels.reference import ReferenceResult, lora_expand_reference, lora_shrink_reference

# Columns of v above the rank of an adapter are added up and dropped, whatever the memory holds; NumPy, which
# the interpreter computes with, warns where that is not finite. A GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def cases_of(factors: Mapping[str, Any]) -> list[Any]:
    cases = []
    for case in choose_grid_cases(factors):
        widths = "+".join(map(str, case["output_slices"]))
        dtype, has_wide_output = case["dtypes"]
        dtypes = str(dtype).removeprefix("torch.") + " to float32" * has_wide_output
        name = (
            f"{case['num_tokens']} tokens {case['in_features']} to {widths} rank {case['rank']} "
            f"{case['mix']} of {case['max_loras']} {dtypes}"
        )
        cases.append(pytest.param(case, id=name.replace(" ", "-")))
    return cases


CPU_CASES, GPU_CASES = cases_of(CPU_FACTORS), cases_of(GPU_FACTORS)
SOME_CASES = CPU_CASES[::7]
LARGE_CASES = [case for case in CPU_CASES if case.values[0]["num_tokens"] == 33][:4]


def check(factors: Mapping[str, Any], device: str) -> None:
    case = make_grid_case(factors, device)
    in_step = [case.table.get(slot) for slot in set(case.mapping.tolist()) - {-1}]
    ranks = {module.lora_rank for modules in in_step for module in modules or () if module}
    assert (factors["rank"] in ranks) == can_have_adapter(factors)
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
