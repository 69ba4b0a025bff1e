"""Reading config.json: what is taken over equals transformers, what cannot be computed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.models import ModelConfig, read_model_config
from lora_serve.models.registry import ARCHITECTURES

SIZES = {
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
REMOVED = object()


def write_config(directory: Path, architecture: str = "LlamaForCausalLM", **fields: Any) -> Path:
    content = {"architectures": [architecture], "model_type": ARCHITECTURES[architecture].model_type, **SIZES}
    content.update(fields)
    content = {name: value for name, value in content.items() if value is not REMOVED}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def read(directory: Path, architecture: str = "LlamaForCausalLM", **fields: Any) -> ModelConfig:
    return read_model_config(write_config(directory, architecture, **fields))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_fields_that_are_left_out_default_as_in_transformers(tmp_path: Path, architecture: str) -> None:
    kv_heads = {"LlamaForCausalLM": {}, "MistralForCausalLM": {"num_key_value_heads": 2}}
    given = kv_heads.get(architecture, {"num_key_value_heads": None})
    config = read(tmp_path, architecture, **given)
    reference = AutoConfig.from_pretrained(tmp_path)

    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == (getattr(reference, "head_dim", None) or 64)
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.rope.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.has_tied_embeddings == reference.tie_word_embeddings
    assert config.eos_token_ids == (() if reference.eos_token_id is None else (reference.eos_token_id,))
    assert (
        config.layer_windows
        == (reference.sliding_window if architecture.startswith("Mistral") else None,) * 3
    )
    assert config.has_qkv_bias == (architecture == "Qwen2ForCausalLM")
    assert config.has_qk_norm == (architecture == "Qwen3ForCausalLM")
    assert not config.has_o_bias
    assert not config.has_mlp_bias


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 8},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
)
def test_sliding_layers_are_those_of_transformers(tmp_path: Path, architecture: str, fields: dict) -> None:
    config = read(tmp_path, architecture, num_key_value_heads=2, **fields)
    reference = AutoConfig.from_pretrained(tmp_path)

    windows = [
        reference.sliding_window if kind == "sliding_attention" else None for kind in reference.layer_types
    ]
    assert config.layer_windows == tuple(windows)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7e4, "factor": 2.0}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 256,
            }
        },
    ],
)
def test_both_rope_layouts_are_read_as_in_transformers(tmp_path: Path, fields: dict) -> None:
    rope = read(tmp_path, **fields).rope
    reference_config = AutoConfig.from_pretrained(tmp_path)
    # transformers calls this again before it computes frequencies; only then outer fields have arrived.
    reference_config.standardize_rope_params()
    reference = reference_config.rope_parameters

    assert rope.rope_type == reference["rope_type"]
    assert rope.rope_theta == reference["rope_theta"]
    assert rope.factor == reference.get("factor", 1.0)
    assert rope.original_max_position_embeddings == reference.get("original_max_position_embeddings", 0)


def test_yarn_extends_the_longest_sequence_and_other_types_do_not(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert read(tmp_path, rope_scaling=yarn).max_model_len == 2048
    assert read(tmp_path, rope_scaling=yarn, max_position_embeddings=4096).max_model_len == 4096
    assert read(tmp_path, rope_scaling={"type": "dynamic", "factor": 4.0}).max_model_len == 512


@pytest.mark.parametrize(
    ("generation", "fields", "expected"),
    [
        (None, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": [7, 8, 7]}, (7, 8)),
        (None, {"eos_token_id": None}, ()),
        (None, {}, (2,)),
        ({"eos_token_id": [9, 7]}, {"eos_token_id": 7}, (9, 7)),
        ({"eos_token_id": 0}, {"eos_token_id": 7}, (0,)),
        ({"temperature": 0.6}, {"eos_token_id": 7}, (7,)),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path: Path, generation: dict | None, fields: dict, expected: tuple[int, ...]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read(tmp_path, **fields).eos_token_ids == expected


def test_the_dtype_is_the_checkpoints_unless_one_is_chosen(tmp_path: Path) -> None:
    assert read(tmp_path).dtype == torch.float32
    assert read(tmp_path, torch_dtype="bfloat16").dtype == torch.bfloat16
    assert read(tmp_path, dtype="float16", torch_dtype="bfloat16").dtype == torch.float16
    assert read_model_config(tmp_path, "float32").dtype == torch.float32


def test_kv_bytes_count_keys_and_values_of_all_layers(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=2, dtype="bfloat16")
    assert config.kv_bytes_per_token == 2 * 3 * 2 * 64 * 2


YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = {
    "no_architectures": ({"architectures": REMOVED}, "architectures is missing, expected a list"),
    "two_architectures": (
        {"architectures": ["LlamaForCausalLM"] * 2},
        "expected a list with the name of one",
    ),
    "unknown_architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        "'GPT2LMHeadModel' is not supported, expected one of LlamaForCausalLM, Mistral",
    ),
    "other_model_type": ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
    "no_size": ({"hidden_size": REMOVED}, "hidden_size is missing, expected a whole number"),
    "size_zero": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number of at least 1"),
    "size_float": ({"vocab_size": 100.5}, "vocab_size is 100.5"),
    "size_bool": ({"vocab_size": True}, "vocab_size is True"),
    "kv_heads": ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of"),
    "hidden_not_divisible": ({"hidden_size": 250}, "hidden_size is 250, expected a multiple of"),
    "odd_head": ({"head_dim": 33}, "head size is 33, expected an even number"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    "eos": ({"eos_token_id": "2"}, "eos_token_id is '2', expected a token id"),
    "eos_negative": ({"eos_token_id": [3, -1]}, r"eos_token_id is \[3, -1\]"),
    "dtype": ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn', expected one of float32"),
    "rope_type": ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling: rope_type is 'longrope'"),
    "rope_old_type": ({"rope_scaling": {"type": "mrope"}}, "rope_scaling: type is 'mrope', expected one of"),
    "rope_two_types": (
        {"rope_scaling": {"type": "yarn", "rope_type": "linear"}},
        "expected the same as rope_type",
    ),
    "rope_list": ({"rope_scaling": [2.0]}, "rope_scaling is .* expected null or an object"),
    "rope_no_factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
    "rope_factor": ({"rope_parameters": {**YARN, "factor": 0.5}}, "rope_parameters: factor is 0.5"),
    "rope_field": (
        {"rope_scaling": {**YARN, "mrope_section": [1]}},
        "mrope_section is .* expected only fields",
    ),
    "rope_other_types_field": (
        {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}},
        "beta_fast",
    ),
    "rope_by_layer": ({"rope_parameters": {"full_attention": YARN}}, "full_attention"),
    "rope_betas": ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast is 1"),
    "rope_llama3": ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "more than low_freq_factor"),
    "rope_theta": ({"rope_theta": -1}, "rope_theta is -1"),
    "partial_rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_model_that_would_not_be_computed_exactly_is_refused(
    tmp_path: Path, fields: dict, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        read(tmp_path, **fields)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("MistralForCausalLM", {"num_key_value_heads": REMOVED}, "num_key_value_heads is missing"),
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias is True, expected false"),
        ("Qwen3ForCausalLM", {"mlp_bias": True}, "mlp_bias is True, expected false"),
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window is 0"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types .* a list of 3 entries"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 3}, r"one of \['full_attention'\]"),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"] * 2},
            "layer_types",
        ),
    ],
)
def test_fields_that_an_architecture_does_not_have_are_refused(
    tmp_path: Path, architecture: str, fields: dict, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read(tmp_path, architecture, **{"num_key_value_heads": 2, **fields})


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[1]", "holds a JSON list, expected an object"), ("\udcff", "not valid JSON")],
)
def test_a_broken_config_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        read_model_config(tmp_path)
    assert str(path) in str(caught.value)


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1.5}')
    with pytest.raises(InvalidArgumentError, match=r"generation_config.json: eos_token_id is 1.5"):
        read(tmp_path)


def test_an_unknown_dtype_argument_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="dtype is 'int8', expected 'auto' or one of float32"):
        read_model_config(write_config(tmp_path), "int8")
