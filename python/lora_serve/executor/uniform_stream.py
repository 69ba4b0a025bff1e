"""Uniform random numbers that are a pure function of (seed, output position)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK_64 = (1 << 64) - 1


def seeded_uniforms(seeds: list[int], output_positions: list[int]) -> npt.NDArray[np.float64]:
    """One uniform number for each pair of seed and output position.

    Parameters
    ----------
    seeds : list of int
        N seeds; any integers, taken modulo 2**64.
    output_positions : list of int
        N indices of the output token that is drawn, from 0.

    Returns
    -------
    numpy.ndarray
        [N] float64 in [0, 1), multiples of 2**-52.

    Notes
    -----
    Counter based: there is no state to advance, so a preempted and recomputed request, or one that runs in
    another batch, draws the same numbers. The seed is mixed once to give the start of a SplitMix64 stream;
    the position is the stream's counter.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).
    """
    start = mix_64(np.array([seed & _MASK_64 for seed in seeds], dtype=np.uint64) + _GOLDEN_GAMMA)
    counter = np.array(output_positions, dtype=np.uint64) + np.uint64(1)
    bits = mix_64(start + counter * _GOLDEN_GAMMA)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


class SeedStream:
    """Seeds for requests that bring none, one after the other: the n-th depends on the stream's seed and n.

    Given when requests arrive, so that no order of running them changes what they draw.

    Parameters
    ----------
    seed : int
        Any integer, taken modulo 2**64.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._num_given = 0

    def next_seed(self) -> int:
        """Give the next seed, in [0, 2**52)."""
        uniform = seeded_uniforms([self._seed], [self._num_given])[0]
        self._num_given += 1
        return int(uniform * 2.0**52)


def mix_64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser, element by element.

    Parameters
    ----------
    values : numpy.ndarray
        uint64, any shape.

    Returns
    -------
    numpy.ndarray
        uint64 of the same shape; a bijection in which every input bit changes every output bit.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
