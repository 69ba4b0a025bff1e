from __future__ import annotations

import dataclasses

import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.executor.kv_tensors import (
    allocate_host_block,
    allocate_kv_layers,
    choose_max_model_len,
    choose_num_device_pages,
    choose_num_host_pages,
    page_num_bytes,
)
from lora_serve.models.config import ModelConfig
from lora_serve.testing.models import make_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelConfig:
    path = tmp_path_factory.mktemp("model")
    config = make_random_model(path, "Qwen3ForCausalLM", num_layers=3, max_position_embeddings=100)
    return dataclasses.replace(config, dtype=torch.bfloat16)


def _config(**fields) -> EngineConfig:
    return EngineConfig(model="unused", max_num_seqs=1, **fields)


def test_kv_layers_have_the_bytes_of_their_pages(model):
    layers = allocate_kv_layers(model, 5, 16, torch.device("cpu"))

    assert len(layers) == 3
    for layer in layers:
        assert layer.k.shape == layer.v.shape == (5, 16, 2, 64)
        assert layer.k.dtype == layer.v.dtype == torch.bfloat16
        assert layer.k.data_ptr() != layer.v.data_ptr()
    assert sum(layer.k.nbytes + layer.v.nbytes for layer in layers) == 5 * page_num_bytes(model, 16)


def test_pages_are_as_many_as_the_memory_holds(model):
    page_gb = page_num_bytes(model, 16) / 2**30

    assert choose_num_device_pages(_config(kv_memory_gb=page_gb * 7.99), model) == 7
    assert choose_num_device_pages(_config(kv_memory_gb=page_gb * 7.99, num_device_pages=3), model) == 3
    with pytest.raises(InvalidArgumentError, match="raise --kv-memory-gb"):
        choose_num_device_pages(_config(kv_memory_gb=page_gb * 0.9), model)


def test_host_pages_are_as_many_as_the_host_memory_holds(model):
    page_gb = page_num_bytes(model, 16) / 2**30

    assert choose_num_host_pages(_config(), model) == 0
    assert choose_num_host_pages(_config(kv_host_memory_gb=page_gb * 7.99), model) == 7
    assert choose_num_host_pages(_config(kv_host_memory_gb=page_gb * 7.99, num_device_pages=3), model) == 7
    with pytest.raises(InvalidArgumentError, match=r"kv_host_memory_gb is .* raise --kv-host-memory-gb"):
        choose_num_host_pages(_config(kv_host_memory_gb=page_gb * 0.9), model)


def test_host_block_is_one_piece_with_the_bytes_of_its_pages(model):
    block = allocate_host_block(model, 5, 16)

    assert block.shape == (5, 3, 2, 16, 2, 64)
    assert block.dtype == torch.bfloat16
    assert block.is_contiguous()
    assert block.nbytes == 5 * page_num_bytes(model, 16)
    assert allocate_host_block(model, 0, 16).nbytes == 0


def test_host_memory_that_the_machine_lacks_is_refused_with_the_option(model):
    with pytest.raises(InvalidArgumentError, match=r"1000000000000000 KV pages .* lower --kv-host-memory-gb"):
        allocate_host_block(model, 10**15, 16)


@pytest.mark.parametrize(
    ("asked", "num_pages", "expected"),
    [(None, 10, 100), (None, 3, 48), (50, 10, 50), (100, 7, 100), (48, 3, 48)],
)
def test_max_model_len_fits_the_model_and_the_pages(model, asked, num_pages, expected):
    assert choose_max_model_len(_config(max_model_len=asked), model, num_pages) == expected


@pytest.mark.parametrize(
    ("asked", "num_pages", "message"),
    [
        (101, 10, r"max_model_len is 101 .* at most 100 tokens"),
        (49, 3, r"max_model_len is 49 .* 3 KV pages of 16 tokens hold 48"),
    ],
)
def test_max_model_len_that_does_not_fit_is_refused(model, asked, num_pages, message):
    with pytest.raises(InvalidArgumentError, match=message):
        choose_max_model_len(_config(max_model_len=asked), model, num_pages)


def test_pages_too_few_for_any_request_are_refused(model):
    with pytest.raises(InvalidArgumentError, match="at least 2"):
        choose_max_model_len(_config(page_size=1), model, 1)
