"""Rows and columns that lie more than 2**31 elements behind the first give what they give side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.lora_delta_cases import make_delta_case
from kernels.triton_lora_cases import (
    MIXED,
    MIXED_RANKS,
    OnDevice,
    assert_same_on_cpu,
    mixed_case,
    on_device,
)
from lora_serve.kernels.lora_silu_mul import lora_silu_mul
from lora_serve.kernels.silu_mul import silu_mul
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink

# What 32 bits cannot hold is the same on a GPU; there all of this memory would have to be there.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU")

BEYOND = 2**31
BEHIND = 3  # Rows: the last ones of `MIXED` with an adapter are among them.


def far(like: Tensor) -> Tensor:
    """A copy with rows so far apart that the last ones lie beyond 31 bits.

    In front there is as much memory as a distance that became negative would reach. Of all of it, some 10 GB,
    hardly a page is touched.
    """
    stride = BEYOND // (len(like) - BEHIND) + 8
    try:
        buffer = torch.empty(BEYOND + len(like) * stride, dtype=like.dtype)
    except RuntimeError as error:
        pytest.skip(f"this machine does not give more memory than is used: {error}")
    view = buffer.as_strided(like.shape, (stride, 1), BEYOND)
    return view.copy_(like)


def shrink(step: OnDevice, x: Tensor) -> Tensor:
    v = step.new_v()
    triton_lora_shrink(v, x, step.arena, step.table, step.metadata, fill_zeros=True)
    return v


def expand(step: OnDevice, y: Tensor) -> Tensor:
    shape = (1, len(step.output_slices), len(MIXED), step.max_rank)
    v = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    triton_lora_expand(y, v, step.arena, step.table, step.metadata, output_slices=step.output_slices)
    return y


def test_the_last_rows_lie_beyond_31_bits_and_have_adapters():
    view = far(torch.zeros(len(MIXED), 1, dtype=torch.float16))
    distances = [row * view.stride(0) for row, slot in enumerate(MIXED) if slot >= 0]
    assert view.stride(0) < BEYOND < distances[-2] < distances[-1]


def test_shrink_reads_rows_and_columns_beyond_31_bits():
    step = on_device(mixed_case(torch.float16, in_features=40), "cpu")
    expected = shrink(step, step.x)
    assert_same_on_cpu(shrink(step, far(step.x)), expected)
    assert_same_on_cpu(shrink(step, far(step.x.t()).t()), expected)


def test_expand_changes_rows_and_columns_beyond_31_bits():
    step = on_device(mixed_case(torch.float16), "cpu")
    expected = expand(step, step.y.clone())
    assert_same_on_cpu(expand(step, far(step.y)), expected)
    assert_same_on_cpu(expand(step, far(step.y.t()).t()), expected)


def test_silu_mul_reads_and_writes_rows_beyond_31_bits():
    ranks = {slot: each[:2] for slot, each in MIXED_RANKS.items()}
    step = make_delta_case(MIXED, ranks, (70, 70), torch.float16, "cpu")
    out = torch.zeros(len(MIXED), 70, dtype=torch.float16)
    expected = lora_silu_mul(step.y, step.delta)
    assert_same_on_cpu(lora_silu_mul(far(step.y), step.delta), expected)
    assert_same_on_cpu(lora_silu_mul(step.y, step.delta, far(out)), expected)
    expected = silu_mul(step.y)
    assert_same_on_cpu(silu_mul(far(step.y)), expected)
    assert_same_on_cpu(silu_mul(step.y, far(out)), expected)
