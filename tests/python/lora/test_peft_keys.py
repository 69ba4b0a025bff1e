from __future__ import annotations

import re

import pytest
import torch

from lora.adapter_setup import make_targets
from lora.peft_setup import FUSED, check, make_full_adapter, make_full_targets, read_modules
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.lora.peft_adapter import check_peft_adapter
from lora_serve.lora.peft_keys import PeftKeyParser, PeftTensorKey
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.testing.adapters import ALL_PROJECTIONS, read_adapter_tensors, write_adapter_tensors
from lora_serve.testing.bad_adapters import corrupt_config

PARSER = PeftKeyParser(make_full_targets(), FUSED)
Q_PROJ = "model.layers.0.self_attn.q_proj"
KEY_STYLES = ["peft", "named", "bare_decoder", "no_prefix", "language_model", "model_language_model"]


@pytest.mark.parametrize(
    ("key", "trained", "module", "half", "is_embedding"),
    [
        (f"base_model.model.{Q_PROJ}.lora_A.weight", Q_PROJ, Q_PROJ, "A", False),
        (f"base_model.model.{Q_PROJ}.lora_B.default.weight", Q_PROJ, Q_PROJ, "B", False),
        (f"{Q_PROJ}.lora_B.weight", Q_PROJ, Q_PROJ, "B", False),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", Q_PROJ[6:], Q_PROJ, "A", False),
        ("layers.0.self_attn.q_proj.lora_A.weight", Q_PROJ[6:], Q_PROJ, "A", False),
        (
            f"base_model.model.language_model.{Q_PROJ}.lora_A.weight",
            f"language_model.{Q_PROJ}",
            Q_PROJ,
            "A",
            False,
        ),
        (
            "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.language_model.layers.0.self_attn.q_proj",
            Q_PROJ,
            "A",
            False,
        ),
        (
            "base_model.model.model.layers.3.self_attn.qkv_proj.lora_A.weight",
            "model.layers.3.self_attn.qkv_proj",
            "model.layers.3.self_attn.qkv_proj",
            "A",
            False,
        ),
        ("base_model.model.lm_head.lora_B.weight", "lm_head", "lm_head", "B", False),
        ("language_model.lm_head.lora_B.weight", "language_model.lm_head", "lm_head", "B", False),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "model.embed_tokens",
            "model.embed_tokens",
            "A",
            True,
        ),
        ("embed_tokens.lora_embedding_B.default", "embed_tokens", "model.embed_tokens", "B", True),
        (
            "base_model.model.model.language_model.embed_tokens.lora_embedding_B",
            "model.language_model.embed_tokens",
            "model.embed_tokens",
            "B",
            True,
        ),
    ],
)
def test_key_is_understood(key, trained, module, half, is_embedding):
    assert PARSER.parse(key) == PeftTensorKey(trained, module, half, is_embedding)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "layer 9.*layers 0 to 3"),
        (
            "base_model.model.model.layers.0.mlp.experts.lora_A.weight",
            "does not have; expected one of down_proj",
        ),
        (
            "base_model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight",
            "module 'vision_tower.layers",
        ),
        ("base_model.model.score.lora_A.weight", "module 'score'"),
        (f"base_model.model.{Q_PROJ}.lora_C.weight", "unknown key"),
        (f"base_model.model.{Q_PROJ}.lora_A.a.b.weight", "unknown key"),
        (f"base_model.model.{Q_PROJ}.lora_A.weight.x", "unknown key"),
        (f"base_model.model.{Q_PROJ}.lora_magnitude_vector.weight", "DoRA"),
        (f"base_model.model.{Q_PROJ}.lora_B.bias", "trained bias"),
        ("lora_A.weight", "unknown key"),
        ("", "unknown key"),
    ],
)
def test_key_that_cannot_be_applied_is_explained(key, why):
    found = PARSER.parse(key)
    assert isinstance(found, str)
    assert re.search(why, found), found


@pytest.mark.parametrize("style", KEY_STYLES)
def test_adapter_under_every_spelling_gives_the_same_modules(style, tmp_path):
    options = {"rank": 3, "target_modules": (*ALL_PROJECTIONS, "embed_tokens", "lm_head")}
    expected = read_modules(make_full_adapter(tmp_path / "peft", **options))
    found = read_modules(make_full_adapter(tmp_path / "other", key_style=style, **options))
    assert found.keys() == expected.keys()
    for module, weights in found.items():
        assert torch.equal(weights.a, expected[module].a)
        assert torch.equal(weights.b, expected[module].b)


def test_patterns_mean_the_paths_of_the_trained_model(tmp_path):
    path = make_full_adapter(
        tmp_path / "adapter",
        rank=4,
        key_style="language_model",
        target_modules=["q_proj"],
        rank_pattern={r"^language_model\.model\.layers\.1\..*": 2, r"^model\.layers\.2\..*": 7},
    )
    modules = read_modules(path)
    ranks = [modules[f"model.layers.{layer}.self_attn.q_proj"].lora_rank for layer in range(4)]
    assert ranks == [4, 2, 4, 4]


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["q_proj"], layers=[0])
    tensors = read_adapter_tensors(path)
    write_adapter_tensors(path, tensors | {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 24)})
    with pytest.raises(InvalidArgumentError, match="are the same tensor of module"):
        check(path)


