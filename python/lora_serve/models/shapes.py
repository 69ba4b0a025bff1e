"""Sizes of published models by name, for runs with random weights: a directory with a config.json alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.models.registry import get_architecture

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a published model's config.json says, as far as it decides the amount of work.

    Parameters
    ----------
    architecture
        As in ``architectures``.
    hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size
        Sizes.
    max_position_embeddings
        Context in tokens.
    rope_theta
        Base of the rotary frequencies.
    rms_norm_eps
        Of every norm.
    has_tied_embeddings
        Logits are computed with the embedding matrix.
    rope_scaling
        As in a config.json; None = none.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    has_tied_embeddings: bool = False
    rope_scaling: dict[str, Any] | None = field(default=None)

    def config_content(self) -> dict[str, Any]:
        """Give the fields of a config.json; without an end-of-text token, which random weights never mean."""
        spec = get_architecture(self.architecture, "ModelShape")
        content: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": spec.model_type,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.has_tied_embeddings,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if spec.may_slide:
            content["sliding_window"] = None
        return content


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, *, has_tied_embeddings: bool = False
) -> ModelShape:
    return ModelShape(
        architecture="Qwen3ForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        has_tied_embeddings=has_tied_embeddings,
    )


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any
) -> ModelShape:
    return ModelShape(
        architecture="Qwen2ForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        rope_theta=1e6,
        **others,
    )


def _llama2(hidden: int, intermediate: int, layers: int, heads: int) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    )


def _llama3(
    hidden: int, intermediate: int, layers: int, heads: int, *, factor: float, **others: Any
) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=hidden // heads,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        rope_scaling={**_LLAMA3_ROPE, "factor": factor},
        **others,
    )


MODEL_SHAPES: dict[str, ModelShape] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, has_tied_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, has_tied_embeddings=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, has_tied_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, vocab_size=151936, has_tied_embeddings=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, vocab_size=152064),
    "llama2-7b": _llama2(4096, 11008, 32, 32),
    "llama2-13b": _llama2(5120, 13824, 40, 40),
    "llama3-8b": _llama3(4096, 14336, 32, 32, factor=8.0),
    "llama3-1b": _llama3(2048, 8192, 16, 32, factor=32.0, has_tied_embeddings=True),
    "mistral-7b": ModelShape(
        architecture="MistralForCausalLM",
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=32768,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
    ),
}
"""Published models: Qwen3, Qwen2.5, Llama 2, Llama 3.1 (8B) and 3.2 (1B), Mistral 7B v0.3."""


def write_model_shape(name: str, directory: Path) -> Path:
    """Write a model directory for ``--load-format dummy``: config.json alone, no weights and no tokenizer.

    Parameters
    ----------
    name
        A key of :data:`MODEL_SHAPES`.
    directory
        Made where it does not exist.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    InvalidArgumentError
        No shape has this name.
    """
    if name not in MODEL_SHAPES:
        raise InvalidArgumentError(f"model shape is {name!r}, expected one of {', '.join(MODEL_SHAPES)}")
    directory.mkdir(parents=True, exist_ok=True)
    content = json.dumps(MODEL_SHAPES[name].config_content(), indent=2)
    (directory / "config.json").write_text(content + "\n", encoding="utf-8")
    return directory
