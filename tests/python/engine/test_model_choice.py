from __future__ import annotations

import logging

import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.engine import engine_core
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.model_choice import choose_device
from lora_serve.testing.models import make_random_model

NO_CUDA = "the device is cpu: torch finds no CUDA device"
CUDA = "the device is cuda: torch finds a CUDA device (--device cpu computes on the CPU)"


class MadeError(Exception):
    """Stands for the executor that a core would have made."""


@pytest.fixture(params=[True, False], ids=["card", "no card"])
def has_card(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return request.param


@pytest.mark.parametrize("asked", ["cpu", "cuda", "cuda:1", "meta"])
def test_a_named_device_is_taken_without_a_word(asked, has_card, caplog):
    with caplog.at_level(logging.INFO, logger="lora_serve"):
        assert choose_device(asked) == asked
    assert not caplog.records


def test_the_usual_device_is_a_card_where_torch_finds_one(has_card, caplog, monkeypatch):
    def make(config):
        raise MadeError(config.device)

    monkeypatch.setattr(engine_core, "make_model_executor", make)
    with caplog.at_level(logging.INFO, logger="lora_serve"), pytest.raises(MadeError) as made:
        EngineCore(EngineConfig(model="m"))
    assert str(made.value) == ("cuda" if has_card else "cpu")
    assert caplog.messages == [CUDA if has_card else NO_CUDA]


def test_the_core_knows_the_device_that_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_random_model(tmp_path, "Qwen3ForCausalLM")
    core = EngineCore(
        EngineConfig(model=str(tmp_path), num_device_pages=4, lora_memory_gb=2**-8, lora_host_memory_gb=2**-8)
    )
    core.close()
    assert (core.config.device, core.config.is_cuda) == ("cpu", False)


def test_a_card_that_is_asked_for_and_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidArgumentError, match="'cuda' but torch finds no CUDA device; use --device cpu"):
        EngineCore(EngineConfig(model="m", device="cuda"))
