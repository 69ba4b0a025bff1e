"""Obvious versions of the kernels that add a LoRA delta and go on, and how far correct ones may be from them.

Only for tests and tuners. The expand in fp64 with its error in fp32, and then the intervals of
`reference_elementwise`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels.lora_weights import LoRALayerTable
from lora_serve.kernels.reference import ReferenceResult, lora_expand_reference
from lora_serve.kernels.reference_elementwise import Interval, norm_rotary_interval, silu_mul_interval


def _expanded(y: Tensor, v: Tensor, table: LoRALayerTable, mapping: Tensor) -> Interval:
    """``y + v B``, accumulated in fp32 and rounded once; exactly y where nothing is added."""
    result = lora_expand_reference(y.float(), v.float(), table, mapping)
    return Interval(result.value, result.value).widened(result.bound).rounded(y.dtype)


def lora_silu_mul_reference(
    gate_up: Tensor, v: Tensor, table: LoRALayerTable, token_lora_mapping: Tensor
) -> ReferenceResult:
    """``silu(gate) * up`` after the expand.

    Parameters
    ----------
    gate_up
        [T, 2 I] on the CPU, the dtype that the implementation is run in; slices (I, I).
    v
        [2, T, R] of the same dtype.
    table
        Weights by adapter slot.
    token_lora_mapping
        [T] integers: adapter slot of each token, of an adapter that is there; -1 = no adapter.

    Returns
    -------
    ReferenceResult
        [T, I].
    """
    x = _expanded(gate_up, v, table, token_lora_mapping)
    lows, highs = x.low.chunk(2, dim=-1), x.high.chunk(2, dim=-1)
    gate, up = (Interval(low, high) for low, high in zip(lows, highs, strict=True))
    return silu_mul_interval(gate, up, gate_up.dtype).result()


def lora_norm_rotary_reference(
    qkv: Tensor,
    v: Tensor,
    table: LoRALayerTable,
    token_lora_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[ReferenceResult, ReferenceResult, ReferenceResult]:
    """Queries, keys and values after the expand, queries and keys normed and rotated.

    Parameters
    ----------
    qkv
        [T, (Hq + 2 Hkv) * D] on the CPU, the dtype that the implementation is run in.
    v
        [3, T, R] of the same dtype.
    table
        Weights by adapter slot, slices (Hq * D, Hkv * D, Hkv * D).
    token_lora_mapping
        [T] integers: adapter slot of each token, of an adapter that is there; -1 = no adapter.
    positions, cos_sin, q_weight, k_weight, eps
        See `norm_rotary_store`; on the CPU.

    Returns
    -------
    tuple
        [T, Hq, D], [T, Hkv, D] and [T, Hkv, D].
    """
    x = _expanded(qkv, v, table, token_lora_mapping)
    head_dim, widths = cos_sin.shape[1], list(table.output_slices)
    parts = []
    for low, high in zip(
        torch.split(x.low, widths, dim=1),
        torch.split(x.high, widths, dim=1),
        strict=True,
    ):
        shape = (len(qkv), low.shape[1] // head_dim, head_dim)
        parts.append(Interval(low.reshape(shape), high.reshape(shape)))
    query, key = (
        norm_rotary_interval(part, qkv.dtype, positions, cos_sin, weight, eps)
        for part, weight in zip(parts[:2], (q_weight, k_weight), strict=True)
    )
    return query.result(), key.result(), parts[2].result()
