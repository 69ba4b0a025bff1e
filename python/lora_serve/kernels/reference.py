"""Obvious fp64 versions of the LoRA operators, and how far a correct implementation may be from them.

Only for tests and tuners: loops over tokens, no grouping, no regard for speed. They share nothing with the
implementations but the tables that they read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.kernels.lora_weights import LoRALayerTable


@dataclass(frozen=True)
class ReferenceResult:
    """An exact result and the error that a correct implementation stays within.

    Parameters
    ----------
    value
        float64.
    bound
        float64, the shape of ``value``: largest absolute error of each element. 0 where the element must be
        bit for bit what it was.
    """

    value: Tensor
    bound: Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding a number to this dtype: half the distance from 1 to the next one."""
    return torch.finfo(dtype).eps / 2


def lora_shrink_reference(
    x: Tensor,
    table: LoRALayerTable,
    token_lora_mapping: Tensor,
    max_rank: int,
    *,
    dtype: torch.dtype | None = None,
) -> ReferenceResult:
    """``v[s, t, r] = scaling * sum_h x[t, h] A[s][r, h]`` token by token, in fp64.

    Parameters
    ----------
    x
        [T, H], the dtype that the implementation is run in: it decides the bound.
    table
        Weights by adapter slot.
    token_lora_mapping
        [T] integers: adapter slot of each token; -1 = no adapter, its row is 0.
    max_rank
        R of the result; columns at or above an adapter's rank are 0.
    dtype
        Of the implementation's result. None = that of ``x``.

    Returns
    -------
    ReferenceResult
        [S, T, R]. The bound covers H products and additions in fp32 (fp64 for fp64 inputs), the scaling, and
        one rounding to ``dtype``.
    """
    num_tokens, in_features = x.shape
    value = torch.zeros(table.num_slices, num_tokens, max_rank, dtype=torch.float64)
    bound = torch.zeros_like(value)
    accumulate = unit_roundoff(torch.promote_types(x.dtype, torch.float32))
    for t, slot in enumerate(token_lora_mapping.tolist()):
        weights = table.get(slot) if slot >= 0 else None
        for s, module in enumerate(weights or ()):
            if module is None:
                continue
            row, matrix, rank = x[t].double(), module.a.double(), module.lora_rank
            value[s, t, :rank] = module.scaling * (matrix @ row)
            magnitude = abs(module.scaling) * (matrix.abs() @ row.abs())
            bound[s, t, :rank] = (in_features + 2) * accumulate * magnitude
    return ReferenceResult(value, _with_output_rounding(bound, value, dtype or x.dtype))


def lora_lookup_reference(
    token_ids: Tensor,
    table: LoRALayerTable,
    token_lora_mapping: Tensor,
    max_rank: int,
    *,
    dtype: torch.dtype,
) -> ReferenceResult:
    """``v[0, t, r] = scaling * A[token_ids[t], r]`` token by token, in fp64.

    Parameters
    ----------
    token_ids
        [T] integers in [0, V).
    table
        Weights by adapter slot, of an embedding.
    token_lora_mapping
        [T] integers: adapter slot of each token; -1 = no adapter, its row is 0.
    max_rank
        R of the result; columns at or above an adapter's rank are 0.
    dtype
        Of the implementation's result.

    Returns
    -------
    ReferenceResult
        [1, T, R]. The bound covers the scaling in fp32 (fp64 for fp64 weights) and one rounding to ``dtype``.
    """
    value = torch.zeros(1, len(token_ids), max_rank, dtype=torch.float64)
    bound = torch.zeros_like(value)
    for t, slot in enumerate(token_lora_mapping.tolist()):
        weights = table.get(slot) if slot >= 0 else None
        module = weights[0] if weights else None
        if module is None:
            continue
        row = value[0, t, : module.lora_rank]
        row.copy_(module.scaling * module.a[int(token_ids[t])].double())
        accumulate = unit_roundoff(torch.promote_types(module.a.dtype, torch.float32))
        bound[0, t, : module.lora_rank] = 2 * accumulate * row.abs()
    return ReferenceResult(value, _with_output_rounding(bound, value, dtype))


def lora_expand_reference(
    y: Tensor,
    v: Tensor,
    table: LoRALayerTable,
    token_lora_mapping: Tensor,
    *,
    offset_start: int = 0,
    add_inputs: bool = True,
) -> ReferenceResult:
    """``y[t, offset_s + o] (+)= sum_r v[s, t, r] B[s][r, o]`` token by token, in fp64; ``y`` is not changed.

    Parameters
    ----------
    y
        [T, O], the dtype that the implementation is run in: it decides the bound.
    v
        [S, T, R].
    table
        Weights by adapter slot.
    token_lora_mapping
        [T] integers: adapter slot of each token; -1 = no adapter, its row stays.
    offset_start
        Column of ``y`` where the first slice starts.
    add_inputs
        True: add to ``y``. False: overwrite, with 0 where the adapter has no module.

    Returns
    -------
    ReferenceResult
        [T, O]. The bound covers R products and additions in fp32 (fp64 for fp64), and one rounding to the
        dtype of ``y``; it is 0 where ``y`` must stay.
    """
    value = y.double().clone()
    bound = torch.zeros_like(value)
    accumulate = unit_roundoff(torch.promote_types(y.dtype, torch.float32))
    for t, slot in enumerate(token_lora_mapping.tolist()):
        weights = table.get(slot) if slot >= 0 else None
        start = offset_start
        for s, (module, width) in enumerate(zip(weights or (), table.output_slices, strict=False)):
            columns = slice(start, start + width)
            start += width
            before = value[t, columns] if add_inputs else torch.zeros(width, dtype=torch.float64)
            if module is None:
                value[t, columns] = before
                continue
            row, matrix = v[s, t, : module.lora_rank].double(), module.b.double()
            magnitude = row.abs() @ matrix.abs() + before.abs()
            after = before + row @ matrix
            value[t, columns] = after
            bound[t, columns] = _with_output_rounding(
                (module.lora_rank + 2) * accumulate * magnitude, after, y.dtype
            )
    return ReferenceResult(value, bound)


def find_bound_violations(actual: Tensor, expected: ReferenceResult) -> Tensor:
    """Indices of the elements that are further from the exact result than a correct one can be.

    Parameters
    ----------
    actual
        The implementation's result, any floating-point dtype.
    expected
        The reference's result of the same shape.

    Returns
    -------
    Tensor
        [num_violations, dimensions] int64; empty where all is well. NaN where a number is expected violates.
    """
    error = (actual.double() - expected.value).abs()
    is_within = (error <= expected.bound) | (actual.double().isnan() & expected.value.isnan())
    return (~is_within).nonzero()


def _with_output_rounding(bound: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Add one rounding of the result to ``dtype``, subnormal numbers included, where there is any error."""
    rounding = unit_roundoff(dtype) * (value.abs() + bound) + torch.finfo(dtype).tiny * unit_roundoff(dtype)
    return torch.where(bound > 0, bound + rounding, bound)
