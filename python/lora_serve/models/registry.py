"""The architectures that the decoder covers, and how each differs from the others: in data only.

A new member of the family is a new entry here. Defaults are those of transformers' configuration classes,
because a config.json leaves out what equals them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_serve.common.errors import InvalidArgumentError


@dataclass(frozen=True)
class ArchitectureSpec:
    """What one architecture name means.

    Parameters
    ----------
    model_type
        The ``model_type`` that belongs to the architecture in a config.json.
    has_attention_bias_field
        The configuration's ``attention_bias`` puts a bias on q, k, v and o.
    has_mlp_bias_field
        The configuration's ``mlp_bias`` puts a bias on gate, up and down.
    always_has_qkv_bias
        q, k and v have a bias, o has none, whatever the configuration says.
    has_qk_norm
        Each head of q and k is normalised before the position embedding.
    needs_num_kv_heads
        The configuration must say how many KV heads there are; else there is one a query head.
    default_head_dim
        Head size where the configuration gives none; None = hidden_size / num_attention_heads.
    default_eos_token_id
        End of text where the configuration gives none.
    slides_on_all_layers
        ``sliding_window`` holds on every layer; else ``use_sliding_window`` and ``layer_types`` say where.
    default_sliding_window
        Window in tokens where the configuration gives none.
    may_slide
        False: the architecture has no sliding window and the fields above mean nothing.
    """

    model_type: str
    has_attention_bias_field: bool = False
    has_mlp_bias_field: bool = False
    always_has_qkv_bias: bool = False
    has_qk_norm: bool = False
    needs_num_kv_heads: bool = True
    default_head_dim: int | None = None
    default_eos_token_id: int | None = None
    may_slide: bool = True
    slides_on_all_layers: bool = False
    default_sliding_window: int | None = 4096


ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "LlamaForCausalLM": ArchitectureSpec(
        model_type="llama",
        has_attention_bias_field=True,
        has_mlp_bias_field=True,
        needs_num_kv_heads=False,
        default_eos_token_id=2,
        may_slide=False,
    ),
    "MistralForCausalLM": ArchitectureSpec(
        model_type="mistral", default_eos_token_id=2, slides_on_all_layers=True
    ),
    "Qwen2ForCausalLM": ArchitectureSpec(model_type="qwen2", always_has_qkv_bias=True),
    "Qwen3ForCausalLM": ArchitectureSpec(
        model_type="qwen3", has_attention_bias_field=True, has_qk_norm=True, default_head_dim=128
    ),
}


def get_architecture(name: str, subject: str) -> ArchitectureSpec:
    """Look an architecture up.

    Parameters
    ----------
    name
        As in ``architectures`` of a config.json.
    subject
        What carries the name, for the message.

    Raises
    ------
    InvalidArgumentError
        The architecture is not supported.
    """
    if name not in ARCHITECTURES:
        raise InvalidArgumentError(
            f"{subject}: architecture {name!r} is not supported, expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]
