"""Steps for the tests of the Triton LoRA kernels: on the CPU for the oracle, and copied to a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lora_cases import LAST_SLOT, MAX_LORAS, LoRACase, has_same_bits, make_case
from lora_serve.kernels import LoRALayerTable, LoRAMetadata, build_lora_metadata
from lora_serve.kernels.device_tables import DeviceLayerTable, DeviceTables
from lora_serve.kernels.lora_tiles import num_tile_entries

NAN = float("nan")
RANKS = [1, 3, 8, 12, 16, 64, 100, 128]

# Interleaved adapters of unequal ranks, modules missing on some slices, one adapter without any, base tokens
# between, the last slot in use, and slot 2 installed but absent from the step.
MIXED_RANKS: dict[int, tuple[int | None, ...]] = {
    0: (3, None, 5),
    1: (None, 1, 33),
    2: (8, 8, 8),
    4: (None, None, None),
    LAST_SLOT: (8, 40, 1),
}
MIXED = [LAST_SLOT, -1, 0, 1, -1, 0, LAST_SLOT, 4, 1, 0, -1]


@dataclass
class OnDevice:
    """What a kernel is given; `max_rank` is above all ranks of the step, so that v has columns to spare."""

    x: Tensor
    y: Tensor
    arena: Tensor
    tables: DeviceTables
    metadata: LoRAMetadata
    output_slices: tuple[int, ...]
    max_rank: int

    @property
    def table(self) -> DeviceLayerTable:
        return self.tables.layers[0]

    def new_v(self, num_parts: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (num_parts, len(self.output_slices), len(self.x), self.max_rank)
        return torch.full(shape, NAN, dtype=dtype, device=self.x.device)

    def v_of(self, v: Tensor) -> Tensor:
        """v [S, T, R] of the oracle as one part, NaN in the columns that it lacks."""
        padded = torch.full((1, *v.shape[:2], self.max_rank), NAN, dtype=v.dtype)
        padded[0, :, :, : v.shape[2]] = v
        return padded.to(self.x.device)


def tables_on_device(table: LoRALayerTable, device: str) -> tuple[Tensor, DeviceTables]:
    """Arena and tables of a layer, copied to a device with a layer before and one behind it."""
    tables = DeviceTables([1, table.num_slices, 2], table.tables.rows.shape[0], device)
    for slot in range(table.tables.rows.shape[0]):
        for ours, theirs in zip(columns_of(tables.layers[1]), columns_of(table), strict=True):
            ours[slot].copy_(theirs[slot])
    tables.layers = (tables.layers[1],)
    return table.arena.to(device, copy=True), tables


def columns_of(table: LoRALayerTable | DeviceLayerTable) -> tuple[Tensor, ...]:
    return (table.a_offset, table.b_offset, table.lora_rank, table.scaling)


def on_device(case: LoRACase, device: str, max_rank: int | None = None) -> OnDevice:
    arena, tables = tables_on_device(case.table, device)
    return OnDevice(
        x=case.x.to(device, copy=True),
        y=case.y.to(device, copy=True),
        arena=arena,
        tables=tables,
        metadata=build_lora_metadata(case.mapping, MAX_LORAS, device=torch.device(device)),
        output_slices=case.table.output_slices,
        max_rank=case.max_rank + 2 if max_rank is None else max_rank,
    )


def mixed_case(dtype: torch.dtype = torch.float32, **options: int) -> LoRACase:
    return make_case(MIXED, MIXED_RANKS, dtype=dtype, output_slices=(35, 16, 70), **options)


def rank_case(rank: int, dtype: torch.dtype) -> LoRACase:
    """Two slices, of which the second is a little above a tile."""
    ranks: dict[int, tuple[int | None, ...]] = {0: (rank, rank), LAST_SLOT: (None, rank)}
    mapping = [LAST_SLOT, -1, 0, 0, LAST_SLOT]
    return make_case(mapping, ranks, output_slices=(9, 67), in_features=37, dtype=dtype, seed=rank)


def random_case(num_tokens: int, dtype: torch.dtype, **options: int) -> LoRACase:
    """Groups of random sizes, among them some that end in the middle of a tile of tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.tensor([-1, 0, 0, 1, 1, 1, 2, LAST_SLOT])
    mapping = slots[torch.randint(0, 8, (num_tokens,), generator=generator)].tolist()
    ranks: dict[int, tuple[int | None, ...]] = {0: (5,), 1: (16,), 2: (None,), LAST_SLOT: (20,)}
    return make_case(mapping, ranks, output_slices=(21,), dtype=dtype, **options)


def assert_same_on_cpu(left: Tensor, right: Tensor) -> None:
    assert has_same_bits(left.cpu(), right.cpu())


def for_more_tokens(lora_tiles: Tensor, num_tokens: int, num_padded: int) -> Tensor:
    """As long as the tiles of a step of so many tokens are."""
    num_new = num_tile_entries(num_padded, 0) - num_tile_entries(num_tokens, 0)
    return F.pad(lora_tiles, (0, 0, 0, num_new))
