"""The LoRA operators in torch: what runs on a CPU.

A decode step has few tokens of many adapters, so that calling torch costs far more than what it computes:
there, all A of the adapters present are gathered from the arena by one call, padded to the largest rank among
them, and one batched product over groups of equal size does the rest; the same for each slice's B. The number
of calls does not depend on the number of adapters. Where padding costs more than the calls that it saves (one
large rank beside small ones on a wide layer), each module gets a product of its own.

Padding reads a row of the same module again, never another adapter's, and what it gives is cut off or
multiplied by 0. Slices without a module read what is at the arena's start and are overwritten.

Between the halves, tokens are in the padded order of `LoRAGroups` where the layer is batched, else in its
sorted order: "rows" below means either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lora_serve.kernels.device_tables import EMPTY_SLOT, DeviceTables, HostRows
from lora_serve.kernels.lora_metadata import LoRAGroups, LoRAMetadata
from lora_serve.kernels.lora_weights import LoRALayerTable

# Costs in the time of one multiplication and addition of a large product, which is about 0.03 ns on a core
# with AVX2: reading a number for a product, gathering it before, and the handful of calls for one module.
_READ_COST = 4
_GATHER_COST = 4
_MODULE_COST = 600_000


def add_linear(y: Tensor, x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
    """See `add_lora_linear`; `add_lora_logits` is the same with wider ``y``."""
    layer = _LayerStep.of(table, metadata)
    if layer.max_rank:
        v = _shrink_rows(x.index_select(0, layer.rows), layer, y.dtype)
        _add(y[:, : table.out_features], _expand_rows(v, layer), layer)


def add_embedding(y: Tensor, token_ids: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
    """See `add_lora_embedding`."""
    layer = _LayerStep.of(table, metadata)
    if layer.max_rank:
        v = _look_up_rows(token_ids.index_select(0, layer.rows), layer, y.dtype)
        _add(y[:, : table.out_features], _expand_rows(v, layer), layer)


def shrink(x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata, dtype: torch.dtype) -> Tensor:
    """See `lora_shrink`."""
    layer = _LayerStep.of(table, metadata)
    v = x.new_zeros((x.shape[0], table.num_slices, layer.max_rank), dtype=dtype)
    if layer.max_rank:
        own = _shrink_rows(x.index_select(0, layer.rows), layer, dtype)
        v.index_copy_(0, layer.groups.tokens, layer.sort(own))
    return v.transpose(0, 1)


def look_up(token_ids: Tensor, table: LoRALayerTable, metadata: LoRAMetadata, dtype: torch.dtype) -> Tensor:
    """See `lora_lookup`."""
    layer = _LayerStep.of(table, metadata)
    v = torch.zeros((token_ids.shape[0], 1, layer.max_rank), dtype=dtype, device=token_ids.device)
    if layer.max_rank:
        own = _look_up_rows(token_ids.index_select(0, layer.rows), layer, dtype)
        v.index_copy_(0, layer.groups.tokens, layer.sort(own))
    return v.transpose(0, 1)


def expand(
    y: Tensor,
    v: Tensor,
    table: LoRALayerTable,
    metadata: LoRAMetadata,
    offset_start: int,
    add_inputs: bool,
) -> None:
    """See `lora_expand`."""
    layer = _LayerStep.of(table, metadata)
    if layer.max_rank > v.shape[2]:
        raise ValueError(
            f"v has {v.shape[2]} columns of rank, the largest rank of the step is {layer.max_rank}: v must "
            "come from lora_shrink with the same table and metadata"
        )
    columns = y[:, offset_start : offset_start + table.out_features]
    if layer.max_rank == 0:
        if not add_inputs:
            columns.index_fill_(0, layer.groups.tokens, 0)
        return
    delta = _expand_rows(v[:, :, : layer.max_rank].transpose(0, 1).index_select(0, layer.rows), layer)
    if add_inputs:
        _add(columns, delta, layer)
    else:
        columns.index_copy_(0, layer.groups.tokens, layer.sort(delta).to(y.dtype))


def _add(y: Tensor, delta: Tensor, layer: _LayerStep) -> None:
    tokens = layer.groups.tokens
    y.index_copy_(0, tokens, layer.sort(delta).add_(y.index_select(0, tokens)).to(y.dtype))


class _StepTables:
    """What a step's adapters have in some tables, for all layers at once: G groups, M slices of all layers.

    Made once a step, because on small layers the many small calls cost more than the products.
    """

    def __init__(self, tables: DeviceTables, groups: LoRAGroups) -> None:
        rows = _read_rows(tables, groups)
        lora_rank, device = rows.lora_rank, tables.rows.device
        first_of_layer = [0, *accumulate(tables.slices_of_layers)][:-1]
        self.rows = rows
        self.max_ranks: list[int] = np.maximum.reduceat(
            lora_rank.max(axis=0, initial=0), first_of_layer
        ).tolist()
        self.min_ranks: list[int] = np.minimum.reduceat(
            lora_rank.min(axis=0, initial=np.iinfo(np.int32).max), first_of_layer
        ).tolist()
        self.num_modules: list[int] = np.count_nonzero(lora_rank, axis=0).tolist()  # of each slice
        column = np.arange(max(self.max_ranks))
        is_padding = column >= lora_rank[:, :, None]
        self.row = np.where(is_padding, 0, column)  # [G, M, R]: r, or 0 where the module has no such row
        self.is_padding = torch.from_numpy(is_padding[:, None]).to(device)
        self.scaling = torch.from_numpy(rows.scaling[:, None, :, None]).to(device)


def _read_rows(tables: DeviceTables, groups: LoRAGroups) -> HostRows:
    known = np.minimum(groups.slots, len(tables.rows) - 1)
    rows = tables.read_rows(known)
    is_missing = (rows.lora_rank[:, 0] == EMPTY_SLOT) | (groups.slots != known)
    if is_missing.any():
        slot = groups.slots[is_missing.argmax()]
        # Going on without the adapter would answer with the base model in its name.
        raise LookupError(
            f"adapter slot {slot} holds no adapter but {groups.counts[groups.slots == slot].sum()} tokens of "
            f"this step name it; installed slots are {tables.used_slots}"
        )
    return rows


@dataclass(frozen=True, eq=False)
class _LayerStep:
    """A layer in a step.

    Parameters
    ----------
    columns
        The layer's S slices among those of all layers.
    max_rank
        R, the largest rank on this layer; 0 where no adapter of the step has a module.
    is_batched
        Whether one padded product costs less than one for each module.
    """

    table: LoRALayerTable
    groups: LoRAGroups
    step: _StepTables
    columns: slice
    max_rank: int
    is_batched: bool

    @staticmethod
    def of(table: LoRALayerTable, metadata: LoRAMetadata) -> _LayerStep:
        """Raise ``LookupError`` where a token names an adapter slot that holds no adapter."""
        groups = metadata.groups
        columns = table.tables.slices_of(table.layer)
        step = metadata.of_tables.get(table.tables)
        if step is None:
            step = metadata.of_tables[table.tables] = _StepTables(table.tables, groups)
        max_rank = step.max_ranks[table.layer]
        width = table.num_slices * table.in_features + table.out_features
        padded = (groups.max_count + _READ_COST + _GATHER_COST) * len(groups.slots) * max_rank * width
        calls = _MODULE_COST * sum(step.num_modules[columns])
        is_batched = padded < calls
        if not is_batched:
            widths = np.array(table.output_slices) + table.in_features
            exact = (step.rows.lora_rank[:, columns] @ widths) @ (groups.counts + _READ_COST)
            is_batched = padded < calls + int(exact)
        return _LayerStep(table, groups, step, columns, max_rank, is_batched)

    @property
    def is_padded(self) -> bool:
        """Whether a module has a smaller rank than the largest, or is missing."""
        return self.step.min_ranks[self.table.layer] < self.max_rank

    @property
    def rows(self) -> Tensor:
        """Position in the step of each row."""
        return self.groups.padded_tokens if self.is_batched else self.groups.tokens

    def sort(self, rows: Tensor) -> Tensor:
        """Rows in sorted order, without padding."""
        if not self.is_batched or self.groups.places is None:
            return rows
        return rows.index_select(0, self.groups.places)


def _shrink_rows(x: Tensor, layer: _LayerStep, dtype: torch.dtype) -> Tensor:
    """[rows, S, R] of a dtype, columns at or above a module's rank 0."""
    table, step, max_rank = layer.table, layer.step, layer.max_rank
    width = table.in_features
    x = x.to(_product_dtype(x.dtype))
    if not layer.is_batched:
        v = x.new_zeros((len(x), table.num_slices, max_rank), dtype=dtype)
        for module in _modules(layer):
            a = table.arena[module.a_offset : module.a_offset + module.lora_rank * width]
            product = x[module.tokens].mm(a.view(module.lora_rank, width).to(x.dtype).t())
            v[module.tokens, module.slice_index, : module.lora_rank] = product.mul_(module.scaling).to(dtype)
        return v
    num_groups = len(layer.groups.slots)
    starts = step.rows.a_offset[:, layer.columns, None] + step.row[:, layer.columns, :max_rank] * width
    a = _gather(table.arena, torch.from_numpy(starts), width, x.dtype)
    v = x.view(num_groups, -1, width).bmm(a.view(num_groups, -1, width).transpose(1, 2))
    v = v.view(num_groups, -1, table.num_slices, max_rank).mul_(step.scaling[:, :, layer.columns])
    if layer.is_padded:
        v.masked_fill_(step.is_padding[:, :, layer.columns, :max_rank], 0)
    return v.view(-1, table.num_slices, max_rank).to(dtype)


