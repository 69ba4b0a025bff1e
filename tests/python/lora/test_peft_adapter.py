from __future__ import annotations

import os
import re
import shutil

import pytest
import torch

from lora.adapter_setup import copy_adapter, make_adapter, read_adapter
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.testing.adapters import (
    read_adapter_config,
    read_adapter_tensors,
    write_adapter_config,
    write_adapter_tensors,
)
from lora_serve.testing.bad_adapters import BAD_ADAPTERS, corrupt_config, corrupt_truncate


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_bad_adapter_is_refused_with_what_is_wrong(kind, tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    read_adapter(path)
    BAD_ADAPTERS[kind].corrupt(path)
    with pytest.raises(InvalidArgumentError) as caught:
        read_adapter(path, name="tenant-7")
    message = str(caught.value)
    assert message.startswith("adapter 'tenant-7' ")
    for text in BAD_ADAPTERS[kind].message_has:
        assert text in message


def test_rank_above_the_limit_says_how_to_start(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4, rank_pattern={"layers.1.mlp.up_proj": 9})
    with pytest.raises(InvalidArgumentError) as caught:
        read_adapter(path, max_lora_rank=8, name="sql-v2")
    assert str(caught.value) == (
        "adapter 'sql-v2' has lora_rank 9 but max_lora_rank is 8; start with --max-lora-rank 9"
    )
    assert read_adapter(path, max_lora_rank=9).lora_rank == 9


def test_unused_default_rank_above_the_limit_does_not_matter(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=100, target_modules=["q_proj"], rank_pattern={"q_proj": 4})
    assert read_adapter(path, max_lora_rank=4).lora_rank == 4


def test_all_problems_are_listed_at_once(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    for kind in ("dora", "bias", "wrong_shape", "missing_lora_b", "unknown_tensor", "unknown_option"):
        BAD_ADAPTERS[kind].corrupt(path)
    with pytest.raises(InvalidArgumentError) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert "it has 6 problems" in message
    for number in range(1, 7):
        assert f"({number}) " in message
    for text in ("use_dora", 'bias is "all"', "has shape", "no lora_B", "unknown key", "use_magic"):
        assert text in message


def test_long_list_of_problems_is_cut(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    BAD_ADAPTERS["wrong_rank"].corrupt(path)
    with pytest.raises(InvalidArgumentError, match=r"it has 56 problems: .*\(10\).*; and 46 more$"):
        read_adapter(path)


def test_one_module_under_two_keys_is_refused(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4, target_modules=["q_proj"])
    tensors = read_adapter_tensors(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key.replace("lora_A.", "lora_A.other.")] = tensors[key].clone()
    tensors[key.replace("model.model.model.", "model.model.")] = tensors[key].clone()
    write_adapter_tensors(path, tensors)
    with pytest.raises(InvalidArgumentError, match=r"2 problems.*are the same tensor of module"):
        read_adapter(path)


def test_keys_without_peft_prefix_are_refused(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    tensors = read_adapter_tensors(path)
    stripped = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    write_adapter_tensors(path, stripped)
    with pytest.raises(InvalidArgumentError, match=r"expected base_model\.model\.<module path>"):
        read_adapter(path)


def test_values_beyond_the_models_dtype_are_refused(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    tensors = read_adapter_tensors(path)
    tensors[max(tensors)][0, 0] = 1e6
    write_adapter_tensors(path, tensors)
    assert read_adapter(path).lora_rank == 4
    with pytest.raises(InvalidArgumentError, match=r"up to 1e\+06, which torch.float16 cannot hold"):
        read_adapter(path, dtype=torch.float16)


def test_options_without_effect_at_inference_are_accepted(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    corrupt_config(
        path,
        lora_dropout=0.5,
        inference_mode=False,
        base_model_name_or_path="some/other-model",
        loftq_config={"loftq_bits": 4},
        eva_config={"rho": 2.0},
        init_lora_weights="eva",
        qalora_group_size=16,
        megatron_core="megatron.core",
        revision="main",
        peft_version="0.99",
        auto_mapping={"a": "b"},
        some_future_option=None,
        another_future_option=False,
        target_parameters=[],
        modules_to_save=[],
    )
    assert len(read_adapter(path).modules) == 28


def test_missing_folder_and_file_in_place_of_folder_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgumentError, match="does not exist, expected a folder"):
        read_adapter(tmp_path / "nothing")
    with pytest.raises(InvalidArgumentError, match="is a file, expected a folder"):
        read_adapter(tmp_path / "file")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pipe_in_place_of_a_file_is_refused_without_waiting_for_a_writer(name, tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(InvalidArgumentError, match=f"{name} is not a regular file"):
        read_adapter(path)


def test_file_of_every_length_is_refused_with_a_clear_error(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=1, target_modules=["q_proj"], layers=[0])
    weights = path / "adapter_model.safetensors"
    data = weights.read_bytes()
    for size in range(len(data)):
        weights.write_bytes(data[:size])
        with pytest.raises(InvalidArgumentError, match=r"adapter_model.safetensors is broken"):
            read_adapter(path)
    weights.write_bytes(data + b"x")
    with pytest.raises(InvalidArgumentError, match="too long"):
        read_adapter(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}',
        b'{"a": {"shape": [2], "data_offsets": [0, 8]}}',
        b"{" + b'"a":[' * 20000,
        b'\xff\xfe{"a"',
    ],
)
def test_broken_header_is_refused_with_a_clear_error(header, tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=1)
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"adapter_model.safetensors is broken"):
        read_adapter(path)


def test_overlapping_tensors_in_the_file_are_refused(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4, target_modules=["q_proj"], layers=[0])
    weights = path / "adapter_model.safetensors"
    data = weights.read_bytes()
    first_a = re.search(rb'"data_offsets":\[(\d+),(\d+)\]', data)
    assert first_a is not None
    moved = data.replace(first_a[0], b'"data_offsets":[4,388]', 1)
    assert len(moved) != len(data) or moved != data
    weights.write_bytes(moved)
    with pytest.raises(InvalidArgumentError, match=r"adapter_model.safetensors is broken"):
        read_adapter(path)


def test_error_names_the_path_where_there_is_no_name(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    corrupt_truncate(path)
    with pytest.raises(InvalidArgumentError, match=re.escape(f"adapter '{path}' ")):
        read_adapter(path)


def test_host_adapter_describes_itself(tmp_path):
    path = make_adapter(
        tmp_path / "adapter",
        rank=4,
        target_modules=["q_proj", "down_proj"],
        layers=[1, 3],
        rank_pattern={"layers.3.mlp.down_proj": 6},
    )
    adapter = read_adapter(path, dtype=torch.bfloat16)
    assert adapter.path == str(path)
    assert adapter.lora_rank == 6
    assert adapter.target_modules == ("down_proj", "q_proj")
    assert adapter.num_bytes == 2 * (2 * 4 * (24 + 32) + 4 * (40 + 24) + 6 * (40 + 24))
    assert {weights.a.dtype for weights in adapter.modules.values()} == {torch.bfloat16}


def test_tensors_do_not_keep_the_files_buffer_alive(tmp_path):
    adapter = read_adapter(make_adapter(tmp_path / "adapter", rank=4))
    for weights in adapter.modules.values():
        for tensor in (weights.a, weights.b):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_digest_is_that_of_the_content_not_of_path_or_spelling(tmp_path):
    path = make_adapter(tmp_path / "one", rank=4, seed=3)
    digest = read_adapter(path).content_digest
    same = [copy_adapter(path, tmp_path / "two")]
    same.append(make_adapter(tmp_path / "three", rank=4, seed=3, key_style="named"))
    same.append(make_adapter(tmp_path / "four", rank=4, seed=3, key_style="bare_decoder"))
    reordered = copy_adapter(path, tmp_path / "five")
    write_adapter_tensors(reordered, dict(reversed(read_adapter_tensors(path).items())))
    config = dict(reversed(read_adapter_config(path).items()))
    write_adapter_config(reordered, {**config, "lora_dropout": 0.1, "base_model_name_or_path": "x"})
    same.append(reordered)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert {read_adapter(other).content_digest for other in same} == {digest}
    assert read_adapter(path, dtype=torch.bfloat16).content_digest == digest


def test_digest_changes_with_everything_that_changes_the_answer(tmp_path):
    path = make_adapter(tmp_path / "0", rank=4, target_modules=["down_proj", "k_proj"])
    digests = [read_adapter(path).content_digest]

    def changed(number, change):
        other = copy_adapter(path, tmp_path / str(number))
        change(other)
        digests.append(read_adapter(other).content_digest)

    def flip_one_bit(other):
        tensors = read_adapter_tensors(other)
        tensors[max(tensors)].view(torch.int32)[0, 0] ^= 1
        write_adapter_tensors(other, tensors)

    def rename(other):
        # The same tensors in the same order, on other modules.
        corrupt_config(other, target_modules=["down_proj", "v_proj"])
        tensors = read_adapter_tensors(other)
        write_adapter_tensors(other, {key.replace("k_proj", "v_proj"): t for key, t in tensors.items()})

    def drop_module(other):
        tensors = read_adapter_tensors(other)
        write_adapter_tensors(other, {k: t for k, t in tensors.items() if ".3.mlp.down_proj" not in k})

    def to_half(other):
        write_adapter_tensors(other, {key: t.half() for key, t in read_adapter_tensors(other).items()})

    def to_bfloat16_of_the_same_bits(other):
        tensors = {key: t.half().view(torch.bfloat16) for key, t in read_adapter_tensors(other).items()}
        write_adapter_tensors(other, tensors)

    changed(1, flip_one_bit)
    changed(2, rename)
    changed(3, drop_module)
    changed(4, to_half)
    changed(5, lambda other: corrupt_config(other, lora_alpha=9))
    changed(6, lambda other: corrupt_config(other, use_rslora=True))
    changed(7, lambda other: corrupt_config(other, alpha_pattern={"layers.2.self_attn.k_proj": 1}))
    changed(8, to_bfloat16_of_the_same_bits)
    assert len(set(digests)) == 9


def test_file_is_read_not_mapped_and_may_go_away_after_the_read(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    adapter = read_adapter(path)
    before = {module: weights.a.clone() for module, weights in adapter.modules.items()}
    with open(path / "adapter_model.safetensors", "r+b") as file:
        file.write(b"\xff" * 2000)
        file.truncate(100)
    shutil.rmtree(path)
    for module, weights in adapter.modules.items():
        assert torch.equal(weights.a, before[module])
