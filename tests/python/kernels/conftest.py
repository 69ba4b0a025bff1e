"""Fixtures of the operators' tests."""

from __future__ import annotations

import pytest

from lora_serve.kernels import torch_lora


@pytest.fixture(params=["batched", "each"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the torch implementation, whatever the sizes."""
    cost = 10**15 if request.param == "batched" else -(10**15)
    monkeypatch.setattr(torch_lora, "_MODULE_COST", cost)
