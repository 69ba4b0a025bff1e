from __future__ import annotations

import json

import pytest
import safetensors.torch

from lora.source_setup import make_hub_cache
from lora_serve.cli.main import main
from lora_serve.testing.adapters import make_random_adapter
from lora_serve.testing.models import make_random_model

MODEL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Only the configuration: the command must not look for weights."""
    path = tmp_path_factory.mktemp("check") / "model"
    make_random_model(path, "Qwen3ForCausalLM", **MODEL)
    (path / "model.safetensors").unlink()
    return path


def run(capsys, *arguments):
    status = main(["adapter", "check", *map(str, arguments)])
    return status, capsys.readouterr()


def test_adapter_that_fits_is_shown_with_ranks_scalings_and_bytes(model, tmp_path, capsys):
    adapter = make_random_adapter(
        tmp_path / "sql", model, rank=3, alpha=6, target_modules=("q_proj", "down_proj"), layers=[0, 2],
        rank_pattern={"layers.2.self_attn.q_proj": 5},
    )  # fmt: skip

    status, printed = run(capsys, adapter, "--model", model)

    assert status == 0
    rows = [line.split() for line in printed.out.splitlines()]
    assert f"{adapter} fits {model} (float32):" in printed.out
    config = json.loads((model / "config.json").read_text())
    q_width = config["num_attention_heads"] * config["head_dim"]
    q_bytes = (3 + 5) * (32 + q_width) * 4
    down_bytes = 2 * 3 * (48 + 32) * 4
    assert ["q_proj", "2", "0,", "2", "3,", "5", "2,", "1.2", f"{q_bytes:,}"] in rows
    assert ["down_proj", "2", "0,", "2", "3", "2", f"{down_bytes:,}"] in rows
    assert rows[-2][:4] == ["in", "all,", "aligned", "4"]


@pytest.mark.parametrize(
    ("trained", "in_layers", "outside"),
    [
        (("q_proj", "v_proj"), ("q_proj", "v_proj"), []),
        (("qkv_proj", "lm_head"), ("k_proj", "q_proj", "v_proj"), ["lm_head"]),
    ],
)
def test_json_names_every_module_and_adds_up(trained, in_layers, outside, model, tmp_path, capsys):
    adapter = make_random_adapter(tmp_path / "sql", model, rank=4, target_modules=trained)

    status, printed = run(capsys, adapter, "--model", model, "--json", "--dtype", "bfloat16")

    found = json.loads(printed.out)
    assert (status, found["fits"], found["problems"], found["dtype"]) == (0, True, [], "bfloat16")
    paths = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in in_layers]
    assert [module["module"] for module in found["modules"]] == outside + paths
    assert {module["lora_rank"] for module in found["modules"]} == {4}
    weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    exact = sum(tensor.numel() * 2 for tensor in weights.values())
    assert sum(module["num_bytes"] for module in found["modules"]) == exact
    assert sum(found["num_bytes_by_kind"].values()) == exact
    assert exact <= found["num_bytes"] < exact + 256 + 16 * len(weights)


@pytest.mark.parametrize("as_json", [False, True])
def test_every_problem_is_told_at_once(as_json, model, tmp_path, capsys):
    adapter = make_random_adapter(tmp_path / "bad", model, rank=9)
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    strangers = [f"base_model.model.model.layers.{i}.self_attn.z_proj.lora_A.weight" for i in range(15)]
    safetensors.torch.save_file(tensors | {key: next(iter(tensors.values())) * 1 for key in strangers}, file)

    options = ["--json"] if as_json else []
    status, printed = run(capsys, adapter, "--model", model, "--max-lora-rank", "8", *options)

    assert status == 1
    problems = json.loads(printed.out)["problems"] if as_json else printed.out.splitlines()[1:]
    text = "\n".join(problems)
    assert "lora_rank 9 but max_lora_rank is 8" in text
    for key in strangers:
        assert key in text


def test_weights_that_are_no_numbers_are_found(model, tmp_path, capsys):
    adapter = make_random_adapter(tmp_path / "bad", model)
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)

    status, printed = run(capsys, adapter, "--model", model)

    assert status == 1
    assert "NaN" in printed.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/model"], "/no/model"),
        (["--model", "MODEL", "--max-lora-rank", "0"], "--max-lora-rank is 0"),
        (["--model", "MODEL", "--lora-resolver", "unheard-of"], "'unheard-of' is not installed"),
    ],
)
def test_wrong_question_is_status_2(arguments, words, model, tmp_path, capsys):
    arguments = [str(model) if argument == "MODEL" else argument for argument in arguments]

    status, printed = run(capsys, tmp_path, *arguments)

    assert status == 2
    assert printed.err.startswith("lora-serve: error: ")
    assert words in printed.err
    assert printed.out == ""


def test_adapter_of_the_hub_is_checked_where_the_option_allows_it(model, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    adapter = make_random_adapter(tmp_path / "adapter", model)
    make_hub_cache(tmp_path / "cache", "org/sql", adapter)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    assert run(capsys, "org/sql@main", "--model", model, "--lora-allow-hub")[0] == 0
    status, printed = run(capsys, "org/sql@main", "--model", model)
    assert status == 1
    assert "--lora-allow-hub" in printed.out
