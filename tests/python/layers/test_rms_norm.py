"""Root-mean-square norm against transformers', bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_serve.layers import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_equals_transformers_for_any_strides(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    norm, reference = RMSNorm(48, 1e-2, dtype=dtype, device=torch.device("cpu")), LlamaRMSNorm(48, 1e-2)
    norm.weight.copy_(torch.randn(48, generator=generator))
    reference.weight.data = norm.weight.detach().clone()
    x = (0.3 * torch.randn(5, 7, 48, generator=generator)).to(dtype)[:, 2:4]

    y = norm.forward(x)

    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(y, reference(x))
    assert norm.forward(torch.zeros_like(x)).abs().max() == 0
