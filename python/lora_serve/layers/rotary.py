"""Rotary position embedding, with the frequency variants of the Llama, Mistral and Qwen families.

A head of size D is taken as D/2 planes; plane i of a token at position p is turned by ``p * inv_freq[i]``.
Variants differ only in ``inv_freq`` and in one factor on cosine and sine, so each is one function in
``_VARIANTS``. The arithmetic is ordered as in transformers: at position 100,000 one unit in the last place
of a frequency is a visible angle.

Source: Su et al., 2021, "RoFormer" (default); Chen et al., 2023, position interpolation (linear); bloc97,
2023, dynamic NTK; the Llama 3.1 release (llama3); Peng et al., 2023, "YaRN" (yarn).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeParameters:
    """The rope fields of a model's configuration, already checked.

    Parameters
    ----------
    rope_type
        A name of :func:`rope_types`.
    rope_theta
        Base of the frequencies' geometric row.
    factor
        How much longer the context is than in pre-training; 1 = not scaled.
    original_max_position_embeddings
        Context length of pre-training in tokens (llama3, yarn); 0 where the variant has none.
    low_freq_factor, high_freq_factor
        llama3: planes with fewer turns than ``low`` over the original context are interpolated, those with
        more than ``high`` are kept.
    attention_factor, mscale, mscale_all_dim
        yarn: factor on cosine and sine; None = derived from ``factor``.
    beta_fast, beta_slow
        yarn: turns over the original context above which a plane is kept, below which it is interpolated.
    truncate
        yarn: round the border planes to whole numbers.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def _default_frequencies(rope: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (rope.rope_theta**exponents), 1.0


def _linear_frequencies(rope: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    inv_freq, _ = _default_frequencies(rope, head_dim)
    return inv_freq / rope.factor, 1.0


def _llama3_frequencies(rope: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    inv_freq, _ = _default_frequencies(rope, head_dim)
    turns = rope.original_max_position_embeddings / (2 * math.pi / inv_freq)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / rope.factor + kept * inv_freq, 1.0


def _yarn_frequencies(rope: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    def plane_with_turns(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    first, last = plane_with_turns(rope.beta_fast), plane_with_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # the ramp below divides by the distance
    planes = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - ((planes - first) / (last - first)).clamp(0.0, 1.0)

    wavelengths = rope.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    interpolated, extrapolated = 1.0 / (rope.factor * wavelengths), 1.0 / wavelengths
    return interpolated * (1 - kept) + extrapolated * kept, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeParameters) -> float:
    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


# "dynamic" changes its base only for positions beyond max_position_embeddings. The model configuration ends
# there, so that its keys never depend on what else is in the batch; up to there it is the default.
_VARIANTS: dict[str, Callable[[RopeParameters, int], tuple[Tensor, float]]] = {
    "default": _default_frequencies,
    "linear": _linear_frequencies,
    "dynamic": _default_frequencies,
    "llama3": _llama3_frequencies,
    "yarn": _yarn_frequencies,
}


def rope_types() -> tuple[str, ...]:
    """Give the names of the frequency variants."""
    return tuple(_VARIANTS)


def compute_inverse_frequencies(rope: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    """Give the turn per position of each plane.

    Parameters
    ----------
    rope
        Checked parameters.
    head_dim
        D, even.

    Returns
    -------
    tuple[Tensor, float]
        [D/2] float32 on the CPU, in radians per position; and the factor on cosine and sine.
    """
    return _VARIANTS[rope.rope_type](rope, head_dim)


def compute_cos_sin(rope: RopeParameters, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """Give cosines and sines of every position; made once, shared by all layers.

    Parameters
    ----------
    rope
        Checked parameters.
    head_dim
        D, even.
    max_positions
        Positions from 0.
    device
        Where the table is computed and stays.

    Returns
    -------
    Tensor
        [max_positions, D] float32: in a row the cosines of the D/2 planes, then the sines, both times the
        variant's factor. 64 MiB for 131,072 positions of heads of 128.
    """
    inv_freq, factor = compute_inverse_frequencies(rope, head_dim)
    positions = torch.arange(max_positions, device=device, dtype=torch.float32)
    angles = torch.outer(positions, inv_freq.to(device))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(factor)
