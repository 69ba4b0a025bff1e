"""Random steps and tables for the tests of the LoRA operators, and how their results are checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.kernels import (
    LoRALayerTable,
    LoRALayerWeights,
    LoRAMetadata,
    LoRASliceWeights,
    build_lora_metadata,
)
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.reference import ReferenceResult, find_bound_violations

MAX_LORAS = 8
LAST_SLOT = 7
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@dataclass
class LoRACase:
    """One step on one packed layer; every number is signed and none is 0."""

    x: Tensor
    y: Tensor
    table: LoRALayerTable
    mapping: Tensor
    metadata: LoRAMetadata
    max_rank: int


def signed(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def random_weights(
    generator: torch.Generator,
    ranks: tuple[int | None, ...],
    table: LoRALayerTable,
    dtype: torch.dtype = torch.float32,
) -> LoRALayerWeights:
    weights: list[LoRASliceWeights | None] = []
    for rank, width in zip(ranks, table.output_slices, strict=True):
        if rank is None:
            weights.append(None)
            continue
        shape_a = (table.in_features, rank) if table.is_embedding else (rank, table.in_features)
        a = signed(generator, *shape_a, dtype=dtype)
        b = signed(generator, rank, width, dtype=dtype)
        scaling = float(torch.rand(1, generator=generator)) * 3 - 2.0
        weights.append(LoRASliceWeights(a, b, scaling))
    return tuple(weights)


def make_case(
    mapping: list[int],
    ranks_of_slot: dict[int, tuple[int | None, ...]],
    *,
    output_slices: tuple[int, ...] = (7, 5, 3),
    in_features: int = 13,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LoRACase:
    generator = torch.Generator().manual_seed(seed)
    table = LoRALayerTable(output_slices, in_features)
    install_weights(
        {
            table: {
                slot: random_weights(generator, ranks, table, dtype) for slot, ranks in ranks_of_slot.items()
            }
        }
    )
    tokens = torch.tensor(mapping, dtype=torch.int32)
    num_tokens = len(mapping)
    in_step = [ranks_of_slot[slot] for slot in set(mapping) if slot >= 0]
    return LoRACase(
        x=signed(generator, num_tokens, in_features, dtype=dtype),
        y=signed(generator, num_tokens, sum(output_slices), dtype=dtype),
        table=table,
        mapping=tokens,
        metadata=build_lora_metadata(tokens, MAX_LORAS),
        max_rank=max((rank for ranks in in_step for rank in ranks if rank is not None), default=0),
    )


def empty_slot(table: LoRALayerTable, slot: int) -> None:
    table.tables.rows[slot].copy_(table.tables.empty_row)


def has_same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal as bytes: tells -0.0 from 0.0 and lets NaN equal itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)))


def assert_within_bounds(actual: Tensor, expected: ReferenceResult) -> None:
    assert actual.shape == expected.value.shape
    violations = find_bound_violations(actual, expected)
    assert violations.numel() == 0, (
        f"{len(violations)} elements are off, the first at {violations[0].tolist()}"
    )
