from __future__ import annotations

import dataclasses

import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.executor.host_pages import HostPages
from lora_serve.executor.kv_tensors import (
    allocate_kv_pool,
    choose_max_model_len,
    choose_num_device_pages,
    choose_num_host_pages,
    kv_layers_of,
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


def test_kv_layers_are_the_pages_of_one_pool(model):
    pool = allocate_kv_pool(model, 5, 16, torch.device("cpu"))
    layers = kv_layers_of(pool)

    assert pool.shape == (5, 3, 2, 16, 2, 64)
    assert (pool.dtype, pool.nbytes) == (torch.bfloat16, 5 * page_num_bytes(model, 16))
    assert pool.is_contiguous()
    assert not bool(pool.any())
    assert len(layers) == 3
    for index, layer in enumerate(layers):
        assert layer.k.shape == layer.v.shape == (5, 16, 2, 64)
        layer.k.fill_(2 * index + 1)
        layer.v.fill_(2 * index + 2)
    assert bool((pool == torch.arange(1, 7).view(3, 2, 1, 1, 1)).all())


def test_kv_memory_that_the_device_lacks_is_refused_with_the_options(model):
    with pytest.raises(InvalidArgumentError, match=r"1000000000000000 KV pages .* lower --num-device-pages"):
        allocate_kv_pool(model, 10**15, 16, torch.device("cpu"))


def test_pages_are_as_many_as_the_memory_holds(model):
    page_gb = page_num_bytes(model, 16) / 2**30

    assert choose_num_device_pages(_config(kv_memory_gb=page_gb * 7.99), model) == 7
    assert choose_num_device_pages(_config(kv_memory_gb=page_gb * 7.99, num_device_pages=3), model) == 3
    with pytest.raises(InvalidArgumentError, match="raise --kv-memory-gb"):
        choose_num_device_pages(_config(kv_memory_gb=page_gb * 0.9), model)


def test_without_a_number_a_gib_is_taken_on_the_cpu(model):
    assert choose_num_device_pages(_config(), model) == 2**30 // page_num_bytes(model, 16)


def test_pages_fill_what_a_cuda_device_has_left(model):
    page = page_num_bytes(model, 16)

    assert choose_num_device_pages(_config(), model, 7 * page + page // 2) == 7
    assert choose_num_device_pages(_config(), model, page) == 1
    assert choose_num_device_pages(_config(kv_memory_gb=3.5 * page / 2**30), model, 7 * page) == 3
    assert choose_num_device_pages(_config(num_device_pages=5), model, 7 * page) == 5


@pytest.mark.parametrize(
    ("num_pages", "message"),
    [
        (0.9, r"is 0\.9, which leaves 0\.000 GiB, but one page .* raise --gpu-memory-utilization, or lower"),
        (-1e6, r"is 0\.9, which is exceeded, beside KV pages, by \d+\.\d+ GiB, but"),
    ],
)
def test_cuda_device_without_room_for_a_page_is_refused_with_the_options(model, num_pages, message):
    with pytest.raises(InvalidArgumentError, match=message):
        choose_num_device_pages(_config(), model, int(num_pages * page_num_bytes(model, 16)))


def test_host_pages_are_as_many_as_the_host_memory_holds(model):
    page_gb = page_num_bytes(model, 16) / 2**30

    assert choose_num_host_pages(_config(), model) == 0
    assert choose_num_host_pages(_config(kv_host_memory_gb=page_gb * 7.99), model) == 7
    assert choose_num_host_pages(_config(kv_host_memory_gb=page_gb * 7.99, num_device_pages=3), model) == 7
    with pytest.raises(InvalidArgumentError, match=r"kv_host_memory_gb is .* raise --kv-host-memory-gb"):
        choose_num_host_pages(_config(kv_host_memory_gb=page_gb * 0.9), model)


def test_host_tier_is_one_zeroed_piece_with_the_bytes_of_its_pages(model):
    pool = allocate_kv_pool(model, 2, 16, torch.device("cpu"))
    host_pages = HostPages(5, pool)

    assert host_pages.block.shape == (5, 3, 2, 16, 2, 64)
    assert host_pages.block.dtype == torch.bfloat16
    assert host_pages.block.is_contiguous()
    assert host_pages.block.nbytes == 5 * page_num_bytes(model, 16)
    assert not bool(host_pages.block.any())
    host_pages.close()
    assert host_pages.num_pages == HostPages(0, pool).num_pages == 0


def test_host_memory_that_the_machine_lacks_is_refused_with_the_option(model):
    pool = allocate_kv_pool(model, 2, 16, torch.device("cpu"))

    with pytest.raises(InvalidArgumentError, match=r"memory for KV pages .* lower --kv-host-memory-gb"):
        HostPages(10**12, pool)


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