def _look_up_rows(token_ids: Tensor, layer: _LayerStep, dtype: torch.dtype) -> Tensor:
    """[rows, 1, R] of a dtype, columns at or above the adapter's rank 0."""
    table, groups, device = layer.table, layer.groups, token_ids.device
    ids = token_ids.to(torch.int64)[:, None]
    if device.type == "cpu" and bool(((ids < 0) | (ids >= table.in_features)).any()):
        raise IndexError(f"token ids are {ids.min()} to {ids.max()}, expected 0 to {table.in_features - 1}")
    group_of_row = groups.group_of_token
    if layer.is_batched:
        group_of_row = np.repeat(np.arange(len(groups.slots)), groups.max_count)
    stored = layer.step.rows
    offset, lora_rank, scaling = (
        torch.from_numpy(column[group_of_row, layer.columns]).to(device)
        for column in (stored.a_offset, stored.lora_rank, stored.scaling)
    )
    column = torch.arange(layer.max_rank, device=device)
    is_padding = column >= lora_rank
    places = (offset + ids * lora_rank + column).masked_fill_(is_padding, 0)
    v = table.arena.index_select(0, places.view(-1)).view(places.shape)
    v = v.to(_product_dtype(v.dtype)).mul_(scaling)
    return v.masked_fill_(is_padding, 0).to(dtype)[:, None]


