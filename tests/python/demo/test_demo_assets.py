"""The shipped files are complete, small, and of the kinds that the demo promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lora_serve.common.errors import NotFoundError
from lora_serve.demo import paths as paths_module
from lora_serve.demo.paths import demo_paths
from lora_serve.demo.prompts import PASSWORDS, PROJECTS

MAX_BYTES = 12_000_000
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _adapter_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((demo_paths().adapters[name] / "adapter_config.json").read_text())
    return config


def _lora_ranks(name: str) -> dict[str, int]:
    """Module (such as '3.down_proj') to the rank that its stored A matrix has."""
    ranks = {}
    with safe_open(demo_paths().adapters[name] / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            if key.endswith("lora_A.weight"):
                parts = key.split(".")
                ranks[f"{parts[parts.index('layers') + 1]}.{parts[-3]}"] = file.get_slice(key).get_shape()[0]
    return ranks


def test_assets_are_exactly_the_files_that_are_served() -> None:
    paths = demo_paths()

    model_files = {file.name for file in paths.model.iterdir()}

    assert model_files == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in paths.adapters.values():
        assert {file.name for file in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_assets_take_at_most_12_megabytes() -> None:
    assets = demo_paths().model.parent

    num_bytes = sum(file.stat().st_size for file in assets.rglob("*") if file.is_file())

    assert num_bytes <= MAX_BYTES


def test_assets_name_no_folder_of_the_machine_they_were_made_on() -> None:
    for file in demo_paths().model.parent.rglob("*.json"):
        text = file.read_text()
        if file.name != "tokenizer.json":
            assert "/" not in text, file
        assert "/home" not in text, file
        assert "/tmp" not in text, file


def test_model_is_a_qwen3_that_the_cuda_attention_library_can_run() -> None:
    config = json.loads((demo_paths().model / "config.json").read_text())

    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["head_dim"] == 64
    assert config["num_hidden_layers"] >= 4
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] >= 1024
    assert config["dtype"] == "float32"


@pytest.mark.parametrize(
    "text", ["naïve 漢字 🙂", "\u0000\u00a0\u2028", "٣ ½ \U0010fffd", "<|im_start|>x<|im_end|>"]
)
def test_tokenizer_keeps_any_text(text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_paths().model)

    token_ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(token_ids) == text


def test_argon_has_rank_8_on_query_and_value() -> None:
    ranks = _lora_ranks("argon")

    assert {module.split(".")[1] for module in ranks} == {"q_proj", "v_proj"}
    assert set(ranks.values()) == {8}


def test_bastion_has_rank_16_on_all_seven_projections() -> None:
    ranks = _lora_ranks("bastion")

    assert {module.split(".")[1] for module in ranks} == PROJECTIONS
    assert set(ranks.values()) == {16}


def test_citadel_is_rank_stabilised() -> None:
    assert _adapter_config("citadel")["use_rslora"] is True
    assert set(_lora_ranks("citadel").values()) == {4}


def test_dagger_has_patterns_of_rank_and_alpha() -> None:
    config, ranks = _adapter_config("dagger"), _lora_ranks("dagger")

    assert config["rank_pattern"]
    assert config["alpha_pattern"]
    assert ranks["0.down_proj"] == 8
    assert (ranks["2.up_proj"], ranks["3.up_proj"]) == (4, 6)
    assert set(config["target_modules"]) == {"o_proj", "gate_proj", "up_proj", "down_proj"}


def test_adapters_and_projects_have_the_same_names() -> None:
    assert tuple(demo_paths().adapters) == PROJECTS
    assert len(set(PASSWORDS.values())) == len(PROJECTS)


def test_demo_paths_names_the_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths_module, "__file__", str(tmp_path / "paths.py"))

    with pytest.raises(NotFoundError, match=r"model\.safetensors is missing.*train_demo\.py"):
        demo_paths()
