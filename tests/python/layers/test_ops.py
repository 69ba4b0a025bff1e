"""The decoder's element-wise operations in torch, and the choice between torch and the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_serve.kernels.lora_delta import FEW_TOKENS
from lora_serve.layers import HeadNorms, KVLayer, RMSNorm, StepContext, ops
from lora_serve.layers.torch_ops import apply_rotary

PAGES, PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 5, 4, 6, 2, 16, 7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def signed(dtype: torch.dtype, *shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_with_a_residual_stores_the_sum_and_normalises_it(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, EPS, dtype=dtype, device=torch.device("cpu"))
    norm.weight.copy_(signed(dtype, 48, seed=1))
    x, residual = signed(dtype, TOKENS, 48, seed=2), signed(dtype, TOKENS, 48, seed=3)
    x_before, total = x.clone(), x + residual

    y = norm.forward(x, residual)

    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)
    assert torch.equal(y, norm.forward(total))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_queries_are_turned_and_keys_and_values_stored_at_their_slots(
    dtype: torch.dtype, has_norms: bool
) -> None:
    qkv = signed(dtype, TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM, seed=4)
    cos_sin = signed(torch.float32, 100, HEAD_DIM, seed=5)
    positions = torch.tensor([99, 0, 3, 3, 41, 7, 12])
    slots = torch.tensor([19, 0, 7, 3, 12, 13, 4])
    shape = (PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    pages = KVLayer(torch.full(shape, 7.0, dtype=dtype), torch.full(shape, 9.0, dtype=dtype))
    weights = signed(dtype, 2, HEAD_DIM, seed=6)
    norms = HeadNorms(weights[0], weights[1], EPS) if has_norms else None
    query, key, value = (
        part.view(TOKENS, -1, HEAD_DIM)
        for part in qkv.clone().split([n * HEAD_DIM for n in (HEADS, KV_HEADS, KV_HEADS)], dim=1)
    )
    if has_norms:
        query, key = ops.rms_norm(query, weights[0], EPS), ops.rms_norm(key, weights[1], EPS)
    cos, sin = cos_sin[positions].to(dtype)[:, None].chunk(2, dim=-1)

    turned = ops.norm_rotary_store(qkv, StepContext(positions, slots, None), cos_sin, pages, norms)

    assert torch.equal(turned, apply_rotary(query, cos, sin))
    for stored, new, rest in ((pages.k, apply_rotary(key, cos, sin), 7.0), (pages.v, value, 9.0)):
        flat = stored.flatten(0, 1)
        assert torch.equal(flat[slots], new)
        others = torch.ones(PAGES * PAGE_SIZE, dtype=torch.bool).index_fill_(0, slots, False)
        assert (flat[others] == rest).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_rounded_before_the_product(dtype: torch.dtype) -> None:
    gate_up = signed(dtype, TOKENS, 2 * 33, seed=7)

    y = ops.silu_mul(gate_up)

    assert torch.equal(y, F.silu(gate_up[:, :33]) * gate_up[:, 33:])
    assert y.is_contiguous()


def test_cuda_tensors_go_to_the_kernels_unless_torch_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*arguments: object) -> str:
        return "kernel"

    plain = ops._Ops(kernel, kernel, kernel, kernel, kernel)
    monkeypatch.setattr(ops, "_triton_ops", lambda: ops._TritonOps(plain, *5 * [kernel]))
    with FakeTensorMode():
        on_cuda, on_cpu = torch.empty(2, 8, device="cuda:0"), torch.empty(2, 8)
        weight = torch.empty(8)

        assert ops.rms_norm(on_cuda, weight, EPS) == "kernel"
        assert ops.lora_linear(on_cuda, weight, None, None, None) == "kernel"
        assert ops.lora_linear_into(on_cuda, on_cuda, weight, None, None, None) == "kernel"
        assert ops.rms_norm(on_cpu, weight, EPS).shape == (2, 8)
        with ops.torch_ops_only():
            assert ops.silu_mul(on_cuda).shape == (2, 4)
        assert ops.silu_mul(on_cuda) == "kernel"


@pytest.mark.parametrize(("num_tokens", "is_left"), [(FEW_TOKENS, False), (FEW_TOKENS + 1, True)])
def test_delta_is_left_to_the_next_kernel_from_so_many_tokens_on(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, is_left: bool
) -> None:
    added: list[object] = []
    plain = ops._Ops(*[lambda *_: "plain"] * 5)
    kernels = ops._TritonOps(
        plain,
        lambda *_: "rotary with delta",
        lambda *_: "silu with delta",
        lambda *_: "linear",
        lambda *_: "linear into",
        lambda y, delta: added.append((y, delta)),
    )
    monkeypatch.setattr(ops, "_triton_ops", lambda: kernels)
    delta = object()
    with FakeTensorMode():
        on_cuda = torch.empty(num_tokens, 8, device="cuda:0")
        found = [
            ops.silu_mul(on_cuda, delta),
            ops.norm_rotary_store(on_cuda, StepContext(*[on_cuda] * 3), on_cuda, on_cuda, None, delta),
        ]
        assert found == (["silu with delta", "rotary with delta"] if is_left else ["plain"] * 2)
        assert added == ([] if is_left else [(on_cuda, delta)] * 2)
        assert ops.silu_mul(on_cuda) == "plain"
        with ops.torch_ops_only():
            assert ops.silu_mul(on_cuda, delta).shape == (num_tokens, 4)
        assert len(added) == (1 if is_left else 3)


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_writes_where_it_is_told_what_it_gives_otherwise(has_bias: bool) -> None:
    x, weight = signed(torch.float32, TOKENS, 48, seed=1), signed(torch.float32, 20, 48, seed=2)
    bias = signed(torch.float32, 20, seed=3) if has_bias else None
    out = torch.full((TOKENS, 20), torch.nan)

    y = ops.linear(x, weight, bias, out)

    assert y.data_ptr() == out.data_ptr()
    assert torch.equal(y, ops.linear(x, weight, bias))