def test_fused_module_beside_one_of_its_parts_is_refused(tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["qkv_proj", "k_proj"], layers=[1])
    with pytest.raises(
        InvalidArgumentError, match=r"both apply to module 'model\.layers\.1\.self_attn\.k_proj'"
    ):
        check(path)


def test_fused_module_of_the_wrong_width_is_refused(tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["gate_up_proj"], layers=[1])
    tensors = read_adapter_tensors(path)
    key = "base_model.model.model.layers.1.mlp.gate_up_proj.lora_B.weight"
    write_adapter_tensors(path, tensors | {key: tensors[key][:-1].clone()})
    with pytest.raises(InvalidArgumentError, match=r"has shape \[79, 4\], expected \[80, 4\]"):
        check(path)


def test_fused_module_is_refused_where_the_model_declares_none(tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["qkv_proj"])
    with pytest.raises(
        InvalidArgumentError, match=r"for module 'model\.layers\.0\.self_attn\.qkv_proj', which the"
    ):
        check(path, fused=None)


@pytest.mark.parametrize(("module", "expected"), [("embed_tokens", [48, 24]), ("lm_head", [48, 24])])
class TestBaseWeightsBesideLoRA:
    """PEFT saves an embedding's frozen weights whenever LoRA is on it."""

    def write(self, path, module, shape):
        make_full_adapter(path, rank=4, target_modules=["q_proj", module])
        prefix = "lm_head" if module == "lm_head" else f"model.{module}"
        key = f"base_model.model.{prefix}.base_layer.weight"
        write_adapter_tensors(path, read_adapter_tensors(path) | {key: torch.ones(shape)})
        return path

    def test_are_skipped_where_they_have_the_models_shape(self, module, expected, tmp_path):
        modules = read_modules(self.write(tmp_path / "adapter", module, expected))
        assert len(modules) == 5

    def test_are_refused_where_tokens_were_added(self, module, expected, tmp_path):
        path = self.write(tmp_path / "adapter", module, [expected[0] + 1, expected[1]])
        with pytest.raises(
            InvalidArgumentError, match=r"of shape \[49, 24\].*the model's shape \[48, 24\].*adding"
        ):
            check(path)

    def test_are_refused_without_lora_on_the_module(self, module, expected, tmp_path):
        path = self.write(tmp_path / "adapter", module, expected)
        tensors = read_adapter_tensors(path)
        write_adapter_tensors(
            path, {k: t for k, t in tensors.items() if module not in k or "base_layer" in k}
        )
        with pytest.raises(InvalidArgumentError, match="only beside LoRA on"):
            check(path)


def test_embedding_under_the_keys_of_a_projection_is_refused_and_the_other_way_round(tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["q_proj"], layers=[0])
    extra = {
        "base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 48),
        f"base_model.model.{Q_PROJ}.lora_embedding_A": torch.zeros(4, 24),
    }
    write_adapter_tensors(path, read_adapter_tensors(path) | extra)
    with pytest.raises(InvalidArgumentError) as caught:
        check(path)
    assert "lora_A of module 'model.embed_tokens', expected lora_embedding_A" in str(caught.value)
    assert f"lora_embedding_A of module '{Q_PROJ}', expected lora_A" in str(caught.value)


@pytest.mark.parametrize(("half", "missing"), [("A", "B"), ("B", "A")])
def test_missing_half_of_an_embedding_is_named(half, missing, tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["q_proj", "embed_tokens"])
    tensors = read_adapter_tensors(path)
    del tensors[f"base_model.model.model.embed_tokens.lora_embedding_{missing}"]
    write_adapter_tensors(path, tensors)
    with pytest.raises(InvalidArgumentError, match=f"_{half}' has no lora_embedding_{missing} beside it"):
        check(path)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_embedding_is_refused_where_the_model_takes_no_adapter_on_it(module, tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["q_proj", module])
    with pytest.raises(
        InvalidArgumentError, match=f"LoRA on {module}, which is not supported for this model"
    ):
        check_peft_adapter(str(path), make_targets(), AdapterLimits(64, torch.float32))


def test_head_that_peft_ties_to_the_embedding_counts_as_targeted(tmp_path):
    path = make_full_adapter(tmp_path / "adapter", rank=4, target_modules=["embed_tokens", "lm_head"])
    corrupt_config(path, target_modules=["model.embed_tokens"])
    with pytest.raises(InvalidArgumentError, match="does not name it"):
        check(path)
    corrupt_config(path, ensure_weight_tying=True)
    assert read_modules(path).keys() == {"model.embed_tokens", "lm_head"}
