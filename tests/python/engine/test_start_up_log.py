from __future__ import annotations

import asyncio
import logging
import re

import msgspec
import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.stage_log import log_stage
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.engine.engine_core import EngineCore
from lora_serve.testing.models import make_random_model
from support.tiny_checkpoint import write_byte_tokenizer

STAGE = re.compile(r"([\w -]+) ready in \d+\.\d s")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, "Qwen3ForCausalLM")
    write_byte_tokenizer(path)
    return str(path)


def config_of(model, device="cpu"):
    return EngineConfig(
        model=model,
        device=device,
        dtype="float32" if device == "cpu" else "bfloat16",
        num_device_pages=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        lora_memory_gb=2**-8,
        lora_host_memory_gb=2**-8,
    )


@pytest.mark.parametrize(
    ("device", "stages"),
    [
        ("cpu", ["model", "adapter memory", "KV pages"]),
        pytest.param("cuda", ["model", "adapter memory", "profiling run", "KV pages"], marks=pytest.mark.gpu),
    ],
)
def test_each_stage_of_the_start_is_logged_with_its_time(model, caplog, device, stages):
    with caplog.at_level(logging.INFO, logger="lora_serve"):
        EngineCore(config_of(model, device)).close()

    logged = [match[1] for record in caplog.records if (match := STAGE.fullmatch(record.getMessage()))]
    assert logged == stages


def test_the_engine_process_logs_its_own_stages_around_the_executors(model, capfd):
    lines = log_of_process(config_of(model), capfd)

    logged = [match[1].strip() for line in lines if (match := re.search(STAGE.pattern + "$", line))]
    assert logged == ["modules of the engine", "model", "adapter memory", "KV pages", "engine"]


def test_the_engine_process_chooses_the_device_and_its_client_asks_no_driver(model, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # Also where there is a card.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked in the client's process"))
    config = msgspec.structs.replace(config_of(model), device="auto")

    lines = log_of_process(config, capfd)

    assert [line.split("model_choice: ")[1] for line in lines if "device is" in line] == [
        "the device is cpu: torch finds no CUDA device"
    ]


def log_of_process(config, capfd):
    """The lines that an engine process prints from its start to its end."""

    async def start_and_close():
        client = AsyncEngineClient(config)
        await client.start()
        await client.close()

    asyncio.run(asyncio.wait_for(start_and_close(), 120))

    return capfd.readouterr().err.splitlines()


def test_a_stage_that_fails_is_not_called_ready(caplog):
    logger = logging.getLogger("lora_serve.test")

    with (
        caplog.at_level(logging.INFO, logger="lora_serve"),
        pytest.raises(ValueError, match="broken"),
        log_stage(logger, "model"),
    ):
        raise ValueError("broken")

    assert not caplog.records
