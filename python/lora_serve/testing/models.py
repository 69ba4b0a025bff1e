"""Small random checkpoints of every supported architecture, for tests and benchmarks.

Weights are scaled so that greedy tokens are well determined and depend on the whole context: logits have a
standard deviation of about 3, attention prefers some tokens clearly, and each layer adds as much to the
residual stream as the embedding does. With the usual small initialisation a model repeats its last token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_serve.models.config import ModelConfig, read_model_config
from lora_serve.models.decoder import DecoderModel
from lora_serve.models.registry import get_architecture

_LOGITS_STD = 3.0


@dataclass(frozen=True, kw_only=True)
class RandomModelOptions:
    """Sizes and features of a random checkpoint.

    Parameters
    ----------
    seed
        At least 0; the same options and seed give the same files.
    num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size
        Sizes.
    tie_word_embeddings
        Logits are computed with the embedding matrix.
    rope_theta
        Base of the rotary frequencies.
    rope_parameters
        Written as transformers 5 does.
    rope_scaling
        Written as transformers 4 did; not together with ``rope_parameters``.
    max_position_embeddings
        Context in tokens.
    sliding_window
        In tokens; None = none. Qwen: on the layers from ``max_window_layers`` on.
    max_window_layers
        See ``sliding_window``.
    eos_token_id
        Written to both configuration files; None = the model never ends a text.
    num_shards
        Number of safetensors files; above 1 with an index.
    dtype
        'float32', 'bfloat16' or 'float16'.
    extra_config
        Fields to put into config.json as they are, such as ``{"attention_bias": True}``.
    """

    seed: int = 0
    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 128
    vocab_size: int = 256
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    max_window_layers: int = 0
    eos_token_id: int | list[int] | None = None
    num_shards: int = 1
    dtype: str = "float32"
    extra_config: dict[str, Any] = field(default_factory=dict)


def make_random_model(path: str | Path, architecture: str, **options: Any) -> ModelConfig:
    """Write a checkpoint directory: config.json, generation_config.json, safetensors. No tokenizer.

    Parameters
    ----------
    path
        Directory; created where it does not exist.
    architecture
        Such as 'Qwen3ForCausalLM'.
    **options
        Fields of :class:`RandomModelOptions`.

    Returns
    -------
    ModelConfig
        What the written files describe.

    Raises
    ------
    InvalidArgumentError
        The architecture is not supported or the options do not make a valid model.
    TypeError
        An option is unknown.
    """
    chosen = RandomModelOptions(**options)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", _config_content(architecture, chosen))
    generation = {"eos_token_id": chosen.eos_token_id} if chosen.eos_token_id is not None else {}
    _write_json(directory / "generation_config.json", generation)
    config = read_model_config(directory)
    tensors = _random_tensors(config, chosen.seed)
    _write_shards(directory, tensors, chosen.num_shards)
    return config


def _config_content(architecture: str, options: RandomModelOptions) -> dict[str, Any]:
    spec = get_architecture(architecture, "make_random_model")
    content: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": spec.model_type,
        "dtype": options.dtype,
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads,
        "num_key_value_heads": options.num_kv_heads,
        "head_dim": options.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": options.max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": options.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": options.eos_token_id,
        "pad_token_id": None,
    }
    if options.rope_parameters is not None:
        content["rope_parameters"] = {"rope_theta": options.rope_theta, **options.rope_parameters}
    else:
        content.update(rope_theta=options.rope_theta, rope_scaling=options.rope_scaling)
    if spec.may_slide:
        content["sliding_window"] = options.sliding_window
        if not spec.slides_on_all_layers:
            content["use_sliding_window"] = options.sliding_window is not None
            content["max_window_layers"] = options.max_window_layers
    return {**content, **options.extra_config}


def _random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    # The decoder itself says which tensors there are and of which shapes.
    shapes = DecoderModel(config, device=torch.device("meta")).checkpoint_tensors()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, parameter in shapes.items():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1.0 + 0.2 * noise
        elif name.endswith(".bias"):
            values = 0.3 * noise
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            values = noise * (_LOGITS_STD * config.hidden_size**-0.5)
        elif name.endswith(("q_proj.weight", "k_proj.weight")) and not config.has_qk_norm:
            values = noise * (1.5 * config.hidden_size**-0.5)
        else:
            values = noise * parameter.shape[1] ** -0.5
        tensors[name] = values.to(config.dtype).contiguous()
    return tensors


def _write_shards(directory: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    metadata = {"format": "pt"}
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        chosen = names[shard::num_shards]
        save_file({name: tensors[name] for name in chosen}, directory / file_name, metadata=metadata)
        weight_map.update(dict.fromkeys(chosen, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
