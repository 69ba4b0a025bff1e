from __future__ import annotations

import numpy as np
import pytest

from lora_serve.executor.uniform_stream import SeedStream, seeded_uniforms

NUM_DRAWS = 40_000


def _chi_square(values: np.ndarray, num_bins: int = 100) -> float:
    counts = np.bincount((values * num_bins).astype(int), minlength=num_bins)
    expected = len(values) / num_bins
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        (list(range(NUM_DRAWS)), [0] * NUM_DRAWS),
        ([7] * NUM_DRAWS, list(range(NUM_DRAWS))),
        (list(range(NUM_DRAWS)), list(range(NUM_DRAWS))),
    ],
    ids=["neighbouring seeds", "positions of one seed", "both"],
)
def test_uniforms_are_uniform_and_uncorrelated(seeds, positions):
    values = seeded_uniforms(seeds, positions)

    assert values.min() >= 0
    assert values.max() < 1
    # 99 degrees of freedom: mean 99, standard deviation 14.
    assert 99 - 5 * 14 < _chi_square(values) < 99 + 5 * 14
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(NUM_DRAWS)


def test_uniforms_do_not_depend_on_the_other_pairs():
    alone = [seeded_uniforms([seed], [position])[0] for seed, position in [(3, 0), (3, 1), (4, 0)]]

    assert alone == seeded_uniforms([3, 3, 4], [0, 1, 0]).tolist()
    assert len(set(alone)) == 3


def test_seeds_are_taken_modulo_two_to_the_64():
    negative, beyond = seeded_uniforms([-1, 2**64 - 1 + 2**64], [5, 5])

    assert negative == beyond


def test_stream_gives_the_same_different_seeds_again():
    def seeds(of: int) -> list[int]:
        stream = SeedStream(of)
        return [stream.next_seed() for _ in range(100)]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 200
    assert all(0 <= seed < 2**52 for seed in seeds(3))
