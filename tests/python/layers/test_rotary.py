"""Rotary frequencies and angles against transformers', bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lora_serve.layers import compute_cos_sin
from lora_serve.layers.rotary import compute_inverse_frequencies
from lora_serve.layers.torch_ops import apply_rotary
from lora_serve.models.config_fields import ConfigFields
from lora_serve.models.rope_fields import read_rope_parameters

MAX_POSITIONS = 4096
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
VARIANTS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "llama3_close_factors": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 2.5, "factor": 32.0},
    "yarn": YARN,
    "yarn_attention_factor": {**YARN, "attention_factor": 1.7},
    "yarn_mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn_one_mscale": {**YARN, "mscale": 0.7},
    "yarn_betas": {**YARN, "beta_fast": 16, "beta_slow": 2.5},
    "yarn_not_truncated": {**YARN, "truncate": False},
    "yarn_first_equals_last_plane": {**YARN, "original_max_position_embeddings": 6, "factor": 512.0},
    "yarn_factor_one": {**YARN, "factor": 1.0},
}


def ours_and_reference(rope: dict, theta: float, head_dim: int):
    fields = {"rope_parameters": {**rope, "rope_theta": theta}, "max_position_embeddings": MAX_POSITIONS}
    parameters = read_rope_parameters(ConfigFields("config.json", fields), MAX_POSITIONS)
    config = LlamaConfig(hidden_size=8 * head_dim, num_attention_heads=8, head_dim=head_dim, **fields)
    return parameters, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128, 80])
@pytest.mark.parametrize("rope", VARIANTS.values(), ids=VARIANTS.keys())
def test_frequencies_equal_transformers(rope: dict, head_dim: int, theta: float) -> None:
    parameters, reference = ours_and_reference(rope, theta, head_dim)

    inv_freq, attention_factor = compute_inverse_frequencies(parameters, head_dim)

    assert torch.equal(inv_freq, reference.inv_freq)
    assert attention_factor == reference.attention_scaling


def test_scaled_variants_differ_from_the_default() -> None:
    default, _ = compute_inverse_frequencies(ours_and_reference(VARIANTS["default"], 1e4, 64)[0], 64)
    for name in ("linear", "llama3", "yarn"):
        parameters, _ = ours_and_reference(VARIANTS[name], 1e4, 64)
        assert not torch.equal(compute_inverse_frequencies(parameters, 64)[0], default), name
    assert compute_inverse_frequencies(parameters, 64)[1] > 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_rotated_heads_equal_transformers_up_to_the_last_position(name: str, dtype: torch.dtype) -> None:
    parameters, reference = ours_and_reference(VARIANTS[name], 10000.0, 64)
    generator = torch.Generator().manual_seed(3)
    positions = torch.tensor([0, 1, 2, 77, 1023, MAX_POSITIONS - 1])
    query = torch.randn(6, 3, 64, generator=generator).to(dtype)

    table = compute_cos_sin(parameters, 64, MAX_POSITIONS, torch.device("cpu"))
    cos, sin = table[positions].to(dtype)[:, None].chunk(2, dim=-1)
    rotated = apply_rotary(query, cos, sin)

    assert table.dtype == torch.float32
    assert table.shape == (MAX_POSITIONS, 64)

    heads_first = query.transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, *reference(query, positions[None]))
    assert torch.equal(rotated, expected[0].transpose(0, 1))
