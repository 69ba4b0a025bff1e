"""What a model is, read from the config.json of a checkpoint, with everything unsupported refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.layers.rotary import RopeParameters
from lora_serve.models.config_fields import ConfigFields, read_json_object
from lora_serve.models.registry import ArchitectureSpec, get_architecture
from lora_serve.models.rope_fields import read_rope_parameters

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """A checked description of one decoder model; differences between architectures are plain fields.

    Parameters
    ----------
    architecture
        Name as in ``architectures``.
    vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim
        Sizes; ``num_heads`` is a multiple of ``num_kv_heads``, ``head_dim`` is even.
    rms_norm_eps
        Of every norm.
    rope
        Position embedding.
    max_model_len
        Longest sequence in tokens that the position embedding is made for.
    layer_windows
        [num_layers]: sliding window of each layer in tokens; None = full attention.
    has_qkv_bias, has_o_bias, has_mlp_bias, has_qk_norm
        Which parameters exist.
    has_tied_embeddings
        Logits are computed with the embedding matrix.
    eos_token_ids
        Tokens that end a text, without repetition; may be empty.
    dtype
        Type of weights, activations and KV.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeParameters
    max_model_len: int
    layer_windows: tuple[int | None, ...]
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    has_tied_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def read_model_config(directory: Path, dtype: str = "auto") -> ModelConfig:
    """Read config.json, and generation_config.json where there is one.

    Parameters
    ----------
    directory
        A checkpoint directory.
    dtype
        'float32', 'bfloat16' or 'float16'; 'auto' = what config.json names, float32 where it names none.

    Raises
    ------
    InvalidArgumentError
        A file is missing or broken, a field is missing or out of range, or the model needs something that
        this decoder would not compute exactly. The message names file, field, found and expected.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InvalidArgumentError(
            f"model directory {directory} has no config.json; give a Hugging Face checkpoint directory "
            "(config.json, tokenizer files and *.safetensors)"
        )
    config = ConfigFields(str(path), read_json_object(path))
    architecture, spec = _read_architecture(config)
    _refuse_unsupported(config, spec)
    num_layers = config.positive_int("num_hidden_layers")
    num_heads, num_kv_heads, head_dim = _read_heads(config, spec)
    max_position_embeddings = config.positive_int("max_position_embeddings")
    rope = read_rope_parameters(config, max_position_embeddings)
    has_attention_bias = spec.has_attention_bias_field and config.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.positive_int("vocab_size"),
        hidden_size=config.positive_int("hidden_size"),
        intermediate_size=config.positive_int("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_model_len=_max_model_len(rope, max_position_embeddings),
        layer_windows=_read_layer_windows(config, spec, num_layers),
        has_qkv_bias=spec.always_has_qkv_bias or has_attention_bias,
        has_o_bias=has_attention_bias,
        has_mlp_bias=spec.has_mlp_bias_field and config.flag("mlp_bias", False),
        has_qk_norm=spec.has_qk_norm,
        has_tied_embeddings=config.flag("tie_word_embeddings", False),
        eos_token_ids=_read_eos_token_ids(directory, config, spec),
        dtype=_read_dtype(config, dtype),
    )


def _read_architecture(config: ConfigFields) -> tuple[str, ArchitectureSpec]:
    names: Any = config.content.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        config.refuse("architectures", "a list with the name of one model class")
    spec = get_architecture(names[0], config.subject)
    if config.content.get("model_type", spec.model_type) != spec.model_type:
        config.refuse("model_type", f"{spec.model_type!r}, which belongs to {names[0]}")
    return names[0], spec


def _refuse_unsupported(config: ConfigFields, spec: ArchitectureSpec) -> None:
    if config.content.get("hidden_act", "silu") != "silu":
        config.refuse("hidden_act", "'silu'")
    if config.content.get("quantization_config") is not None:
        raise InvalidArgumentError(
            f"{config.subject}: quantization_config is set, but quantized checkpoints are not supported; "
            "use the float32, bfloat16 or float16 version of the model"
        )
    for field, is_known in (
        ("attention_bias", spec.has_attention_bias_field),
        ("mlp_bias", spec.has_mlp_bias_field),
    ):
        if not is_known and config.flag(field, False):
            config.refuse(field, f"false: models of type {spec.model_type!r} have no such bias")


def _read_heads(config: ConfigFields, spec: ArchitectureSpec) -> tuple[int, int, int]:
    hidden_size, num_heads = config.positive_int("hidden_size"), config.positive_int("num_attention_heads")
    if spec.needs_num_kv_heads and "num_key_value_heads" not in config.content:
        config.refuse(
            "num_key_value_heads", "a whole number of at least 1, or null for a KV head a query head"
        )
    num_kv_heads = config.positive_int("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads, which is {num_heads}")
    head_dim = config.optional_positive_int("head_dim") or spec.default_head_dim
    if head_dim is None:
        if hidden_size % num_heads:
            config.refuse("hidden_size", f"a multiple of num_attention_heads, which is {num_heads}")
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise InvalidArgumentError(
            f"{config.subject}: the head size is {head_dim}, expected an even number (rotary embedding)"
        )
    return num_heads, num_kv_heads, head_dim


def _max_model_len(rope: RopeParameters, max_position_embeddings: int) -> int:
    # Checkpoints with yarn leave max_position_embeddings at the length before the extension, or raise it.
    if rope.rope_type == "yarn":
        return max(max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
    return max_position_embeddings


def _read_layer_windows(
    config: ConfigFields, spec: ArchitectureSpec, num_layers: int
) -> tuple[int | None, ...]:
    if not spec.may_slide:
        return (None,) * num_layers
    window = config.optional_positive_int("sliding_window")
    if "sliding_window" not in config.content:
        window = spec.default_sliding_window
    if spec.slides_on_all_layers:
        return (window,) * num_layers
    if not config.flag("use_sliding_window", False):
        window = None
    types = config.content.get("layer_types")
    if types is None:
        first = config.content.get("max_window_layers", 28)
        if not isinstance(first, int):
            config.refuse("max_window_layers", "a whole number")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    allowed = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != num_layers or not allowed.issuperset(types):
        config.refuse("layer_types", f"a list of {num_layers} entries, each one of {sorted(allowed)}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _read_eos_token_ids(directory: Path, config: ConfigFields, spec: ArchitectureSpec) -> tuple[int, ...]:
    sources = [config]
    path = directory / "generation_config.json"
    if path.is_file():
        sources.insert(0, ConfigFields(str(path), read_json_object(path)))
    for source in sources:
        value = source.content.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in ids):
            source.refuse("eos_token_id", "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))
    if "eos_token_id" in config.content or spec.default_eos_token_id is None:
        return ()
    return (spec.default_eos_token_id,)


def _read_dtype(config: ConfigFields, dtype: str) -> torch.dtype:
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise InvalidArgumentError(f"dtype is {dtype!r}, expected 'auto' or one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    field = "dtype" if config.content.get("dtype") is not None else "torch_dtype"
    name = config.content.get(field)
    if name is None:
        return torch.float32
    if name not in _DTYPES:
        config.refuse(field, f"one of {', '.join(_DTYPES)}; or choose one with --dtype")
    return _DTYPES[name]
