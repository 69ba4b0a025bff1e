"""Where the tests of Triton kernels run: in the interpreter on the CPU, or on a GPU, with the same bodies."""

from __future__ import annotations

import pytest
import torch

# A machine with a GPU compiles kernels, and compiled kernels cannot read the CPU's memory.
_ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU")

DEVICES = [pytest.param("cpu", marks=_ON_CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
# The interpreter takes bfloat16 wrongly in places: it is tested on a GPU.
DEVICE_DTYPES = [
    pytest.param("cpu", torch.float32, marks=_ON_CPU),
    pytest.param("cpu", torch.float16, marks=_ON_CPU),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


def signed(device: str, dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Random numbers of both signs, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def int32(device: str, values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
