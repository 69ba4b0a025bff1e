"""Ways to break a good adapter directory, each with the words that its refusal must contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_serve.testing.adapters import (
    read_adapter_config,
    read_adapter_tensors,
    write_adapter_config,
    write_adapter_tensors,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class BadAdapter:
    """One way to break an adapter.

    Parameters
    ----------
    corrupt
        Changes the files of a good adapter directory in place.
    message_has
        Texts that the message of the refusal contains, each of them.
    """

    corrupt: Callable[[Path], None]
    message_has: tuple[str, ...]


def corrupt_config(path: Path, **changes: Any) -> None:
    """Set fields of ``adapter_config.json``; a value of ``...`` removes the field."""
    config = {**read_adapter_config(path), **changes}
    write_adapter_config(path, {key: value for key, value in config.items() if value is not ...})


def corrupt_truncate(path: Path) -> None:
    """Cut the second half of the weights file off, as a broken copy does."""
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def corrupt_truncate_header(path: Path) -> None:
    """Leave only the first 20 bytes of the weights file."""
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:20])


def corrupt_garbage(path: Path) -> None:
    """Replace the weights file by bytes that are no safetensors file."""
    (path / WEIGHTS).write_bytes(b"\x00\xff" * 500)


def corrupt_missing_weights(path: Path) -> None:
    """Delete the weights file."""
    (path / WEIGHTS).unlink()


def corrupt_missing_config(path: Path) -> None:
    """Delete the configuration."""
    (path / CONFIG).unlink()


def corrupt_pickled(path: Path) -> None:
    """Leave a pickled checkpoint in the place of the weights file."""
    (path / WEIGHTS).rename(path / "adapter_model.bin")


def corrupt_broken_json(path: Path) -> None:
    """Cut the configuration in half."""
    text = (path / CONFIG).read_text(encoding="utf-8")
    (path / CONFIG).write_text(text[: len(text) // 2], encoding="utf-8")


def corrupt_config_list(path: Path) -> None:
    """Replace the configuration by a JSON list."""
    (path / CONFIG).write_text("[1, 2]", encoding="utf-8")


def corrupt_wrong_shape(path: Path) -> None:
    """Give the first A one input feature too few."""
    tensors = read_adapter_tensors(path)
    key = _first_key(path, "A")
    tensors[key] = tensors[key][:, :-1].contiguous()
    write_adapter_tensors(path, tensors)


def corrupt_wrong_rank(path: Path) -> None:
    """Say another rank in the configuration than the tensors have."""
    corrupt_config(path, r=int(read_adapter_config(path)["r"]) + 1)


def corrupt_rank_too_high(path: Path, rank: int = 4096) -> None:
    """Raise the rank of the configuration and of every tensor."""
    tensors = {}
    for key, tensor in read_adapter_tensors(path).items():
        shape = (rank, tensor.shape[1]) if ".lora_A" in key else (tensor.shape[0], rank)
        tensors[key] = torch.full(shape, 0.01, dtype=tensor.dtype)
    write_adapter_tensors(path, tensors)
    corrupt_config(path, r=rank, lora_alpha=rank, rank_pattern={})


def corrupt_nan(path: Path) -> None:
    """Put a NaN into the last B."""
    _set_one_value(path, float("nan"))


def corrupt_inf(path: Path) -> None:
    """Put an infinity into the last B."""
    _set_one_value(path, float("inf"))


def corrupt_missing_lora_b(path: Path) -> None:
    """Remove the B of the last module."""
    tensors = read_adapter_tensors(path)
    del tensors[max(key for key in tensors if ".lora_B." in key)]
    write_adapter_tensors(path, tensors)


def corrupt_unknown_module(path: Path) -> None:
    """Rename the modules of the first pair to a projection that no model has."""
    tensors = read_adapter_tensors(path)
    for half in "AB":
        key = _first_key(path, half)
        tensors[key.replace("_proj.", "_gadget.")] = tensors.pop(key)
    write_adapter_tensors(path, tensors)


def corrupt_zero_matched(path: Path) -> None:
    """Rename every key as if the adapter were another architecture's."""
    tensors = {
        key.replace("model.layers.", "transformer.h."): tensor
        for key, tensor in read_adapter_tensors(path).items()
    }
    write_adapter_tensors(path, tensors)


def corrupt_layer_outside(path: Path) -> None:
    """Add a pair for layer 999."""
    tensors = read_adapter_tensors(path)
    for half in "AB":
        key = _first_key(path, half)
        prefix, rest = key.split(".layers.")
        tensors[f"{prefix}.layers.999.{rest.split('.', 1)[1]}"] = tensors[key].clone()
    write_adapter_tensors(path, tensors)


