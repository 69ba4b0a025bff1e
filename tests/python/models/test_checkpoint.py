"""Loading checkpoints: every tensor filled exactly once, everything else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.models import load_model, resolve_model_directory, staged_copies
from lora_serve.models.checkpoint import CheckpointLoader, find_checkpoint_files
from lora_serve.testing.models import make_random_model

Tensors = dict[str, torch.Tensor]
QWEN3 = "Qwen3ForCausalLM"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def weights(directory: Path) -> Tensors:
    return dict(load_model(str(directory)).checkpoint_tensors())


def change(directory: Path, edit: Callable[[Tensors], object], file_name: str = "model.safetensors") -> None:
    tensors = load_file(directory / file_name)
    edit(tensors)
    save_file(tensors, directory / file_name)


def test_fused_parameters_hold_the_files_tensors(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3)
    expected = load_file(tmp_path / "model.safetensors")

    found = weights(tmp_path)

    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_cover_every_parameter_of_the_model_exactly(tmp_path: Path) -> None:
    make_random_model(tmp_path, "LlamaForCausalLM", extra_config={"attention_bias": True, "mlp_bias": True})
    model = load_model(str(tmp_path))
    parts = model.checkpoint_tensors().values()

    assert sum(part.numel() for part in parts) == sum(p.numel() for p in model.parameters())
    for part in parts:
        part.fill_(torch.nan)
    assert all(parameter.isnan().all() for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("num_shards", [2, 5])
def test_shards_give_the_same_weights_as_one_file(tmp_path: Path, num_shards: int) -> None:
    make_random_model(tmp_path / "one", QWEN3, seed=4)
    make_random_model(tmp_path / "many", QWEN3, seed=4, num_shards=num_shards)

    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")

    assert len(list((tmp_path / "many").glob("*.safetensors"))) == num_shards
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_weights_are_converted_to_the_chosen_dtype(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3, dtype="bfloat16")
    stored = load_file(tmp_path / "model.safetensors")

    model = load_model(str(tmp_path), dtype="float32")

    assert model.config.dtype == torch.float32
    for name, tensor in model.checkpoint_tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float())


def test_harmless_rotary_buffers_are_skipped(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3)
    change(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}))
    assert len(weights(tmp_path)) > 0


class TestTiedEmbeddings:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        make_random_model(tmp_path, QWEN3, tie_word_embeddings=True)
        return tmp_path

    def test_logits_share_the_embeddings_memory(self, tied: Path) -> None:
        model = load_model(str(tied))
        assert model.lm_head.weight is model.embed_tokens.weight
        assert "lm_head.weight" not in model.checkpoint_tensors()

    @pytest.mark.parametrize("embedding_first", [True, False])
    def test_an_equal_logits_matrix_is_accepted(self, tied: Path, embedding_first: bool) -> None:
        embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
        if embedding_first:
            change(tied, lambda t: t.update({"lm_head.weight": embedding.clone()}))
        else:
            self.in_two_shards(tied, {"lm_head.weight": embedding.clone()})
        assert torch.equal(load_model(str(tied)).embed_tokens.weight, embedding)

    def test_only_a_logits_matrix_is_accepted(self, tied: Path) -> None:
        embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
        change(tied, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
        assert torch.equal(load_model(str(tied)).embed_tokens.weight, embedding)

    @pytest.mark.parametrize("embedding_first", [True, False])
    def test_another_logits_matrix_is_refused(self, tied: Path, embedding_first: bool) -> None:
        other = torch.ones(256, 64)
        if embedding_first:
            change(tied, lambda t: t.update({"lm_head.weight": other}))
        else:
            self.in_two_shards(tied, {"lm_head.weight": other})
        with pytest.raises(InvalidArgumentError, match=r"although config.json has tie_word_embeddings true"):
            load_model(str(tied))

    @staticmethod
    def in_two_shards(directory: Path, first: Tensors) -> None:
        rest = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        save_file(first, directory / "model-1.safetensors")
        save_file(rest, directory / "model-2.safetensors")
        weight_map = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(rest, "model-2.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3)
    change(tmp_path, lambda t: t.pop(K_PROJ))
    with pytest.raises(InvalidArgumentError, match=rf"1 of \d+ tensors are missing .*{K_PROJ}"):
        load_model(str(tmp_path))


def test_a_missing_logits_matrix_of_an_untied_model_is_named(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3)
    change(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(InvalidArgumentError, match=r"missing .*lm_head.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.7.mlp.up_proj.weight", torch.ones(2, 3), r"layers.7.*of shape \(2, 3\) is unexpected"),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(256), "q_proj.bias' .* is unexpected"),
        (K_PROJ, torch.ones(64, 128), r"shape \(64, 128\) and dtype torch.float32, expected \(128, 64\)"),
        (K_PROJ, torch.ones(128), r"has shape \(128,\)"),
        (K_PROJ, torch.ones(128, 64, dtype=torch.int8), r"dtype torch.int8, expected .* of float32"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    make_random_model(tmp_path, QWEN3)
    change(tmp_path, lambda t: t.update({name: tensor}))
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        load_model(str(tmp_path))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3, num_shards=2)
    first, second = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(tmp_path / first).items()))
    change(tmp_path, lambda t: t.update({name: tensor}), second)
    with pytest.raises(
        InvalidArgumentError, match=f"{second}: tensor '{name}' was loaded from {first} already"
    ):
        load_model(str(tmp_path))


@pytest.mark.parametrize("kept_bytes", [0, 5, 300, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept_bytes: int) -> None:
    make_random_model(tmp_path, QWEN3, num_shards=2)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(InvalidArgumentError, match="is truncated or not a safetensors file") as caught:
        load_model(str(tmp_path))
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)
    with pytest.raises(InvalidArgumentError, match=r"model.safetensors is truncated or not"):
        load_model(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        InvalidArgumentError, match=r"shards that are missing: model-00002-of-00003.safetensors"
    ):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "index", ["{", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {}}']
)
def test_a_broken_index_is_named(tmp_path: Path, index: str) -> None:
    make_random_model(tmp_path, QWEN3)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidArgumentError, match=r"model.safetensors.index.json"):
        load_model(str(tmp_path))


def test_a_directory_without_weights_or_config_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"has no config.json; give a Hugging Face checkpoint"):
        load_model(str(tmp_path))
    make_random_model(tmp_path, QWEN3)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match=r"neither model.safetensors nor .*--load-format dummy"):
        load_model(str(tmp_path))


def test_dummy_weights_need_only_a_config_and_follow_the_seed(tmp_path: Path) -> None:
    make_random_model(tmp_path, "Qwen2ForCausalLM")
    for path in tmp_path.glob("model*"):
        path.unlink()

    first, again, other = (load_model(str(tmp_path), load_format="dummy", seed=seed) for seed in (1, 1, 2))

    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert all(parameter.isfinite().all() for parameter in first.parameters())
    assert (first.norm.weight == 1).all()


@pytest.mark.gpu
def test_weights_on_cuda_equal_those_on_the_cpu_in_the_types_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_random_model(
        tmp_path, QWEN3, num_shards=3, tie_word_embeddings=True, extra_config={"attention_bias": True}
    )
    # Pieces that end within rows: matrices take several, with a short one at the end.
    monkeypatch.setattr(staged_copies, "_BUFFER_BYTES", 1000)
    for dtype in ("float32", "bfloat16", "float16"):
        expected = load_model(str(tmp_path), dtype=dtype).checkpoint_tensors()

        found = load_model(str(tmp_path), dtype=dtype, device="cuda").checkpoint_tensors()

        assert all(tensor.is_cuda for tensor in found.values())
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            name: tensor.dtype for name, tensor in expected.items()
        }
        assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected.items())


@pytest.mark.gpu
def test_dummy_weights_are_drawn_on_the_device_and_follow_the_seed(tmp_path: Path) -> None:
    make_random_model(tmp_path, QWEN3, dtype="bfloat16", hidden_size=256)
    models = [load_model(str(tmp_path), load_format="dummy", device="cuda", seed=seed) for seed in (1, 1, 2)]
    first, again, other = ({n: t.float() for n, t in m.checkpoint_tensors().items()} for m in models)

    for name, tensor in first.items():
        assert tensor.is_cuda
        assert torch.equal(tensor, again[name])
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name])
            assert abs(tensor.std().item() * tensor.shape[1] ** 0.5 - 1) < 0.05


def test_progress_goes_to_stderr_and_can_be_switched_off(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_random_model(tmp_path, QWEN3, num_shards=2)
    model = load_model(str(tmp_path))
    shown = capsys.readouterr()
    assert "Loading weights: 100%" in shown.err
    assert shown.out == ""

    loader = CheckpointLoader(model.checkpoint_tensors(), has_tied_embeddings=False, show_progress=False)
    loader.load(find_checkpoint_files(tmp_path))
    assert capsys.readouterr().err == ""


class TestModelNames:
    @pytest.mark.parametrize("model", ["/no/such/model", "./missing", "a/b/c", ""])
    def test_a_path_that_does_not_exist_is_refused_without_a_download(self, model: str) -> None:
        with pytest.raises(InvalidArgumentError, match="does not exist; give a Hugging Face checkpoint"):
            resolve_model_directory(model)

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").touch()
        with pytest.raises(InvalidArgumentError, match="is a file"):
            resolve_model_directory(str(tmp_path / "model.gguf"))

    def test_a_hub_id_is_downloaded_without_other_weight_formats(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def download(repo_id: str, *, allow_patterns: list[str]) -> str:
            calls.append((repo_id, allow_patterns))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

        assert resolve_model_directory("org/tiny-model") == tmp_path
        assert resolve_model_directory("org/tiny-model", needs_weights=False) == tmp_path

        assert [name for name, _ in calls] == ["org/tiny-model"] * 2
        assert "model*.safetensors" in calls[0][1]
        assert "model*.safetensors" not in calls[1][1]
        assert not any("bin" in pattern for pattern in calls[0][1])

    def test_a_failed_download_says_what_to_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(repo_id: str, *, allow_patterns: list[str]) -> str:
            raise OSError("no route to host")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(InvalidArgumentError, match=r"no route to host.*check the name, the network"):
            resolve_model_directory("org/tiny-model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_format": "gguf"}, "load_format is 'gguf'"),
        ({"device": "tpu9"}, "device is 'tpu9'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"attention_backend": "none"}, "attention_backend is 'none'"),
    ],
)
def test_arguments_outside_their_choices_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    make_random_model(tmp_path, QWEN3)
    with pytest.raises(InvalidArgumentError, match=message):
        load_model(str(tmp_path), **arguments)
