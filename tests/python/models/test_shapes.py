"""Named model shapes: they are read back, and have as many parameters as the published models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.models import DecoderModel, read_model_config
from lora_serve.models.shapes import MODEL_SHAPES, write_model_shape

# From the model cards and the published checkpoints' indices.
PUBLISHED_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
}


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str, tmp_path: Path) -> None:
    config = read_model_config(write_model_shape(name, tmp_path / "model"))

    model = DecoderModel(config, device=torch.device("meta"))

    num_parameters = sum(tensor.numel() for tensor in model.checkpoint_tensors().values())
    assert num_parameters == PUBLISHED_PARAMETERS[name]
    assert config.dtype == torch.bfloat16
    assert config.eos_token_ids == ()
    assert set(config.layer_windows) == {None}


def test_an_unknown_shape_is_refused_with_the_names(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"'gpt9'.*expected one of qwen3-0.6b, .*mistral-7b"):
        write_model_shape("gpt9", tmp_path)
