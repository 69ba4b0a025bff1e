from __future__ import annotations

import os
import re

import pytest
import torch

from lora.adapter_setup import make_adapter, make_targets
from lora.peft_setup import check, read_block
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.lora import peft_adapter
from lora_serve.lora.adapter_files import WeightsFile
from lora_serve.lora.peft_adapter import MAX_REMEMBERED, PeftChecker
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.testing.adapters import read_adapter_tensors, write_adapter_tensors
from lora_serve.testing.bad_adapters import BAD_ADAPTERS, corrupt_config, corrupt_truncate


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_bad_adapter_is_refused_with_what_is_wrong(kind, tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    read_block(path, targets=make_targets(), fused={})
    BAD_ADAPTERS[kind].corrupt(path)
    with pytest.raises(InvalidArgumentError) as caught:
        read_block(path, targets=make_targets(), fused={}, name="tenant-7")
    message = str(caught.value)
    assert message.startswith("adapter 'tenant-7' ")
    for text in BAD_ADAPTERS[kind].message_has:
        assert text in message


def lora_rank_of(path, **options):
    with check(path, **options) as checked:
        return checked.layout.lora_rank


def test_rank_above_the_limit_says_how_to_start(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4, rank_pattern={"layers.1.mlp.up_proj": 9})
    with pytest.raises(InvalidArgumentError) as caught:
        check(path, max_lora_rank=8, name="sql-v2")
    assert str(caught.value) == (
        "adapter 'sql-v2' has lora_rank 9 but max_lora_rank is 8; start with --max-lora-rank 9"
    )
    assert lora_rank_of(path, max_lora_rank=9) == 9


def test_unused_default_rank_above_the_limit_does_not_matter(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=100, target_modules=["q_proj"], rank_pattern={"q_proj": 4})
    assert lora_rank_of(path, max_lora_rank=4) == 4


def test_all_problems_are_listed_at_once(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    for kind in ("dora", "bias", "wrong_shape", "missing_lora_b", "unknown_tensor", "unknown_option"):
        BAD_ADAPTERS[kind].corrupt(path)
    with pytest.raises(InvalidArgumentError) as caught:
        check(path)
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
        check(path)


def test_one_module_under_two_keys_is_refused(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4, target_modules=["q_proj"])
    tensors = read_adapter_tensors(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key.replace("lora_A.", "lora_A.other.")] = tensors[key].clone()
    tensors[key.replace("model.model.model.", "model.model.")] = tensors[key].clone()
    write_adapter_tensors(path, tensors)
    with pytest.raises(InvalidArgumentError, match=r"2 problems.*are the same tensor of module"):
        check(path)


def test_values_beyond_the_models_dtype_are_refused(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    tensors = read_adapter_tensors(path)
    tensors[max(tensors)][0, 0] = 1e6
    write_adapter_tensors(path, tensors)
    read_block(path)
    with pytest.raises(InvalidArgumentError, match=r"up to 1e\+06, which torch.float16 cannot hold"):
        read_block(path, torch.float16)


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
    assert len(read_block(path)[0].modules) == 28


def test_missing_folder_and_file_in_place_of_folder_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgumentError, match="does not exist, expected a folder"):
        check(tmp_path / "nothing")
    with pytest.raises(InvalidArgumentError, match="is a file, expected a folder"):
        check(tmp_path / "file")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pipe_in_place_of_a_file_is_refused_without_waiting_for_a_writer(name, tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(InvalidArgumentError, match=f"{name} is not a regular file"):
        check(path)


def test_file_of_every_length_is_refused_with_a_clear_error(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=1, target_modules=["q_proj"], layers=[0])
    weights = path / "adapter_model.safetensors"
    data = weights.read_bytes()
    for size in range(len(data)):
        weights.write_bytes(data[:size])
        with pytest.raises(InvalidArgumentError, match=r"adapter_model.safetensors is broken"):
            check(path)
    weights.write_bytes(data + b"x")
    with pytest.raises(InvalidArgumentError, match="too long"):
        check(path)


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
        check(path)


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
        check(path)


def test_error_names_the_path_where_there_is_no_name(tmp_path):
    path = make_adapter(tmp_path / "adapter", rank=4)
    corrupt_truncate(path)
    with pytest.raises(InvalidArgumentError, match=re.escape(f"adapter '{path}' ")):
        check(path)


def test_checked_adapter_describes_itself(tmp_path):
    path = make_adapter(
        tmp_path / "adapter",
        rank=4,
        target_modules=["q_proj", "down_proj"],
        layers=[1, 3],
        rank_pattern={"layers.3.mlp.down_proj": 6},
        alpha_pattern={"q_proj": 3},
    )
    with check(path, torch.bfloat16) as checked:
        layout = checked.layout
        assert checked.path == str(path)
        assert checked.dtype == torch.bfloat16
    assert layout.lora_rank == 6
    assert layout.target_modules == ("down_proj", "q_proj")
    assert [(module.module, module.lora_rank, module.scaling) for module in layout.modules] == [
        ("model.layers.1.mlp.down_proj", 4, 2.0),
        ("model.layers.1.self_attn.q_proj", 4, 0.75),
        ("model.layers.3.mlp.down_proj", 6, 8 / 6),
        ("model.layers.3.self_attn.q_proj", 4, 0.75),
    ]
    # Each of these matrices takes a multiple of 16 bytes.
    num_bytes = 2 * (2 * 4 * (24 + 32) + 4 * (40 + 24) + 6 * (40 + 24))
    assert num_bytes <= layout.num_bytes < num_bytes + 256


class TestPeftChecker:
    @pytest.fixture
    def checker(self):
        return PeftChecker(make_targets(), AdapterLimits(64, torch.float32), {})

    @pytest.fixture
    def parsed(self, monkeypatch):
        """One entry a header that was parsed."""
        entries = []
        parse = WeightsFile.parse_header
        monkeypatch.setattr(WeightsFile, "parse_header", lambda file: entries.append(1) or parse(file))
        return entries

    def test_adapters_of_one_recipe_are_checked_once(self, checker, parsed, tmp_path):
        names = ["q_proj", "v_proj", "up_proj"]
        paths = [
            make_adapter(tmp_path / f"adapter-{seed}", rank=4, seed=seed, target_modules=names)
            for seed in range(3)
        ]
        # PEFT writes them in any order.
        corrupt_config(paths[1], target_modules=names[::-1], base_model_name_or_path="elsewhere")
        found = []
        for path in (*paths, paths[0]):
            with checker.check(str(path)) as checked:
                assert (checked.path, checked.name) == (str(path), str(path))
                found.append((checked.layout, checked.pairs, checked.header))
        assert len(parsed) == 1
        with check(paths[2], targets=make_targets(), fused={}) as expected:
            assert found == [(expected.layout, expected.pairs, expected.header)] * 4

    def test_another_scaling_is_another_layout_of_the_same_header(self, checker, tmp_path):
        path = make_adapter(tmp_path / "adapter", rank=4, alpha=8)
        scalings = []
        for alpha in (8, 4, 8):
            corrupt_config(path, lora_alpha=alpha)
            with checker.check(str(path)) as checked:
                scalings.append(checked.layout.modules[0].scaling)
        assert scalings == [2.0, 1.0, 2.0]

    @pytest.mark.parametrize("kind", BAD_ADAPTERS)
    def test_bad_adapter_is_refused_where_it_was_good_before(self, kind, checker, tmp_path):
        path = make_adapter(tmp_path / "adapter", rank=4)
        checker.check(str(path)).close()
        BAD_ADAPTERS[kind].corrupt(path)
        messages = []
        for one in (checker, PeftChecker(make_targets(), AdapterLimits(64, torch.float32), {})):
            try:
                checked = one.check(str(path), name="tenant-7")
            except InvalidArgumentError as error:
                messages.append(str(error))
            else:  # Its numbers are wrong, which a check does not read.
                checked.close()
        assert len(set(messages)) <= 1
        assert len(messages) == (0 if kind in ("nan", "inf") else 2)

    def test_only_the_last_ones_are_remembered(self, checker, parsed, tmp_path):
        path = make_adapter(tmp_path / "adapter", rank=4)

        def num_parsed(alpha):
            corrupt_config(path, lora_alpha=alpha)
            before = len(parsed)
            checker.check(str(path)).close()
            return len(parsed) - before

        assert [num_parsed(alpha) for alpha in range(1, MAX_REMEMBERED + 1)] == [1] * MAX_REMEMBERED
        assert num_parsed(1) == 0
        assert num_parsed(MAX_REMEMBERED + 1) == 1
        # The first one was used again since, so the second one has made way.
        assert (num_parsed(1), num_parsed(2)) == (0, 1)

    def test_long_headers_are_not_remembered(self, checker, parsed, tmp_path, monkeypatch):
        path = make_adapter(tmp_path / "adapter", rank=4)
        monkeypatch.setattr(peft_adapter, "_MAX_REMEMBERED_HEADER_BYTES", 100)
        for _ in range(2):
            checker.check(str(path)).close()
        assert len(parsed) == 2
