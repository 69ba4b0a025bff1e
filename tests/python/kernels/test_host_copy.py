"""Copies of a step's few kilobytes between pinned memory and the device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICES
from lora_serve.kernels.host_copy import copy_small


def pinned(device: str, values: torch.Tensor) -> torch.Tensor:
    return values.pin_memory() if device == "cuda" else values.clone()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 2500])
def test_copy_there_and_back_gives_every_element_and_touches_no_other(device, size):
    source = pinned(device, torch.arange(-7, size + 3, dtype=torch.int32))
    there = torch.full((size + 2,), 99, dtype=torch.int32, device=device)
    back = pinned(device, torch.full((size + 2,), 88, dtype=torch.int32))

    copy_small(there[1:-1], source[:size])
    copy_small(back[1:-1], there[1:-1])
    synchronize(device)

    assert there.tolist() == [99, *range(-7, size - 7), 99]
    assert back.tolist() == [88, *range(-7, size - 7), 88]


@pytest.mark.parametrize(
    ("destination", "source"),
    [
        (torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(6, dtype=torch.int32)[::2], torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)[::2]),
        (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32)),
    ],
)
def test_unlike_or_scattered_tensors_are_refused(destination, source):
    with pytest.raises(ValueError, match="expected two flat contiguous tensors alike"):
        copy_small(destination, source)