def _expand_rows(v: Tensor, layer: _LayerStep) -> Tensor:
    """[rows, O] in the dtype of products; -0.0, which added to any number leaves it, where no module is."""
    table, step, max_rank = layer.table, layer.step, layer.max_rank
    v = v.to(_product_dtype(v.dtype))
    if not layer.is_batched:
        delta = v.new_full((len(v), table.out_features), -0.0)
        ends = list(accumulate(table.output_slices))
        for module in _modules(layer):
            index, width = module.slice_index, table.output_slices[module.slice_index]
            b = table.arena[module.b_offset : module.b_offset + module.lora_rank * width]
            product = v[module.tokens, index, : module.lora_rank].mm(
                b.view(module.lora_rank, width).to(v.dtype)
            )
            delta[module.tokens, ends[index] - width : ends[index]] = product
        return delta
    num_groups, max_count = len(layer.groups.slots), layer.groups.max_count
    v = v.view(num_groups, max_count, table.num_slices, max_rank)
    parts = []
    for index, width in enumerate(table.output_slices):
        column = layer.columns.start + index
        num_modules = step.num_modules[column]
        if num_modules == 0:
            parts.append(v.new_full((num_groups, max_count, width), -0.0))
            continue
        starts = step.rows.b_offset[:, column, None] + step.row[:, column, :max_rank] * width
        b = _gather(table.arena, torch.from_numpy(starts), width, v.dtype)
        part = v[:, :, index].bmm(b.view(num_groups, max_rank, width))
        if num_modules < num_groups:
            part.masked_fill_(step.is_padding[:, :, column, :1], -0.0)
        parts.append(part)
    delta = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return delta.view(num_groups * max_count, -1)


@dataclass(frozen=True)
class _Module:
    """One adapter's module on one slice."""

    tokens: slice  # of the sorted order
    slice_index: int
    a_offset: int
    b_offset: int
    lora_rank: int
    scaling: float


def _modules(layer: _LayerStep) -> Iterator[_Module]:
    counts, stored = layer.groups.counts, layer.step.rows
    ends = np.cumsum(counts)
    a_offset, b_offset, lora_rank, scaling = (
        column[:, layer.columns].tolist()
        for column in (stored.a_offset, stored.b_offset, stored.lora_rank, stored.scaling)
    )
    for group, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        for index, rank in enumerate(lora_rank[group]):
            if rank:
                yield _Module(
                    slice(end - count, end),
                    index,
                    a_offset[group][index],
                    b_offset[group][index],
                    rank,
                    scaling[group][index],
                )


def _gather(arena: Tensor, starts: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[number of starts, width]: so many numbers from each start on, as a dtype."""
    windows = arena.as_strided((arena.shape[0] - width + 1, width), (1, 1))
    return windows.index_select(0, starts.view(-1).to(arena.device)).to(dtype)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that products of tensors of ``dtype`` are computed and accumulated in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
