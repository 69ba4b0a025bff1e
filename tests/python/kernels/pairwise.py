"""A choice of cases in which every pair of values of any two factors occurs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

_Choice = tuple[str, int]  # A factor, and which of its values.
_Pair = frozenset[_Choice]


def choose_covering_cases(
    factors: Mapping[str, Sequence[Any]],
    can_count: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Give few cases that together hold each pair of values of each two factors; always the same ones.

    A pair that can occur in a case that counts does so in one; only for the others are there more cases.

    Parameters
    ----------
    factors
        Values by name, no value twice; at least two factors, none without values.
    can_count
        Gets a value each of two or more factors, by name, and says whether a case that has them may count; of
        all factors, whether it does. What it refuses it must also refuse with more factors; to what it takes,
        each other factor must have a value with which it takes that too.
    seed
        Decides between equals, at random: values that went together by a rule would hide each other's faults.

    Returns
    -------
    list of dict
        A value by name of each factor; first the cases that count. At least as many as the two longest
        factors have pairs; seldom a fifth more.
    """
    generator = random.Random(seed)
    by_length = sorted(factors, key=lambda name: -len(factors[name]))

    def values_of(chosen: Iterable[_Choice]) -> dict[str, Any]:
        return {name: factors[name][index] for name, index in chosen}

    counting: list[_Pair] = []
    others: list[_Pair] = []
    for first, second in combinations(by_length, 2):
        for i, j in product(range(len(factors[first])), range(len(factors[second]))):
            pair = frozenset({(first, i), (second, j)})
            (counting if can_count(values_of(pair)) else others).append(pair)
    sizes = {name: len(values) for name, values in factors.items()}
    cases = _cover(counting, sizes, lambda case: can_count(values_of(case.items())), generator)
    cases += _cover(others, sizes, lambda _: True, generator)
    return [values_of(case.items()) for case in cases]


def _cover(
    pairs: Sequence[_Pair],
    sizes: Mapping[str, int],
    takes: Callable[[Mapping[str, int]], bool],
    generator: random.Random,
) -> list[dict[str, int]]:
    """Cases that hold these pairs, each one that `takes` agrees to.

    Greedy: a case begins with the first pair that is missing; each other factor, in any order, takes the
    value that adds most missing pairs with what the case has.
    """
    missing = dict.fromkeys(pairs)
    cases = []
    while missing:
        case = dict(sorted(next(iter(missing))))
        for name in generator.sample(list(sizes), len(sizes)):
            if name in case:
                continue
            possible = [index for index in range(sizes[name]) if takes({**case, name: index})]
            generator.shuffle(possible)
            case[name] = max(
                possible,
                key=lambda index, name=name: sum(
                    frozenset({(name, index), other}) in missing for other in case.items()
                ),
            )
        for first, second in combinations(case.items(), 2):
            missing.pop(frozenset({first, second}), None)
        cases.append(case)
    return cases
