from __future__ import annotations

import pytest
import torch

from .device_setup import DeviceSetup


@pytest.fixture
def setup(request):
    """A device and its copies; the test's body runs on the execution stream. See `on_devices`."""
    setup = DeviceSetup(request.param)
    if setup.execution is None:
        yield setup
    else:
        with torch.cuda.stream(setup.execution):
            yield setup
        torch.cuda.synchronize()
    setup.copies.close()
