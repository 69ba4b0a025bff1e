"""Adapters written by the real peft library: our ``scaling * B A`` against the change that peft merges."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from lora.peft_setup import FULL_CONFIG, FUSED, NUM_LAYERS, VOCAB_SIZE, make_full_targets, read_modules
from lora_serve.kernels.lora_weights import LoRASliceWeights
from lora_serve.layers.linear import LoRAKind

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
    "embed_tokens": {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens"]},
    "lm_head": {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head"]},
    "embeddings_with_patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["embed_tokens", "lm_head", "o_proj"],
        "rank_pattern": {"embed_tokens": 1, "^lm_head": 7},
        "alpha_pattern": {"^model.embed_tokens": 3, "lm_head": 5},
    },
    "orthogonal": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


def make_base_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**FULL_CONFIG, max_position_embeddings=32)
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


def assert_same_deltas(
    modules: dict[str, LoRASliceWeights], expected: dict[str, Tensor], *, prefix: str = ""
) -> None:
    assert sorted(modules) == sorted(prefix + module for module in expected)
    targets = make_full_targets()
    for module, delta in expected.items():
        weights = modules[prefix + module]
        assert weights.a.is_contiguous()
        assert weights.b.is_contiguous()
        if targets[prefix + module].kind is LoRAKind.EMBEDDING:
            ours = weights.scaling * (weights.a.double() @ weights.b.double())
        else:
            ours = weights.scaling * (weights.b.double().T @ weights.a.double())
        # Both are fp64 products of the same fp32 numbers; peft adds its to the weight first.
        torch.testing.assert_close(ours, delta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_delta_equals_what_peft_merges(case, tmp_path):
    base = make_base_model()
    model = make_peft_model(copy.deepcopy(base), task_type="CAUSAL_LM", **CASES[case])
    model.save_pretrained(tmp_path)

    modules = read_modules(tmp_path)

    # Saving sorts the patterns, so what the file means is what peft makes of it when it loads it again.
    expected = merged_deltas(base, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    assert expected
    assert_same_deltas(modules, expected)


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
    modules = read_modules(tmp_path)
    assert modules["model.layers.1.self_attn.q_proj"].lora_rank == 3
    assert modules["model.layers.2.self_attn.q_proj"].lora_rank == 4
    assert_same_deltas(modules, merged_deltas(base, model), prefix="model.")


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
    assert_same_deltas(read_modules(tmp_path / "second"), merged_deltas(base, model))


def test_raw_state_dict_keys_with_the_adapter_name_are_understood(tmp_path):
    base = make_base_model()
    model = make_peft_model(copy.deepcopy(base), r=4, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    tensors = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name
    }
    assert any(".lora_A.default.weight" in key for key in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert_same_deltas(read_modules(tmp_path), merged_deltas(base, model))


def test_adapter_saved_by_transformers_is_understood(tmp_path):
    base = make_base_model()
    with_adapter = copy.deepcopy(base)
    with_adapter.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with_adapter.save_pretrained(tmp_path)
    modules = read_modules(tmp_path)
    state = with_adapter.state_dict()
    assert len(modules) == 8
    for module, weights in modules.items():
        assert torch.equal(weights.a, state[f"{module}.lora_A.default.weight"])
        assert torch.equal(weights.b.T, state[f"{module}.lora_B.default.weight"])
        assert weights.scaling == pytest.approx(5 / 3, rel=1e-15)


def test_fused_modules_of_phi3_are_split_as_its_layers_split_them(tmp_path):
    torch.manual_seed(0)
    config = transformers.Phi3Config(**FULL_CONFIG, max_position_embeddings=32, pad_token_id=0)
    base = transformers.Phi3ForCausalLM(config).eval()
    model = make_peft_model(
        copy.deepcopy(base), r=5, target_modules=["qkv_proj", "gate_up_proj", "down_proj"]
    )
    model.save_pretrained(tmp_path)

    modules = read_modules(tmp_path)

    expected = {}
    for module, delta in merged_deltas(base, model).items():
        members = FUSED.get(module, (module,))
        widths = [make_full_targets()[member].out_features for member in members]
        expected.update(zip(members, delta.split(widths), strict=True))
    assert len(expected) == 6 * NUM_LAYERS
    assert_same_deltas(modules, expected)


def test_tensors_that_peft_ties_are_applied_to_both_ends(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**FULL_CONFIG, max_position_embeddings=32, tie_word_embeddings=True)
    base = transformers.LlamaForCausalLM(config).eval()
    model = make_peft_model(base, r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="embedding layers found"):
        model.save_pretrained(tmp_path)
    modules = read_modules(tmp_path)
    state = model.state_dict()
    embedding = state["base_model.model.model.embed_tokens.lora_embedding_A.default"]
    assert embedding.shape == (4, VOCAB_SIZE)
    assert torch.equal(modules["model.embed_tokens"].a, embedding.T)
    assert torch.equal(modules["lm_head"].b, state["base_model.model.lm_head.lora_B.default.weight"].T)
    assert torch.equal(modules["lm_head"].b, embedding)
    assert modules["lm_head"].scaling == modules["model.embed_tokens"].scaling == 2.0


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_file_dtypes_are_converted_to_the_models(file_dtype, model_dtype, tmp_path):
    model = make_peft_model(make_base_model().to(file_dtype), r=4, target_modules=["q_proj"])
    model.to(file_dtype).save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    weights = read_modules(tmp_path, model_dtype)[module]
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
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_saves_but_cannot_be_applied_exactly_is_refused(options, tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    make_peft_model(make_base_model(), **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_modules(tmp_path)


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

    modules = read_modules(tmp_path / "final")

    assert len(modules) == NUM_LAYERS
    for module, weights in modules.items():
        ours = base.state_dict()[f"{module}.weight"] + weights.scaling * weights.b.T @ weights.a
        torch.testing.assert_close(ours, trained[f"{module}.weight"], rtol=0, atol=1e-5)
