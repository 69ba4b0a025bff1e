"""The weights that the LoRA operators read: one table a packed layer, one row an adapter slot.

A packed layer (for example q, k and v in one matrix) has S slices of unequal widths. An adapter may have a
module on any subset of them, at a rank of its own on each, stored exactly, without padding. All matrices lie
in one arena; the tables say where.

A slot that holds no adapter is not the same as an adapter without a module on this layer. A token whose
adapter is not there can never run as the base model: on the CPU operators raise; kernels, which cannot, make
its rows NaN, and logits that are NaN fail the request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.kernels.device_tables import EMPTY_SLOT, DeviceTables


@dataclass(frozen=True, eq=False)
class LoRASliceWeights:
    """One adapter's module on one slice of a packed layer.

    Parameters
    ----------
    a
        [R, H], contiguous, the model's dtype: input features to rank. On an embedding [V, R], a row a token.
    b
        [R, O], contiguous, dtype and device of ``a``: rank to output features (PEFT stores it transposed).
    scaling
        ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA. Finite.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def lora_rank(self) -> int:
        """R, the number of rows of ``b``."""
        return self.b.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both matrices."""
        return self.a.nbytes + self.b.nbytes


LoRALayerWeights = tuple[LoRASliceWeights | None, ...]
"""One entry a slice of the packed layer, in the layer's order; None = the adapter has no module there."""


class LoRALayerTable:
    """One packed layer's, or one embedding's, view of the arena and of the device tables.

    Owns: nothing; the arena and the tables are the LoRA manager's, which writes rows between steps only.
    Deliberately does not know: names, generations, files, who may replace what when.
    Invariants: `arena`, `a_offset`, `b_offset`, `lora_rank` and `scaling` are all there from the start and
    change only in :meth:`bind`; every slot is empty before that.

    Parameters
    ----------
    output_slices
        Widths O_s of the S slices, each >= 1.
    in_features
        H, the width of the layer's input, >= 1; the vocabulary's size V for an embedding.
    is_embedding
        True: the input is token ids, and A has a row for each.

    Attributes
    ----------
    arena : Tensor
        [E], the model's dtype: the weights of all adapters and layers. A is [R, H] ([V, R] for an embedding)
        and B is [R, O_s], row-major.
    a_offset, b_offset : Tensor
        [L, S] int64, strided, on the arena's device: start of A and B in elements of the arena.
    lora_rank : Tensor
        [L, S] int32, strided; 0 = no module, -1 = no adapter in the slot. In both cases offsets mean nothing.
    scaling : Tensor
        [L, S] float32, strided.
    tables : DeviceTables
        Whose views these are.
    layer : int
        Index of this layer in the tables.

    Raises
    ------
    ValueError
        A width is below 1, or there is no slice, or an embedding has several.
    """

    arena: Tensor
    a_offset: Tensor
    b_offset: Tensor
    lora_rank: Tensor
    scaling: Tensor
    tables: DeviceTables
    layer: int

    def __init__(
        self, output_slices: tuple[int, ...], in_features: int, *, is_embedding: bool = False
    ) -> None:
        if not output_slices or min(output_slices) < 1 or in_features < 1:
            raise ValueError(
                f"a LoRA layer table has output_slices {output_slices} and in_features {in_features}, "
                "expected at least one slice and all widths at least 1"
            )
        if is_embedding and len(output_slices) > 1:
            raise ValueError(f"an embedding has output_slices {output_slices}, expected one")
        self.output_slices = tuple(output_slices)
        self.in_features = in_features
        self.is_embedding = is_embedding
        self.num_slices = len(output_slices)
        self.out_features = sum(output_slices)
        self.bind(torch.empty(0), DeviceTables([self.num_slices], 1, "cpu"), 0)

    def bind(self, arena: Tensor, tables: DeviceTables, layer: int) -> None:
        """Read weights from this arena by these tables from now on.

        Parameters
        ----------
        arena
            [E] of the model's dtype, contiguous, on the device of the tables.
        tables
            Of the model's layers; offsets count elements of the arena.
        layer
            Index of this layer in the tables.

        Raises
        ------
        ValueError
            The layer has another number of slices in the tables, or the arena is not [E] contiguous.
        """
        found = tables.slices_of_layers[layer]
        if found != self.num_slices or arena.dim() != 1 or not arena.is_contiguous():
            raise ValueError(
                f"a layer of {self.num_slices} slices is bound to one of {found} in the tables and to an "
                f"arena of shape {tuple(arena.shape)}, expected the same number and a contiguous [E]"
            )
        views = tables.layers[layer]
        self.arena, self.tables, self.layer = arena, tables, layer
        self.a_offset, self.b_offset = views.a_offset, views.b_offset
        self.lora_rank, self.scaling = views.lora_rank, views.scaling

    def get(self, slot: int) -> LoRALayerWeights | None:
        """The weights of a slot as views of the arena, or None where no adapter is; for tests and tuners.

        Notes
        -----
        Reads the tables on the host, which on an accelerator waits for the device.
        """
        if not 0 <= slot < len(self.lora_rank) or int(self.lora_rank[slot, 0]) == EMPTY_SLOT:
            return None
        columns = (self.lora_rank, self.a_offset, self.b_offset, self.scaling)
        ranks, a_offsets, b_offsets, scalings = (column[slot].tolist() for column in columns)
        weights: list[LoRASliceWeights | None] = []
        for rank, a_start, b_start, scaling, width in zip(
            ranks, a_offsets, b_offsets, scalings, self.output_slices, strict=True
        ):
            if rank == 0:
                weights.append(None)
                continue
            shape_a = (self.in_features, rank) if self.is_embedding else (rank, self.in_features)
            a = self.arena[a_start : a_start + rank * self.in_features].view(shape_a)
            b = self.arena[b_start : b_start + rank * width].view(rank, width)
            weights.append(LoRASliceWeights(a, b, scaling))
        return tuple(weights)

    @property
    def installed_slots(self) -> tuple[int, ...]:
        """The slots that hold an adapter, ascending; reads the tables on the host, as :meth:`get` does."""
        return self.tables.used_slots
