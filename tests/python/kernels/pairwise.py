"""A choice of cases in which every pair of values of any two factors occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def choose_covering_cases(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Give few cases that together hold each pair of values of each two factors; always the same ones.

    Greedy: a case begins with a pair that is still missing, then each other factor takes the value that adds
    most missing pairs with what the case has, among equals the value that occurs least so far.

    Parameters
    ----------
    factors
        Values by name, no value twice; at least two factors, none without values.

    Returns
    -------
    list of dict
        A value by name of each factor. At least as many as the two longest factors have pairs; seldom a fifth
        more.
    """
    names = sorted(factors, key=lambda name: -len(factors[name]))
    sizes = [len(factors[name]) for name in names]
    missing = {
        (first, i, second, j): None
        for first, second in combinations(range(len(names)), 2)
        for i in range(sizes[first])
        for j in range(sizes[second])
    }
    num_uses = [[0] * size for size in sizes]
    cases = []
    while missing:
        first, i, second, j = next(iter(missing))
        chosen = {first: i, second: j}
        for factor in range(len(names)):
            if factor not in chosen:
                values = range(sizes[factor])
                chosen[factor] = max(
                    values,
                    key=lambda value: (
                        sum(_pair(factor, value, *other) in missing for other in chosen.items()),
                        -num_uses[factor][value],
                    ),
                )
        for pair in combinations(sorted(chosen.items()), 2):
            missing.pop(_pair(*pair[0], *pair[1]), None)
        for factor, value in chosen.items():
            num_uses[factor][value] += 1
        cases.append({name: factors[name][chosen[k]] for k, name in enumerate(names)})
    return cases


def _pair(first: int, i: int, second: int, j: int) -> tuple[int, int, int, int]:
    return (first, i, second, j) if first < second else (second, j, first, i)
