from __future__ import annotations

import pytest

from .core_driver import CoreDriver


@pytest.fixture(params=[True, False], ids=["overlap", "in turn"])
def async_scheduling(request, monkeypatch):
    """Every CoreDriver of the test plans a step while the one before runs, or does not."""
    monkeypatch.setattr(CoreDriver, "async_scheduling", request.param)
    return request.param
