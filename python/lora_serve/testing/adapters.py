"""PEFT adapters made on the spot, without peft: good ones with random weights, and broken ones.

The good ones change a model's outputs visibly, at any rank and scaling, so that a missing or wrong adapter
shows. The broken ones are for tests of what a load refuses; :data:`BAD_ADAPTERS` lists them by name with the
words that the message must have.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
_OUTSIDE_LAYERS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
_KEY_FORMATS = {
    "peft": "base_model.model.{module}.{half}",
    "named": "base_model.model.{module}.{half}",
    "bare_decoder": "base_model.model.{bare_module}.{half}",
    "no_prefix": "{module}.{half}",
    "language_model": "base_model.model.language_model.{module}.{half}",
    "model_language_model": "base_model.model.model.language_model.{bare_module}.{half}",
}


@dataclass(frozen=True)
class RandomAdapterOptions:
    """What a random adapter looks like.

    Parameters
    ----------
    rank
        PEFT's ``r``, the rank of every module that ``rank_pattern`` does not name.
    target_modules
        Last components of the module paths that get a module; beside :data:`ALL_PROJECTIONS` also
        ``qkv_proj`` and ``gate_up_proj`` (trained as one), ``embed_tokens`` and ``lm_head``.
    alpha
        ``lora_alpha``; twice the rank where None.
    use_rslora
        True: scaling is alpha over the square root of the rank.
    rank_pattern, alpha_pattern
        Overrides by regular expression, as PEFT matches them.
    layers
        Decoder layers that get modules; all where None.
    seed
        Of the weights.
    scale
        Size of the change: an entry of ``scaling * B A`` has about ``scale / sqrt(H)`` as standard deviation.
    dtype
        Of the tensors in the file.
    key_style
        ``"peft"`` (as ``save_pretrained`` writes), ``"named"`` (``lora_A.default.weight``, a raw state dict),
        ``"bare_decoder"`` (trained without the language-model head: no ``model.`` before ``layers``),
        ``"no_prefix"`` (no ``base_model.model.``), or ``"language_model"`` and ``"model_language_model"``
        (trained as a part of a multimodal model).
    """

    rank: int = 8
    target_modules: Sequence[str] = ALL_PROJECTIONS
    alpha: float | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    seed: int = 0
    scale: float = 0.5
    dtype: torch.dtype = torch.float32
    key_style: str = "peft"


def make_random_adapter(
    path: str | Path, model_dir_or_config: str | Path | Mapping[str, Any], **options: Any
) -> Path:
    """Write a PEFT directory with random weights for a model.

    Parameters
    ----------
    path
        The directory to write; created if need be, its two files are replaced.
    model_dir_or_config
        The model's Hugging Face directory, or the content of its ``config.json``.
    **options
        Fields of :class:`RandomAdapterOptions`.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    TypeError
        An option that :class:`RandomAdapterOptions` does not have.
    ValueError
        An unknown projection, layer or key style.
    """
    chosen = RandomAdapterOptions(**options)
    config = _model_config(model_dir_or_config)
    generator = torch.Generator().manual_seed(chosen.seed)
    tensors: dict[str, Tensor] = {}
    for module, in_features, out_features in _modules(config, chosen):
        is_embedding = module.endswith("embed_tokens")
        lora_rank, scaling = _rank_and_scaling(module, chosen)
        size_a = 1 / math.sqrt(in_features)
        size_b = chosen.scale / (abs(scaling) * math.sqrt(lora_rank)) if scaling else chosen.scale
        halves = {
            "A": torch.randn(lora_rank, in_features, generator=generator) * size_a,
            "B": torch.randn(out_features, lora_rank, generator=generator) * size_b,
        }
        for half, tensor in halves.items():
            key = _key(module, half, chosen.key_style, is_embedding=is_embedding)
            tensors[key] = tensor.to(chosen.dtype).contiguous()
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_adapter_tensors(directory, tensors)
    write_adapter_config(directory, _peft_config(chosen))
    return directory


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """The content of an adapter's ``adapter_config.json``."""
    config: dict[str, Any] = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def write_adapter_config(path: str | Path, config: Mapping[str, Any]) -> None:
    """Replace an adapter's ``adapter_config.json``."""
    text = json.dumps(config, indent=2)
    (Path(path) / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def read_adapter_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter's ``adapter_model.safetensors``."""
    tensors: dict[str, Tensor] = safetensors.torch.load(
        (Path(path) / "adapter_model.safetensors").read_bytes()
    )
    return tensors


def write_adapter_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace an adapter's ``adapter_model.safetensors``."""
    content = safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
    (Path(path) / "adapter_model.safetensors").write_bytes(content)


def _model_config(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    config: dict[str, Any] = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    return config


def _modules(config: Mapping[str, Any], options: RandomAdapterOptions) -> Iterator[tuple[str, int, int]]:
    """Yield module path in the causal language model, input width and output width."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    num_heads, num_layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    head_dim = int(config.get("head_dim") or hidden // num_heads)
    kv_width = int(config.get("num_key_value_heads") or num_heads) * head_dim
    widths = {
        "q_proj": (hidden, num_heads * head_dim),
        "k_proj": (hidden, kv_width),
        "v_proj": (hidden, kv_width),
        "o_proj": (num_heads * head_dim, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
        "qkv_proj": (hidden, num_heads * head_dim + 2 * kv_width),
        "gate_up_proj": (hidden, 2 * inner),
    }
    outside = {"embed_tokens": ("vocab_size", "hidden_size"), "lm_head": ("hidden_size", "vocab_size")}
    inside = [name for name in options.target_modules if name not in outside]
    layers = range(num_layers) if options.layers is None else options.layers
    if not set(layers) <= set(range(num_layers)) or not set(inside) <= set(widths):
        raise ValueError(
            f"the adapter has layers {list(layers)} and target_modules {list(options.target_modules)}, "
            f"expected layers below {num_layers} and modules of {[*widths, *outside]}"
        )
    for layer in layers:
        for name in inside:
            block = "self_attn" if name in _ATTENTION else "mlp"
            yield f"model.layers.{layer}.{block}.{name}", *widths[name]
    for name, (size_in, size_out) in outside.items():
        if name in options.target_modules:
            yield _OUTSIDE_LAYERS[name], int(config[size_in]), int(config[size_out])


def _rank_and_scaling(module: str, options: RandomAdapterOptions) -> tuple[int, float]:
    # Patterns mean the paths of the model that the adapter was trained on.
    trained = _key_parts(module, options.key_style).format(half="").removeprefix("base_model.model.")[:-1]
    alpha = 2.0 * options.rank if options.alpha is None else options.alpha
    lora_rank = _override(options.rank_pattern, trained, options.rank)
    alpha = _override(options.alpha_pattern, trained, alpha)
    return int(lora_rank), alpha / (math.sqrt(lora_rank) if options.use_rslora else lora_rank)


def _override(pattern: Mapping[str, float], module: str, default: float) -> float:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _key(module: str, half: str, key_style: str, *, is_embedding: bool) -> str:
    name = ".default" if key_style == "named" else ""
    spelled = f"lora_embedding_{half}{name}" if is_embedding else f"lora_{half}{name}.weight"
    return _key_parts(module, key_style).format(half=spelled)


def _key_parts(module: str, key_style: str) -> str:
    """The key of a module's tensor with ``{half}`` in the place of its last part."""
    if key_style not in _KEY_FORMATS:
        raise ValueError(f"key_style is {key_style!r}, expected one of {list(_KEY_FORMATS)}")
    bare_module = module.removeprefix("model.")
    return _KEY_FORMATS[key_style].format(module=module, bare_module=bare_module, half="{half}")


def _peft_config(options: RandomAdapterOptions) -> dict[str, Any]:
    return {
        "alpha_pattern": dict(options.alpha_pattern),
        "base_model_name_or_path": "random",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None if options.layers is None else list(options.layers),
        "lora_alpha": 2 * options.rank if options.alpha is None else options.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": options.rank,
        "rank_pattern": dict(options.rank_pattern),
        "target_modules": list(options.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": options.use_rslora,
    }
