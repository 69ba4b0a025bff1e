from __future__ import annotations

import pytest
import torch

from lora_serve.cli.bench.options import ModelChoice, make_config

MODEL = ModelChoice(name="m", path="m", load_format="dummy")


@pytest.mark.parametrize("has_card", [True, False])
@pytest.mark.parametrize("given", [{}, {"device": "auto"}], ids=["not said", "auto"])
def test_the_bench_measures_where_a_server_would_compute(given, has_card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_card)
    config = make_config(
        MODEL,
        given,
        max_num_batched_tokens=8192,
        lora_rank=16,
        device_adapter_bytes=0,
        host_adapter_bytes=0,
        num_device_adapters=0,
    )
    assert (config.device, config.max_num_batched_tokens) == (("cuda", 8192) if has_card else ("cpu", 2048))
