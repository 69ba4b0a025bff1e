"""What the tests of whole grids of steps demand of shrink, expand, and both together."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.lora_cases import assert_within_bounds, has_same_bits
from kernels.lora_grid_cases import NAN, GridCase, expand_oracle, shrink_oracle
from lora_serve.kernels.reference import ReferenceResult
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import (
    lora_scratch_elements,
    make_shrunk,
    triton_add_lora_linear,
)
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink


def new_v(case: GridCase) -> Tensor:
    """NaN, in as many parts as a layer has them."""
    v = make_shrunk(case.x, case.table.num_slices, case.max_rank, dtype=case.y.dtype)
    assert v.dtype == (case.y.dtype if len(v) == 1 else torch.float32)
    return v.fill_(NAN)


def check_shrink(case: GridCase) -> None:
    """Complete v within the bounds, twice the same; without zeros, nothing else is written."""
    step = (case.x, case.table.arena, case.table, case.metadata)
    v, again, partial = (new_v(case) for _ in range(3))
    triton_lora_shrink(v, *step, fill_zeros=True)
    triton_lora_shrink(again, *step, fill_zeros=True)
    triton_lora_shrink(partial, *step)

    expected = shrink_oracle(case, v.dtype)
    assert_within_bounds(v.double().sum(0), expected)
    assert has_same_bits(v, again)
    written = (expected.bound > 0).expand(v.shape)
    assert has_same_bits(partial[written], v[written])
    assert partial[~written].isnan().all()


def check_expand(case: GridCase, *, add_inputs: bool) -> None:
    """Rows of slot -1 and columns around the slices keep their bits; nothing is read that is not written."""
    is_written = (shrink_oracle(case, torch.float32).bound > 0)[None]
    parts = new_v(case)
    generator = torch.Generator(case.x.device).manual_seed(len(case.x))
    numbers = torch.randn(parts.shape, generator=generator, device=case.x.device).to(parts.dtype)
    parts = torch.where(is_written, numbers, parts)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    y = case.y if add_inputs else torch.full_like(case.y, NAN)
    before = GridCase(**{**vars(case), "y": y})
    expected = expand_oracle(before, total.to(y.dtype), add_inputs=add_inputs)
    first, second = y.clone(), y.clone()

    for out in (first, second):
        triton_lora_expand(
            out,
            parts,
            case.table.arena,
            case.table,
            case.metadata,
            output_slices=case.table.output_slices,
            offset_start=case.offset_start,
            add_inputs=add_inputs,
        )

    check_output(first, y, expected)
    assert has_same_bits(first, second)


def check_linear(case: GridCase) -> None:
    """Both halves together, whatever the memory between them held before."""
    first, second = case.y.clone(), case.y.clone()
    sizes = (len(case.x), case.table.num_slices, case.x.shape[1], case.max_rank)
    scratch = torch.full((lora_scratch_elements(*sizes),), NAN, device=case.x.device)

    add_linear(case, first)
    add_linear(case, second, scratch)

    v = shrink_oracle(case, case.y.dtype)
    check_output(first, case.y, expand_oracle(case, v.value, v.bound))
    assert has_same_bits(first, second)


def add_linear(case: GridCase, y: Tensor, scratch: Tensor | None = None) -> None:
    triton_add_lora_linear(
        y,
        case.x,
        case.table.arena,
        case.table,
        case.metadata,
        output_slices=case.table.output_slices,
        max_rank=case.max_rank,
        scratch=scratch,
        offset_start=case.offset_start,
    )


def check_output(found: Tensor, before: Tensor, expected: ReferenceResult) -> None:
    assert_within_bounds(found, expected)
    untouched = (expected.bound == 0) & (expected.value.isnan() | (expected.value == before))
    assert has_same_bits(found[untouched], before[untouched])
