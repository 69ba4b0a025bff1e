"""The grid that the LoRA kernels are tested on: its factors, steps made of them, and fp64 oracles.

The oracles of `kernels.reference` go token by token, which takes minutes for a step of the grid; those here
do all tokens of an adapter at once, on the device. `test_lora_grid.py` holds both against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernels.pairwise import choose_covering_cases
from lora_serve.kernels import LoRALayerTable, LoRAMetadata, LoRASliceWeights, build_lora_metadata
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.reference import ReferenceResult, unit_roundoff

RANKS = (1, 2, 3, 5, 8, 12, 16, 24, 48, 64, 100, 128, 256, 512)
MIXES = ("identical", "distinct", "uniform", "zipf", "skewed", "none", "only one", "all but one")
NAN = float("nan")

_CHOICES: Mapping[str, Sequence[Any]] = {
    "mix": MIXES,
    "is_interleaved": (True, False),
    "has_base_rows": (True, False),
    "offset_start": (0, 3),
    "spare_columns": (0, 5),  # of v, above the largest rank
}
# "dtypes": that of all tensors, and whether y is fp32 all the same, as logits are. They are one factor, so
# that each dtype has both outputs with any value of any other factor.
GPU_FACTORS: Mapping[str, Sequence[Any]] = {
    "num_tokens": (0, 1, 2, 7, 17, 32, 33, 129, 255, 512, 513, 1023, 2049, 4096),
    "rank": RANKS,
    "in_features": (1, 13, 64, 509, 1024, 4093, 4096),
    "output_slices": (
        (1,),
        (4099,),
        (64, 16),
        (1021, 256),
        (33, 2, 70),
        (4096, 1024, 512),
        (127, 8, 513, 1),
        (9, 1024, 2, 11, 307),
    ),
    "max_loras": (1, 2, 3, 8, 31, 128),
    "dtypes": tuple(product((torch.float16, torch.bfloat16), (False, True))),
    **_CHOICES,
}
CPU_FACTORS: Mapping[str, Sequence[Any]] = {
    "num_tokens": (0, 1, 2, 7, 11, 33),
    "rank": (1, 3, 16, 48, 100),
    "in_features": (1, 13, 64, 263),
    "output_slices": ((1,), (67,), (33, 16), (9, 2, 16), (9, 5, 2, 11, 1)),
    "max_loras": (1, 2, 3, 9, 31),
    "dtypes": ((torch.float16, False), (torch.float16, True), (torch.float32, False)),
    **_CHOICES,
}


def choose_grid_cases(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Give cases that cover the grid, then for each number of adapters a small step that has them all."""
    cases = choose_covering_cases(factors, can_have_adapter)
    typical = {name: values[len(values) // 2] for name, values in factors.items()}
    for max_loras in factors["max_loras"]:
        num_tokens = min(each for each in factors["num_tokens"] if each >= max_loras)
        step = {"num_tokens": num_tokens, "max_loras": max_loras, "mix": "distinct", "has_base_rows": False}
        cases.append({**typical, **step})
    return cases


def can_have_adapter(factors: Mapping[str, Any]) -> bool:
    """Whether a step of these factors, in part or whole, can have a row with an adapter of that rank."""
    mix, num_tokens = factors.get("mix"), factors.get("num_tokens")
    return mix != "none" and num_tokens != 0 and (mix, num_tokens) != ("all but one", 1)


@dataclass
class GridCase:
    """One step on one layer, on a device; the adapter that the mix prefers is in the last slot.

    That adapter has the named rank, in its first module at least, and the middle row, if any row has one.
    Rows of slot -1 are NaN in x, and NaN, -0.0 and numbers in y; columns of y around the slices are NaN.
    """

    x: Tensor
    y: Tensor
    table: LoRALayerTable
    mapping: Tensor
    metadata: LoRAMetadata
    max_rank: int
    offset_start: int


def make_grid_case(factors: Mapping[str, Any], device: str, seed: int = 0) -> GridCase:
    """Make a step of one value of each factor; `seed` decides all numbers."""
    on_host = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)
    (dtype, has_wide_output), in_features, rank = factors["dtypes"], factors["in_features"], factors["rank"]

    def signed(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=on_device, device=device) * scale).to(dtype)

    mapping, slots = make_mapping(factors, on_host)
    before, table, behind = (
        LoRALayerTable(widths, in_features) for widths in ((3,), factors["output_slices"], (5, 2))
    )
    installed = {}
    for index, slot in enumerate(slots[:-1]):
        if index < factors["max_loras"] and not bool((mapping == slot).any()):
            continue
        modules: list[LoRASliceWeights | None] = []
        has_largest = index in (0, factors["max_loras"])
        ranks = _ranks_of(table, rank, has_largest, on_host)
        for width, lora_rank in zip(table.output_slices, ranks, strict=True):
            a = signed(lora_rank, in_features, scale=in_features**-0.5)
            b = signed(lora_rank, width, scale=max(lora_rank, 1) ** -0.5)
            scaling = float(torch.rand(1, generator=on_host)) * 3 - 2.0
            modules.append(LoRASliceWeights(a, b, scaling) if lora_rank else None)
        installed[slot] = tuple(modules)
    install_weights({before: {}, table: installed, behind: {}}, num_slots=len(slots))

    num_tokens, offset_start = factors["num_tokens"], factors["offset_start"]
    x = signed(num_tokens, in_features)
    y = torch.full((num_tokens, table.out_features + 2 * offset_start), NAN, dtype=dtype, device=device)
    y[:, offset_start : offset_start + table.out_features] = signed(num_tokens, table.out_features)
    is_base = (mapping < 0).to(device)
    x[is_base] = NAN
    y[:, 1::5] = torch.where(is_base[:, None], -0.0, y[:, 1::5])
    y[:, 2::5] = torch.where(is_base[:, None], NAN, y[:, 2::5])
    return GridCase(
        x=x,
        y=y.float() if has_wide_output else y,
        table=table,
        mapping=mapping,
        metadata=build_lora_metadata(mapping, factors["max_loras"], device=torch.device(device)),
        max_rank=rank + factors["spare_columns"],
        offset_start=offset_start,
    )


