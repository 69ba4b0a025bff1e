"""The choice of cases of the grid has every pair of values, and is short."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from kernels.lora_grid_cases import CPU_FACTORS, GPU_FACTORS
from kernels.pairwise import choose_covering_cases

FACTORS = [
    pytest.param({"a": [1, 2], "b": [3]}, id="smallest"),
    pytest.param({"a": [1, 2, 3], "b": [True, False], "c": [[1], [2], [3], [4]]}, id="unequal"),
    pytest.param({name: range(5) for name in "abcdefgh"}, id="equal"),
    pytest.param(CPU_FACTORS, id="grid on a CPU"),
    pytest.param(GPU_FACTORS, id="grid on a GPU"),
]


@pytest.mark.parametrize("factors", FACTORS)
def test_every_pair_of_values_of_any_two_factors_is_chosen(factors):
    cases = choose_covering_cases(factors)
    assert all(set(case) == set(factors) for case in cases)
    for first, second in combinations(factors, 2):
        found = [(case[first], case[second]) for case in cases]
        for pair in product(factors[first], factors[second]):
            assert pair in found, f"{first}, {second} = {pair}"


@pytest.mark.parametrize("factors", FACTORS)
def test_choice_is_short_and_always_the_same(factors):
    cases = choose_covering_cases(factors)
    assert cases == choose_covering_cases(factors)
    longest, second = sorted((len(values) for values in factors.values()), reverse=True)[:2]
    # Among many factors of equal length a greedy choice needs up to twice the least number.
    assert len(cases) <= 2 * longest * second