def corrupt_extra_tensor(path: Path, key: str) -> None:
    """Add a tensor under a key that is no half of a LoRA pair."""
    write_adapter_tensors(path, {**read_adapter_tensors(path), key: torch.ones(4)})


def corrupt_no_tensors(path: Path) -> None:
    """Write a weights file without any tensor."""
    write_adapter_tensors(path, {})


def corrupt_integer_weights(path: Path) -> None:
    """Store the first A as int8."""
    tensors = read_adapter_tensors(path)
    key = _first_key(path, "A")
    tensors[key] = torch.ones_like(tensors[key], dtype=torch.int8)
    write_adapter_tensors(path, tensors)


def _first_key(path: Path, half: str) -> str:
    return min(key for key in read_adapter_tensors(path) if f".lora_{half}." in key)


def _set_one_value(path: Path, value: float) -> None:
    tensors = read_adapter_tensors(path)
    key = max(key for key in tensors if ".lora_B." in key)
    tensors[key][-1, -1] = value
    write_adapter_tensors(path, tensors)


def _with_config(message_has: tuple[str, ...], **changes: Any) -> BadAdapter:
    return BadAdapter(lambda path: corrupt_config(path, **changes), (CONFIG, *message_has))


def _with_tensor(key: str, *message_has: str) -> BadAdapter:
    return BadAdapter(lambda path: corrupt_extra_tensor(path, key), (WEIGHTS, key, *message_has))


_MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
_UNKNOWN_INIT = "an initialisation of A and B only"

