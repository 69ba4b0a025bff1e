"""Arenas and tables made of given matrices: for tests, tuners and benchmarks, which have no adapter files."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_serve.kernels.device_tables import DeviceTables, ModulePlace
from lora_serve.kernels.lora_weights import LoRALayerTable, LoRALayerWeights

_ALIGNMENT = 8
"""Elements between which matrices start: 16 bytes of a 16-bit dtype, as in adapters' blocks."""


def install_weights(
    weights: Mapping[LoRALayerTable, Mapping[int, LoRALayerWeights]], *, num_slots: int | None = None
) -> DeviceTables:
    """Put matrices into an arena of their own, write tables for them, and bind the layers to both.

    Parameters
    ----------
    weights
        For each layer the weights by adapter slot. A slot that any layer names holds an adapter, which has no
        module on the layers that do not name it. All matrices have one dtype and one device.
    num_slots
        L of the tables; one more than the largest slot where None.

    Returns
    -------
    DeviceTables
        What the layers, in the order of ``weights``, are bound to now.

    Raises
    ------
    ValueError
        Weights do not fit their layer or each other (see :func:`check_weights`), or a slot is out of range.

    Notes
    -----
    Whatever no matrix covers is NaN, also between two of them: reading too much shows.
    """
    layers = list(weights)
    slots = sorted({slot for by_slot in weights.values() for slot in by_slot})
    num_slots = max(slots, default=0) + 1 if num_slots is None else num_slots
    if slots and not 0 <= slots[0] <= slots[-1] < num_slots:
        raise ValueError(f"adapter slots are {slots}, expected 0 to {num_slots - 1} (-1 means no adapter)")
    for layer, by_slot in weights.items():
        for slot_weights in by_slot.values():
            check_weights(layer, slot_weights)
    places: dict[int, list[ModulePlace]] = {slot: [] for slot in slots}
    matrices: list[tuple[int, Tensor]] = []
    end = _ALIGNMENT
    for index, layer in enumerate(layers):
        for slot, slot_weights in weights[layer].items():
            for slice_index, module in enumerate(slot_weights):
                if module is None:
                    continue
                b_start = _after(end, module.a)
                matrices += [(end, module.a), (b_start, module.b)]
                places[slot].append(
                    ModulePlace(index, slice_index, end, b_start, module.lora_rank, module.scaling)
                )
                end = _after(b_start, module.b)
    like = {(matrix.dtype, matrix.device) for _, matrix in matrices} or {(torch.float32, torch.device("cpu"))}
    if len(like) > 1:
        raise ValueError(f"matrices have dtypes and devices {like}, expected the same")
    ((dtype, device),) = like
    arena = torch.full((end,), float("nan"), dtype=dtype, device=device)
    for start, matrix in matrices:
        arena[start : start + matrix.numel()].copy_(matrix.flatten())
    tables = DeviceTables([layer.num_slices for layer in layers], num_slots, device)
    for slot, modules in places.items():
        tables.rows[slot].copy_(tables.make_row(modules))
    for index, layer in enumerate(layers):
        layer.bind(arena, tables, index)
    return tables


def check_weights(table: LoRALayerTable, weights: LoRALayerWeights) -> None:
    """Raise unless weights fit a layer.

    Parameters
    ----------
    table
        The layer's.
    weights
        One entry a slice; None = no module.

    Raises
    ------
    ValueError
        Wrong number of slices, a shape that is not [R, H] / [R, O_s] ([V, R] / [R, O_s] for an embedding),
        rank 0, or a scaling that is not finite.
    """
    if len(weights) != table.num_slices:
        raise ValueError(f"the layer has {table.num_slices} slices, the adapter's weights {len(weights)}")
    for index, (module, width) in enumerate(zip(weights, table.output_slices, strict=True)):
        if module is None:
            continue
        rank, width_a = module.lora_rank, table.in_features
        found = (tuple(module.a.shape), tuple(module.b.shape))
        shape_a = (width_a, rank) if table.is_embedding else (rank, width_a)
        if rank < 1 or found != (shape_a, (rank, width)):
            expected_a = f"({width_a}, R)" if table.is_embedding else f"(R, {width_a})"
            raise ValueError(
                f"slice {index}: A and B have shapes {found[0]} and {found[1]}, expected {expected_a} "
                f"and (R, {width}) with R >= 1"
            )
        if not math.isfinite(module.scaling):
            raise ValueError(f"slice {index}: scaling is {module.scaling}, expected a finite number")


def _after(start: int, matrix: Tensor) -> int:
    """Where the next matrix starts, with a gap."""
    return (start + matrix.numel()) // _ALIGNMENT * _ALIGNMENT + 2 * _ALIGNMENT
