"""The element-wise operations of a decoder in plain torch: the CPU's, and the oracle of the CUDA kernels.

Rounding is that of transformers, bit for bit: products of 16-bit numbers are rounded one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_serve.layers.attention import KVLayer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis; see :func:`lora_serve.layers.ops.rms_norm`."""
    wide = x.float()
    mean_square = wide.square().mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add to the residual and normalise the sum; see :func:`lora_serve.layers.ops.add_rms_norm`."""
    return rms_norm(residual.add_(x), weight, eps)


def norm_rotary_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    kv_layer: KVLayer,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Turn queries and keys, store keys and values; see :func:`lora_serve.layers.ops.norm_rotary_store`."""
    num_kv_heads, head_dim = kv_layer.k.shape[-2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_weight is not None:
        query = rms_norm(query, q_weight, eps)
    if k_weight is not None:
        key = rms_norm(key, k_weight, eps)
    cos, sin = cos_sin.index_select(0, positions).to(qkv.dtype)[:, None].chunk(2, dim=-1)
    kv_layer.write(apply_rotary(key, cos, sin), value, slot_mapping)
    return apply_rotary(query, cos, sin)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head of each token; plane i holds the features i and i + D/2.

    Parameters
    ----------
    x
        [T, heads, D], any strides; not changed.
    cos, sin
        [T, 1, D/2] of the dtype of ``x``.

    Returns
    -------
    Tensor
        [T, heads, D], contiguous, the dtype of ``x``.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Gate the second half by the first; see :func:`lora_serve.layers.ops.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Multiply by a weight; see :func:`lora_serve.layers.ops.linear`."""
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
