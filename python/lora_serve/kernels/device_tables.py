"""Where each adapter slot's weights lie on the device: the tables that kernels read.

One row a slot, one buffer for all rows and layers: an adapter changes slots with one small copy, as a whole,
and neither the buffer nor the views ever move, so CUDA graphs may keep their addresses.

Layout of a row, M = number of slices of all layers::

    int64 a_offset[M] | int64 b_offset[M] | int32 lora_rank[M] | float32 scaling[M] | padding

Source: kernels that find weights through addresses of each adapter are S-LoRA's (Sheng et al., 2023).
Different here: offsets, ranks and scalings of all layers lie in one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

EMPTY_SLOT = -1
"""`lora_rank` of every slice of a slot that holds no adapter; 0 = its adapter has no module there."""

MAX_RANK = 512
"""The largest rank that kernels are built for."""

_ROW_ALIGNMENT = 128
_BYTES_PER_SLICE = 8 + 8 + 4 + 4


@dataclass(frozen=True)
class ModulePlace:
    """One module of an adapter: which slice it belongs to, and where it lies in the adapter's block.

    Parameters
    ----------
    layer, slice_index
        The packed layer's index in the tables, and the slice's in the layer.
    a_offset, b_offset
        Start of A and B in elements, from the block's start, >= 0.
    lora_rank
        R, >= 1.
    scaling
        Finite.
    """

    layer: int
    slice_index: int
    a_offset: int
    b_offset: int
    lora_rank: int
    scaling: float


@dataclass(frozen=True, eq=False)
class DeviceLayerTable:
    """What one packed layer's kernels read: strided views, L slots by S slices, of the tables' buffer.

    Parameters
    ----------
    a_offset, b_offset
        [L, S] int64: start of A and B in elements, from the arena's start.
    lora_rank
        [L, S] int32; 0 = no module, -1 = no adapter in the slot. In both cases the offsets mean nothing.
    scaling
        [L, S] float32.
    """

    a_offset: Tensor
    b_offset: Tensor
    lora_rank: Tensor
    scaling: Tensor


@dataclass(frozen=True, eq=False)
class HostRows:
    """Rows of some slots on the host: the slices of all layers side by side.

    Parameters
    ----------
    a_offset, b_offset
        [G, M] int64.
    lora_rank
        [G, M] int32.
    scaling
        [G, M] float32.
    """

    a_offset: npt.NDArray[np.int64]
    b_offset: npt.NDArray[np.int64]
    lora_rank: npt.NDArray[np.int32]
    scaling: npt.NDArray[np.float32]


class DeviceTables:
    """The rows of all adapter slots.

    Owns: the buffer. Rows are written from outside, each with one copy in order with the steps:
    ``copies.write_row(tables.rows[slot], row)``.
    Deliberately does not know: adapters, the arena, streams.

    Parameters
    ----------
    slices_of_layers
        S of each packed layer, >= 1.
    num_slots
        L, the number of adapter slots, >= 1. All are empty at first.
    device
        Of the buffer.
    max_rank
        The largest rank that a row may have, >= 1: kernels size what lies between their halves by it, because
        only the device knows the ranks of a step.

    Raises
    ------
    ValueError
        A number is below 1.
    """

    def __init__(
        self,
        slices_of_layers: Sequence[int],
        num_slots: int,
        device: torch.device | str,
        *,
        max_rank: int = MAX_RANK,
    ) -> None:
        if min(num_slots, max_rank) < 1 or not slices_of_layers or min(slices_of_layers) < 1:
            raise ValueError(
                f"device tables of {num_slots} slots, ranks up to {max_rank} and layers of "
                f"{list(slices_of_layers)} slices, expected at least one slot, one layer, one slice in each "
                "and rank 1"
            )
        self.max_rank = max_rank
        self.slices_of_layers = tuple(slices_of_layers)
        self.num_slices = sum(slices_of_layers)
        self.row_bytes = -(-self.num_slices * _BYTES_PER_SLICE // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        self._first_of_layer = [0, *accumulate(slices_of_layers)][:-1]
        self.empty_row = torch.zeros(self.row_bytes, dtype=torch.uint8)
        self._columns(self.empty_row).lora_rank.fill_(EMPTY_SLOT)
        self.rows = self.empty_row.repeat(num_slots, 1).to(device)
        """[L, row_bytes] uint8 on the device."""
        columns = self._columns(self.rows)
        self.layers = tuple(
            DeviceLayerTable(
                columns.a_offset[:, first : first + count],
                columns.b_offset[:, first : first + count],
                columns.lora_rank[:, first : first + count],
                columns.scaling[:, first : first + count],
            )
            for first, count in zip(self._first_of_layer, self.slices_of_layers, strict=True)
        )

    @property
    def used_slots(self) -> tuple[int, ...]:
        """Slots that hold an adapter, ascending; on an accelerator this waits for the device."""
        is_used = self._columns(self.rows).lora_rank[:, 0] != EMPTY_SLOT
        return tuple(is_used.nonzero().flatten().tolist())

    def read_rows(self, slots: npt.NDArray[np.int64]) -> HostRows:
        """What some rows hold, on the host; on an accelerator this waits for the device.

        Parameters
        ----------
        slots
            [G], each in [0, L).
        """
        columns = self._columns(self.rows[torch.from_numpy(slots)].cpu())
        return HostRows(
            columns.a_offset.numpy(),
            columns.b_offset.numpy(),
            columns.lora_rank.numpy(),
            columns.scaling.numpy(),
        )

    def slices_of(self, layer: int) -> slice:
        """Which columns of `HostRows` are a layer's."""
        first = self._first_of_layer[layer]
        return slice(first, first + self.slices_of_layers[layer])

    def make_row(self, modules: Iterable[ModulePlace]) -> Tensor:
        """An adapter's row as it would be with its block at the arena's start; see `row_at`.

        Parameters
        ----------
        modules
            In any order, at most one a slice; slices without one get rank 0.

        Returns
        -------
        Tensor
            [row_bytes] uint8 on the CPU.

        Raises
        ------
        ValueError
            A slice does not exist or is named twice, a rank is out of range, an offset is negative, a scaling
            is not finite.
        """
        row = torch.zeros(self.row_bytes, dtype=torch.uint8)
        columns = self._columns(row)
        # NumPy views: writing single elements of tensors takes ten times as long.
        a_offset, b_offset = columns.a_offset.numpy(), columns.b_offset.numpy()
        lora_rank, scaling = columns.lora_rank.numpy(), columns.scaling.numpy()
        for module in modules:
            index = self._index(module)
            if lora_rank[index] != 0:
                raise ValueError(f"{module}: its slice has a module already")
            a_offset[index], b_offset[index] = module.a_offset, module.b_offset
            lora_rank[index], scaling[index] = module.lora_rank, module.scaling
        return row

    def row_at(self, row: Tensor, block_offset: int) -> Tensor:
        """The row of an adapter whose block lies at `block_offset`, to be written to `rows`.

        Parameters
        ----------
        row
            As `make_row` gave it; stays as it is.
        block_offset
            Start of the block in elements from the arena's start, >= 0.

        Raises
        ------
        ValueError
            `block_offset` is negative.
        """
        if block_offset < 0:
            raise ValueError(f"block_offset is {block_offset}, expected 0 or above")
        placed = row.clone()
        columns = self._columns(placed)
        has_module = columns.lora_rank > 0
        columns.a_offset.add_(has_module, alpha=block_offset)
        columns.b_offset.add_(has_module, alpha=block_offset)
        return placed

    def _index(self, module: ModulePlace) -> int:
        layer, index = module.layer, module.slice_index
        if not 0 <= layer < len(self.slices_of_layers) or not 0 <= index < self.slices_of_layers[layer]:
            raise ValueError(f"{module}: the tables have no such slice; slices: {self.slices_of_layers}")
        if not 1 <= module.lora_rank <= self.max_rank or min(module.a_offset, module.b_offset) < 0:
            raise ValueError(f"{module}: expected a rank of 1 to {self.max_rank}, offsets of 0 or above")
        if not math.isfinite(module.scaling):
            raise ValueError(f"{module}: expected a finite scaling")
        return self._first_of_layer[layer] + index

    def _columns(self, rows: Tensor) -> DeviceLayerTable:
        """Views [..., M] of the parts of rows [..., row_bytes]."""
        count = self.num_slices
        long, short = rows.view(torch.int64), rows.view(torch.int32)
        return DeviceLayerTable(
            a_offset=long[..., :count],
            b_offset=long[..., count : 2 * count],
            lora_rank=short[..., 4 * count : 5 * count],
            scaling=rows.view(torch.float32)[..., 5 * count : 6 * count],
        )
