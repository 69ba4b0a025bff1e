from __future__ import annotations

import peft
import pytest
import torch

from lora.adapter_setup import MODEL_CONFIG
from lora.peft_setup import digest_of, read_modules
from lora_serve.testing.adapters import make_random_adapter, read_adapter_tensors


def test_same_seed_gives_the_same_files_and_another_seed_does_not(tmp_path):
    paths = [
        make_random_adapter(tmp_path / name, MODEL_CONFIG, rank=3, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()
    assert digest_of(paths[0]) != digest_of(paths[2])


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"rank": 64, "alpha": 1},
        {"rank": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 40}},
        {"rank": 4, "alpha": -3, "layers": [1, 3], "target_modules": ["q_proj", "down_proj"]},
    ],
    ids=str,
)
def test_change_of_the_weights_has_the_asked_size_at_any_rank_and_scaling(options, tmp_path):
    modules = read_modules(make_random_adapter(tmp_path / "a", MODEL_CONFIG, scale=0.4, **options))
    for module, weights in modules.items():
        in_features = weights.a.shape[1]
        size = (weights.scaling * weights.b.T @ weights.a).std() * in_features**0.5
        assert 0.1 < size < 1.2, module


def test_config_is_one_that_peft_reads(tmp_path):
    path = make_random_adapter(
        tmp_path / "a", MODEL_CONFIG, rank=3, alpha=5, layers=[1], rank_pattern={"q_proj": 2}
    )
    config = peft.PeftConfig.from_pretrained(str(path))
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.layers_to_transform) == (3, 5, [1])
    assert config.rank_pattern == {"q_proj": 2}


def test_dtype_and_modules_are_as_asked(tmp_path):
    path = make_random_adapter(
        tmp_path / "a", MODEL_CONFIG, rank=2, dtype=torch.float16, target_modules=["o_proj"], layers=[2]
    )
    tensors = read_adapter_tensors(path)
    prefix = "base_model.model.model.layers.2.self_attn.o_proj"
    assert sorted(tensors) == [f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize(
    "options", [{"target_modules": ["c_attn"]}, {"layers": [4]}, {"key_style": "other"}], ids=str
)
def test_what_the_model_does_not_have_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        make_random_adapter(tmp_path / "a", MODEL_CONFIG, **options)
    with pytest.raises(TypeError):
        make_random_adapter(tmp_path / "a", MODEL_CONFIG, no_such_option=1)