BAD_ADAPTERS: dict[str, BadAdapter] = {
    "truncated": BadAdapter(corrupt_truncate, (WEIGHTS, "truncated", "again")),
    "truncated_header": BadAdapter(corrupt_truncate_header, (WEIGHTS, "truncated", "20 bytes")),
    "garbage": BadAdapter(corrupt_garbage, (WEIGHTS, "no safetensors header")),
    "missing_weights": BadAdapter(corrupt_missing_weights, (WEIGHTS, "has no", "save_pretrained")),
    "missing_config": BadAdapter(corrupt_missing_config, (CONFIG, "has no", "save_pretrained")),
    "pickled": BadAdapter(corrupt_pickled, ("adapter_model.bin", WEIGHTS, "safe_serialization=True")),
    "broken_json": BadAdapter(corrupt_broken_json, (CONFIG, "not valid JSON")),
    "wrong_shape": BadAdapter(corrupt_wrong_shape, (WEIGHTS, "lora_A", "has shape", "expected [")),
    "wrong_rank": BadAdapter(corrupt_wrong_rank, (WEIGHTS, "has shape", f"by {CONFIG}")),
    "rank_too_high": BadAdapter(
        corrupt_rank_too_high, ("has lora_rank 4096 but max_lora_rank is", "start with --max-lora-rank 4096")
    ),
    "nan": BadAdapter(corrupt_nan, (WEIGHTS, "lora_B", "NaN")),
    "inf": BadAdapter(corrupt_inf, (WEIGHTS, "lora_B", "Inf")),
    "missing_lora_b": BadAdapter(corrupt_missing_lora_b, (WEIGHTS, "lora_A", "has no lora_B beside it")),
    "unknown_module": BadAdapter(corrupt_unknown_module, (WEIGHTS, "_gadget", "q_proj")),
    "zero_matched": BadAdapter(corrupt_zero_matched, (WEIGHTS, "none of its", "another model")),
    "no_tensors": BadAdapter(corrupt_no_tensors, (WEIGHTS, "none of its 0 keys")),
    "layer_outside": BadAdapter(corrupt_layer_outside, (WEIGHTS, "layer 999", "layers 0 to")),
    "integer_weights": BadAdapter(corrupt_integer_weights, (WEIGHTS, "dtype I8", "F32, F16, BF16")),
    "dora_tensor": _with_tensor(f"{_MODULE}.lora_magnitude_vector", "DoRA"),
    "lora_bias_tensor": _with_tensor(f"{_MODULE}.lora_B.bias", "bias"),
    "saved_module_tensor": _with_tensor("base_model.model.lm_head.modules_to_save.weight", "fully trained"),
    "embedding_lora_tensor": _with_tensor(
        "base_model.model.model.embed_tokens.lora_embedding_A", "embedding"
    ),
    "added_tokens_tensor": _with_tensor("base_model.model.model.embed_tokens.weight", "tokens were added"),
    "lm_head_lora_tensor": _with_tensor("base_model.model.lm_head.lora_A.weight", "lm_head"),
    "unknown_tensor": _with_tensor("base_model.model.model.layers.0.gate", "unknown key"),
    "not_an_object": BadAdapter(corrupt_config_list, (CONFIG, "expected a JSON object")),
    "other_peft_type": _with_config(("peft_type", '"IA3"', "'LORA'"), peft_type="IA3"),
    "dora": _with_config(("use_dora is true", "expected false", "DoRA"), use_dora=True),
    "modules_to_save": _with_config(('modules_to_save is ["lm_head"]',), modules_to_save=["lm_head"]),
    "bias": _with_config(('bias is "all"',), bias="all"),
    "lora_bias": _with_config(("lora_bias is true",), lora_bias=True),
    "fan_in_fan_out": _with_config(("fan_in_fan_out is true",), fan_in_fan_out=True),
    "layer_replication": _with_config(("layer_replication",), layer_replication=[[0, 2], [1, 3]]),
    "target_parameters": _with_config(("target_parameters",), target_parameters=["mlp.experts.gate_up_proj"]),
    "trainable_token_indices": _with_config(("trainable_token_indices",), trainable_token_indices=[1]),
    "megatron": _with_config(("megatron_config",), megatron_config={"a": 1}),
    "alora": _with_config(("alora_invocation_tokens", "aLoRA"), alora_invocation_tokens=[]),
    "qalora": _with_config(("use_qalora",), use_qalora=True),
    "bdlora": _with_config(("use_bdlora",), use_bdlora={}),
    "arrow": _with_config(("arrow_config",), arrow_config={"top_k": 3}),
    "kasa": _with_config(("kasa_config",), kasa_config={"beta": 1e-4}),
    "monteclora": _with_config(("monteclora_config",), monteclora_config={"num_samples": 8}),
    "velora": _with_config(("velora_config",), velora_config={"num_groups": 64}),
    "pissa": _with_config(
        ('init_lora_weights is "pissa"', _UNKNOWN_INIT, "path_initial_model_for_weight_conversion"),
        init_lora_weights="pissa",
    ),
    "pissa_niter": _with_config(("base weights",), init_lora_weights="pissa_niter_16"),
    "olora": _with_config(("base weights",), init_lora_weights="olora"),
    "corda": _with_config(("base weights",), init_lora_weights="corda"),
    "loftq": _with_config(("base weights",), init_lora_weights="loftq"),
    "lora_ga": _with_config(("base weights",), init_lora_weights="lora_ga"),
    "unknown_init": _with_config(("unknown initialisation", _UNKNOWN_INIT), init_lora_weights="magic"),
    "unknown_option": _with_config(("use_magic is true", "unknown option"), use_magic=True),
    "rank_zero": _with_config(("r is 0", "from 1"), r=0),
    "rank_missing": _with_config(("r is null",), r=...),
    "rank_not_whole": _with_config(("r is 8.5",), r=8.5),
    "alpha_missing": _with_config(("lora_alpha is null",), lora_alpha=...),
    "alpha_nan": _with_config(("lora_alpha is NaN",), lora_alpha=float("nan")),
    "alpha_text": _with_config(('lora_alpha is "16"',), lora_alpha="16"),
    "alpha_huge": _with_config(("lora_alpha is 1000",), lora_alpha=10**400),
    "rslora_text": _with_config(('use_rslora is "no"',), use_rslora="no"),
    "rank_pattern_zero": _with_config(("rank_pattern 'q_proj'", "value is 0"), rank_pattern={"q_proj": 0}),
    "rank_pattern_list": _with_config(("rank_pattern", "an object"), rank_pattern=["q_proj"]),
    "alpha_pattern_text": _with_config(("alpha_pattern 'q_proj'",), alpha_pattern={"q_proj": "4"}),
    "bad_regex": _with_config(("not a valid regular expression",), rank_pattern={"q_proj)": 4}),
    "hostile_regex": _with_config(("too long to match",), rank_pattern={"(a|a)*b": 4}),
    "not_targeted": _with_config(
        ("does not name it",), target_modules=["no_such_proj"], exclude_modules=None
    ),
    "excluded": _with_config(("exclude_modules", "names it"), exclude_modules=["q_proj"]),
    "layer_not_transformed": _with_config(("layers_to_transform",), layers_to_transform=[999]),
}
"""By name: a way to break a good adapter (one with q_proj in layer 0), and what its refusal says."""
