"""The choice of cases of the grid has every pair of values in a step that does something, and is short."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from kernels.lora_grid_cases import (
    CPU_FACTORS,
    GPU_FACTORS,
    can_have_adapter,
    choose_grid_cases,
    make_mapping,
)
from kernels.pairwise import choose_covering_cases


def every_case(factors):
    return True


def unequal_a_and_b(factors):
    return "a" not in factors or "b" not in factors or factors["a"] != factors["b"]


FACTORS = [
    pytest.param({"a": [1, 2], "b": [3]}, every_case, id="smallest"),
    pytest.param({"a": [1, 2, 3], "b": [True, False], "c": [[1], [2], [3], [4]]}, every_case, id="unequal"),
    pytest.param({name: range(5) for name in "abcdefgh"}, every_case, id="equal"),
    pytest.param({name: range(4) for name in "abcd"}, unequal_a_and_b, id="some do not count"),
    pytest.param(CPU_FACTORS, can_have_adapter, id="grid on a CPU"),
    pytest.param(GPU_FACTORS, can_have_adapter, id="grid on a GPU"),
]
GRIDS = [pytest.param(CPU_FACTORS, id="on a CPU"), pytest.param(GPU_FACTORS, id="on a GPU")]


def missing_pairs(cases, factors, can_count=every_case):
    """Pairs of values that might be in a case that counts, and are in none of those that do."""
    counting = [case for case in cases if can_count(case)]
    missing = []
    for first, second in combinations(factors, 2):
        found = [(case[first], case[second]) for case in counting]
        for i, j in product(factors[first], factors[second]):
            if can_count({first: i, second: j}) and (i, j) not in found:
                missing.append((first, i, second, j))
    return missing


@pytest.mark.parametrize(("factors", "can_count"), FACTORS)
def test_every_pair_of_values_is_chosen_and_in_a_case_that_counts_if_it_can_be(factors, can_count):
    cases = choose_covering_cases(factors, can_count)
    assert all(set(case) == set(factors) for case in cases)
    assert missing_pairs(cases, factors) == []
    assert missing_pairs(cases, factors, can_count) == []


@pytest.mark.parametrize("factors", GRIDS)
def test_grid_has_pairs_that_a_cover_with_steps_without_adapters_leaves_out(factors):
    assert missing_pairs(choose_covering_cases(factors), factors, can_have_adapter)
    assert missing_pairs(choose_grid_cases(factors), factors, can_have_adapter) == []


@pytest.mark.parametrize(("factors", "can_count"), FACTORS)
def test_choice_is_short_and_always_the_same(factors, can_count):
    cases = choose_covering_cases(factors, can_count)
    assert cases == choose_covering_cases(factors, can_count)
    longest, second = sorted((len(values) for values in factors.values()), reverse=True)[:2]
    # Among many factors of equal length a greedy choice needs up to twice the least number.
    assert len(cases) <= 2 * longest * second


def slots_in_step(factors):
    """The adapter slots of a step of the grid, and that of the adapter with the named rank."""
    mapping, slots = make_mapping(factors, torch.Generator().manual_seed(0))
    return set(mapping.tolist()) - {-1}, slots[0]


@pytest.mark.parametrize("factors", GRIDS)
def test_steps_that_count_have_the_adapter_of_the_named_rank_and_others_none(factors):
    for case in choose_grid_cases(factors):
        slots, named = slots_in_step(case)
        assert named in slots if can_have_adapter(case) else not slots, case


@pytest.mark.parametrize("factors", GRIDS)
def test_every_value_but_no_tokens_and_no_adapters_is_in_a_step_that_has_some(factors):
    cases = [case for case in choose_grid_cases(factors) if slots_in_step(case)[0]]
    without = {
        (name, value)
        for name, values in factors.items()
        for value in values
        if all(case[name] != value for case in cases)
    }
    assert without == {("num_tokens", 0), ("mix", "none")}


@pytest.mark.parametrize("factors", GRIDS)
def test_every_number_of_adapters_is_once_in_a_step_at_once(factors):
    cases = choose_grid_cases(factors)
    full = {case["max_loras"] for case in cases if len(slots_in_step(case)[0]) == case["max_loras"]}
    assert full == set(factors["max_loras"])


@pytest.mark.parametrize("factors", GRIDS)
def test_factors_of_few_values_do_not_go_together(factors):
    few = [name for name, values in factors.items() if len(values) == 2] + ["dtypes"]
    cases = [case for case in choose_grid_cases(factors) if can_have_adapter(case)]
    for names in combinations(dict.fromkeys(few), 3):
        found = {tuple(case[name] for name in names) for case in cases}
        assert found == set(product(*(factors[name] for name in names))), names


def test_every_rank_is_in_a_step_of_either_16_bit_dtype_with_16_and_32_bit_output():
    cases = [case for case in choose_grid_cases(GPU_FACTORS) if slots_in_step(case)[0]]
    found = {(case["rank"], *case["dtypes"]) for case in cases}
    dtypes = (torch.float16, torch.bfloat16)
    assert found == set(product(GPU_FACTORS["rank"], dtypes, (False, True)))