def make_mapping(factors: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Give [T] int32, adapters drawn as the mix says from those that a step may have at once, and all slots.

    Slots are two more than those adapters, the preferred one's first; the last is empty, the one before it
    holds an adapter that is absent.
    """
    num_slots = factors["max_loras"] + 2
    slots = [num_slots - 1, *(torch.randperm(num_slots - 1, generator=generator).tolist())]
    num_tokens, num_adapters, mix = factors["num_tokens"], factors["max_loras"], factors["mix"]
    place, middle = torch.arange(num_tokens), num_tokens // 2
    weights = torch.ones(num_adapters)
    if mix in ("identical", "none", "only one"):
        weights[1:] = 0
    elif mix == "zipf":
        weights = 1 / torch.arange(1, num_adapters + 1)
    elif mix == "skewed":
        weights[1:] = 0.1 / max(num_adapters - 1, 1)
    if mix == "distinct":
        index = (place - middle) % num_adapters
    elif num_tokens:
        index = torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
        index[middle] = 0
    else:
        index = place
    mapping = torch.tensor(slots)[index].to(torch.int32)
    if mix == "none":
        mapping.fill_(-1)
    elif mix == "only one":
        mapping[place != middle] = -1
    elif mix == "all but one":
        mapping[:1] = -1
    elif factors["has_base_rows"]:
        mapping[(torch.rand(num_tokens, generator=generator) < 0.3) & (place != middle)] = -1
    return (mapping if factors["is_interleaved"] else mapping.sort().values), slots


def _ranks_of(table: LoRALayerTable, rank: int, has_largest: bool, generator: torch.Generator) -> list[int]:
    """Of an adapter's modules, 0 = none; `has_largest`: at least one has the largest rank."""
    smaller = [0, *(each for each in RANKS if each <= rank)]
    drawn = torch.randint(0, len(smaller), (table.num_slices,), generator=generator).tolist()
    ranks = [smaller[each] for each in drawn]
    return [rank, *ranks[1:]] if has_largest else ranks


def shrink_oracle(case: GridCase, dtype: torch.dtype) -> ReferenceResult:
    """What `lora_shrink_reference` gives, [S, T, R]."""
    shape = (case.table.num_slices, len(case.x), case.max_rank)
    value = torch.zeros(shape, dtype=torch.float64, device=case.x.device)
    bound = torch.zeros_like(value)
    accumulate = unit_roundoff(torch.promote_types(case.x.dtype, torch.float32))
    for rows, modules in _groups(case):
        x = case.x[rows].double()
        for s, module in enumerate(modules):
            if module is not None:
                columns = slice(module.lora_rank)
                a = module.a.double().t()
                value[s, rows, columns] = module.scaling * (x @ a)
                magnitude = abs(module.scaling) * (x.abs() @ a.abs())
                bound[s, rows, columns] = (case.x.shape[1] + 2) * accumulate * magnitude
    return ReferenceResult(value, _rounded(bound, value, dtype))


def expand_oracle(
    case: GridCase, v: Tensor, v_bound: Tensor | None = None, *, add_inputs: bool = True
) -> ReferenceResult:
    """What `lora_expand_reference` gives, [T, O]; `v_bound` [S, T, R] is how far v may be off."""
    value = case.y.double()
    bound = torch.zeros_like(value)
    accumulate = unit_roundoff(torch.promote_types(case.y.dtype, torch.float32))
    for rows, modules in _groups(case):
        start = case.offset_start
        for s, (module, width) in enumerate(zip(modules, case.table.output_slices, strict=True)):
            columns = slice(start, start + width)
            start += width
            before = value[rows, columns] if add_inputs else value.new_zeros(len(rows), width)
            if module is None:
                value[rows, columns] = before
                continue
            factor, b = v[s, rows, : module.lora_rank].double(), module.b.double()
            slack = torch.zeros_like(factor) if v_bound is None else v_bound[s, rows, : module.lora_rank]
            after = before + factor @ b
            magnitude = (factor.abs() + slack) @ b.abs() + before.abs()
            error = slack @ b.abs() + (module.lora_rank + 2) * accumulate * magnitude
            value[rows, columns] = after
            bound[rows, columns] = _rounded(error, after, case.y.dtype)
    return ReferenceResult(value, bound)


def _groups(case: GridCase) -> list[tuple[Tensor, tuple[LoRASliceWeights | None, ...]]]:
    """Rows of each adapter, and its modules; from the mapping alone."""
    groups = []
    for slot in sorted(set(case.mapping.tolist()) - {-1}):
        modules = case.table.get(slot)
        assert modules is not None
        rows = (case.mapping == slot).nonzero().flatten().to(case.x.device)
        groups.append((rows, modules))
    return groups


def _rounded(bound: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """As the oracles of `kernels.reference`: one rounding more wherever there is any error."""
    rounding = unit_roundoff(dtype) * (value.abs() + bound) + torch.finfo(dtype).tiny * unit_roundoff(dtype)
    return torch.where(bound > 0, bound + rounding, bound)
