"""Adapters written by the real peft library: our ``scaling * B A`` against the change that peft merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from lora.adapter_setup import MODEL_CONFIG, make_targets
from lora_serve.lora import AdapterLimits, HostAdapter, read_peft_adapter

CASES: dict[str, dict[str, Any]] = {
    "rank_1": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj"]},
    "odd_rank_and_alpha": {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "fractional_alpha": {"r": 4, "lora_alpha": 2.5, "target_modules": ["o_proj"]},
    "negative_alpha": {"r": 4, "lora_alpha": -8, "target_modules": ["o_proj"]},
    "rank_64": {"r": 64, "lora_alpha": 128, "target_modules": ["v_proj"]},
    "all_linear": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "regex_targets": {"r": 2, "lora_alpha": 4, "target_modules": r".*\.layers\.[02]\..*(q|up)_proj"},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "gate_proj"]},
    "rank_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        # The first that matches counts, also where a later one matches too.
        "rank_pattern": {
            r"layers\.1\.self_attn\.q_proj": 6,
            "q_proj": 3,
            "^model.layers.2.self_attn.k_proj": 7,
            "proj": 9,
            r"layers\.\d\.mlp\.(up|down)_proj": 2,
        },
    },
    "alpha_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {r"model\.layers\.3\..*": 1, "up_proj": 5, r".*\.q_proj": 2},
    },
    "both_patterns_with_rslora": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "rank_pattern": {"v_proj": 1, "layers.0.mlp.up_proj": 12},
        "alpha_pattern": {"up_proj": 30, r"layers\.[13]\.self_attn\.v_proj": 11},
    },
    "layers_to_transform": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1, 3],
    },
    "one_layer_with_layers_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["k_proj"],
        "layers_to_transform": 2,
        "layers_pattern": "layers",
    },
    "full_module_paths": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.gate_proj"],
    },
    "exclude_modules": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj", "layers.2.self_attn.k_proj"],
    },
    "dropout_and_gaussian": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "lora_dropout": 0.3,
        "init_lora_weights": "gaussian",
    },
    "orthogonal": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


def make_base_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**MODEL_CONFIG, vocab_size=32, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config).eval()


def make_peft_model(base: nn.Module, **options: Any) -> peft.PeftModel:
    """A peft model whose B matrices are not the zeros that peft starts with."""
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def merged_deltas(base: nn.Module, model: peft.PeftModel) -> dict[str, Tensor]:
    """What merging adds to each linear weight, in fp64, by module path; only weights that change."""
    before = {name: weight.detach().double().clone() for name, weight in base.named_parameters()}
    merged = copy.deepcopy(model).double().merge_and_unload()
    deltas = {}
    for name, weight in merged.named_parameters():
        delta = weight.detach() - before[name]
        if delta.abs().max() > 0:
            deltas[name.removesuffix(".weight")] = delta
    return deltas


def assert_same_deltas(adapter: HostAdapter, expected: dict[str, Tensor], *, prefix: str = "") -> None:
    assert sorted(adapter.modules) == sorted(prefix + module for module in expected)
    for module, delta in expected.items():
        weights = adapter.modules[prefix + module]
        assert weights.a.is_contiguous()
        assert weights.b.is_contiguous()
        ours = weights.scaling * (weights.b.double().T @ weights.a.double())
        # Both are fp64 products of the same fp32 numbers; peft adds its to the weight first.
        torch.testing.assert_close(ours, delta, rtol=1e-10, atol=1e-12)


def read(path: Path, dtype: torch.dtype = torch.float32) -> HostAdapter:
    return read_peft_adapter(str(path), make_targets(), AdapterLimits(max_lora_rank=64, dtype=dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_delta_equals_what_peft_merges(case, tmp_path):
    base = make_base_model()
    model = make_peft_model(copy.deepcopy(base), task_type="CAUSAL_LM", **CASES[case])
    model.save_pretrained(tmp_path)

    adapter = read(tmp_path)

    # Saving sorts the patterns, so what the file means is what peft makes of it when it loads it again.
    expected = merged_deltas(base, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    assert expected
    assert_same_deltas(adapter, expected)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_adapter_of_the_bare_decoder_is_mapped_with_its_patterns(tmp_path):
    base = make_base_model().model
    model = make_peft_model(
        copy.deepcopy(base),
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"^layers.1.self_attn.q_proj": 3, "^model.layers.2.self_attn.q_proj": 5},
        alpha_pattern={r"^layers\.3\..*": 1},
    )
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    assert adapter.modules["model.layers.1.self_attn.q_proj"].lora_rank == 3
    assert adapter.modules["model.layers.2.self_attn.q_proj"].lora_rank == 4
    assert_same_deltas(adapter, merged_deltas(base, model), prefix="model.")


def test_second_adapter_of_a_peft_model_reads_like_the_first(tmp_path):
    base = make_base_model()
    model = make_peft_model(copy.deepcopy(base), r=4, target_modules=["q_proj"])
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj"]))
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    assert_same_deltas(read(tmp_path / "second"), merged_deltas(base, model))


def test_raw_state_dict_keys_with_the_adapter_name_are_understood(tmp_path):
    base = make_base_model()
    model = make_peft_model(copy.deepcopy(base), r=4, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    tensors = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name
    }
    assert any(".lora_A.default.weight" in key for key in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert_same_deltas(read(tmp_path), merged_deltas(base, model))


def test_adapter_saved_by_transformers_is_understood(tmp_path):
    base = make_base_model()
    with_adapter = copy.deepcopy(base)
    with_adapter.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with_adapter.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    state = with_adapter.state_dict()
    assert len(adapter.modules) == 8
    for module, weights in adapter.modules.items():
        assert torch.equal(weights.a, state[f"{module}.lora_A.default.weight"])
        assert torch.equal(weights.b.T, state[f"{module}.lora_B.default.weight"])
        assert weights.scaling == pytest.approx(5 / 3, rel=1e-15)


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_file_dtypes_are_converted_to_the_models(file_dtype, model_dtype, tmp_path):
    model = make_peft_model(make_base_model().to(file_dtype), r=4, target_modules=["q_proj"])
    model.to(file_dtype).save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    weights = read(tmp_path, model_dtype).modules[module]
    assert stored[f"base_model.model.{module}.lora_A.weight"].dtype == file_dtype
    assert weights.a.dtype == weights.b.dtype == model_dtype
    assert torch.equal(weights.a, stored[f"base_model.model.{module}.lora_A.weight"].to(model_dtype))
    assert torch.equal(weights.b.T, stored[f"base_model.model.{module}.lora_B.weight"].to(model_dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_saves_but_cannot_be_applied_exactly_is_refused(options, tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    make_peft_model(make_base_model(), **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        read(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_base_changing_initialisation_converted_to_plain_lora_is_applied_exactly(tmp_path):
    base = make_base_model()
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "olora"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    trained = copy.deepcopy(model).merge_and_unload().state_dict()
    model.save_pretrained(
        tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )

    adapter = read(tmp_path / "final")

    for module, weights in adapter.modules.items():
        ours = base.state_dict()[f"{module}.weight"] + weights.scaling * weights.b.T @ weights.a
        torch.testing.assert_close(ours, trained[f"{module}.weight"], rtol=0, atol=1e-5)
