"""Deltas that are still to be added, on a device, for the kernels that add them and go on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.device_cases import DEVICE_DTYPES
from kernels.lora_cases import LAST_SLOT, MAX_LORAS, LoRACase, make_case, signed
from kernels.triton_lora_cases import MIXED, NAN, columns_of, for_more_tokens
from lora_serve.kernels import LoRADelta, LoRALayerTable, LoRAMetadata, build_lora_metadata
from lora_serve.kernels.device_tables import DeviceLayerTable, DeviceTables

# The tiles of prefills, above 256 tokens, are only used with 16-bit types.
LARGE = 259
STEPS = [
    *(pytest.param(*each.values, 11, marks=each.marks) for each in DEVICE_DTYPES),
    *(
        pytest.param(*each.values, LARGE, marks=each.marks)
        for each in DEVICE_DTYPES
        if each.values[1] != torch.float32
    ),
]
"""Device, dtype and number of tokens: `MIXED`, or `random_mapping` of a prefill."""
BAD_SLOTS = ["empty slot", "slot beyond the tables", "rank above that of v"]


@dataclass
class DeltaCase:
    """A step on the CPU, for the oracle, and the same on a device.

    Where a kernel may not look, v on the device is NaN: rows of slot -1 and columns at or above the rank.
    """

    case: LoRACase
    v: Tensor
    y: Tensor
    delta: LoRADelta


def make_delta_case(
    mapping: list[int],
    ranks_of_slot: dict[int, tuple[int | None, ...]],
    output_slices: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    num_parts: int = 1,
    is_exact: bool = False,
    seed: int = 0,
) -> DeltaCase:
    """`is_exact`: small whole numbers in v and B, whose products have the same bits in any order."""
    case = make_case(
        mapping, ranks_of_slot, output_slices=output_slices, in_features=5, dtype=dtype, seed=seed
    )
    generator = torch.Generator().manual_seed(seed + 1)
    v_dtype = torch.float32 if num_parts > 1 else dtype
    shape = (num_parts, len(output_slices), len(mapping), max(case.max_rank, 1))
    parts = signed(generator, *shape)
    if is_exact:
        parts = (parts * 2).round()
        case.table.arena.copy_((case.table.arena.float() * 2).round() / 2)
    parts = parts.to(v_dtype)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return DeltaCase(
        case=case,
        v=total.to(dtype),
        y=case.y.to(device, copy=True),
        delta=LoRADelta(
            v=_hidden_where_not_written(case, parts).to(device),
            table=table_on_device(case.table, device),
            metadata=build_lora_metadata(case.mapping, MAX_LORAS, device=torch.device(device)),
        ),
    )


def _hidden_where_not_written(case: LoRACase, parts: Tensor) -> Tensor:
    """The parts with two columns to spare."""
    hidden = torch.full((*parts.shape[:3], parts.shape[3] + 2), NAN, dtype=parts.dtype)
    for t, slot in enumerate(case.mapping.tolist()):
        for s, module in enumerate(case.table.get(slot) or ()):
            rank = 0 if module is None else module.lora_rank
            hidden[:, s, t, :rank] = parts[:, s, t, :rank]
    return hidden


def table_on_device(table: LoRALayerTable, device: str) -> LoRALayerTable:
    """A copy of a layer's table, with a layer before and one behind it."""
    tables = DeviceTables([1, table.num_slices, 2], table.tables.rows.shape[0], device)
    for ours, theirs in zip(columns_of(tables.layers[1]), columns_of(table), strict=True):
        ours.copy_(theirs)
    copied = LoRALayerTable(table.output_slices, table.in_features)
    copied.bind(table.arena.to(device, copy=True), tables, 1)
    return copied


def make_bad(delta: LoRADelta, how: str) -> None:
    """Let no kernel find the adapter of the last slot."""
    table = delta.table
    if how == "empty slot":
        table.tables.rows[LAST_SLOT].copy_(table.tables.empty_row)
    elif how == "slot beyond the tables":
        # The rows behind them hold an adapter, which a kernel that does not look would take.
        shortened = DeviceLayerTable(*(column[:LAST_SLOT] for column in columns_of(table)))
        table.b_offset, table.lora_rank = shortened.b_offset, shortened.lora_rank
    else:
        table.lora_rank[LAST_SLOT] = delta.v.shape[-1] + 1
        for numbers in (
            table.arena,
            delta.v,
        ):  # It must not be what lies behind them that makes the rows NaN.
            numbers.nan_to_num_(nan=1.0)


def padded(delta: LoRADelta, num_padded: int) -> LoRADelta:
    """The same step with tokens behind it that are in no group, as a plan pads it, and NaN in their v."""
    old = delta.metadata
    num_tokens = old.num_tokens
    behind = torch.arange(num_tokens, num_tokens + num_padded, dtype=torch.int32, device=delta.v.device)
    metadata = LoRAMetadata(
        token_lora_mapping=torch.cat([old.token_lora_mapping, torch.full_like(behind, -1)]),
        token_indices_sorted_by_lora_ids=torch.cat([old.token_indices_sorted_by_lora_ids, behind]),
        num_tokens_per_lora=old.num_tokens_per_lora,
        lora_token_start_loc=old.lora_token_start_loc,
        active_lora_ids=old.active_lora_ids,
        lora_tiles=for_more_tokens(old.lora_tiles, num_tokens, num_tokens + num_padded),
        no_adapter=old.no_adapter,
    )
    num_parts, num_slices, _, max_rank = delta.v.shape
    rest = delta.v.new_full((num_parts, num_slices, num_padded, max_rank), NAN)
    return replace(delta, v=torch.cat([delta.v, rest], dim=2), metadata=metadata)


def mapping_of(num_tokens: int) -> list[int]:
    """Adapter slots of a step of `STEPS`."""
    return MIXED if num_tokens == len(MIXED) else random_mapping(num_tokens)


def random_mapping(num_tokens: int) -> list[int]:
    """Groups of random sizes, among them some that end in the middle of a tile of tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.tensor([-1, 0, 0, 1, 1, 1, 2, LAST_SLOT])
    return slots[torch.randint(0, 8, (num_tokens,), generator=generator)].tolist()
