"""The weights that the LoRA operators read: one table a packed layer, one row an adapter slot.

A packed layer (for example q, k and v in one matrix) has S slices of unequal widths. An adapter may have a
module on any subset of them, at a rank of its own on each: a slice without a module is ``None`` (rank 0), and
any rank is stored exactly, without padding.

A slot that holds no adapter is not the same as an adapter without a module on this layer. Operators refuse
the first, so that a token whose adapter is not there can never run as the base model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


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
    """Adapter slot to weights, for one packed layer or one embedding.

    Owns: nothing but references; the tensors live as long as a table (or somebody else) holds them.
    Deliberately does not know: names, generations, files, who may replace what when. That is the LoRA
    manager's matter, which installs and clears between steps only.
    Invariants: every stored entry has exactly S slices, each None or of shapes [R, H] and [R, O_s], R >= 1
    ([H, R] and [R, O_s] for an embedding); an install replaces a slot's entry as a whole, so nothing of an
    earlier adapter stays behind.

    Parameters
    ----------
    output_slices
        Widths O_s of the S slices, each >= 1.
    in_features
        H, the width of the layer's input, >= 1; the vocabulary's size V for an embedding.
    is_embedding
        True: the input is token ids, and A has a row for each.

    Raises
    ------
    ValueError
        A width is below 1, or there is no slice, or an embedding has several.
    """

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
        self._slots: dict[int, LoRALayerWeights | Callable[[], LoRALayerWeights]] = {}

    @property
    def num_slices(self) -> int:
        """S, the number of slices."""
        return len(self.output_slices)

    @property
    def out_features(self) -> int:
        """The sum of the slices' widths."""
        return sum(self.output_slices)

    @property
    def installed_slots(self) -> tuple[int, ...]:
        """The slots that hold an adapter, ascending."""
        return tuple(sorted(self._slots))

    def check(self, weights: LoRALayerWeights) -> None:
        """Raise unless the weights fit this layer.

        Parameters
        ----------
        weights
            One entry a slice; None = no module.

        Raises
        ------
        ValueError
            Wrong number of slices, a shape that is not [R, H] / [R, O_s] ([H, R] / [R, O_s] for an
            embedding), rank 0, two dtypes or devices in one module, or a scaling that is not finite.
        """
        if len(weights) != self.num_slices:
            raise ValueError(f"the layer has {self.num_slices} slices, the adapter's weights {len(weights)}")
        for index, (module, width) in enumerate(zip(weights, self.output_slices, strict=True)):
            if module is None:
                continue
            rank = module.lora_rank
            found = (tuple(module.a.shape), tuple(module.b.shape))
            shape_a = (self.in_features, rank) if self.is_embedding else (rank, self.in_features)
            if rank < 1 or found != (shape_a, (rank, width)):
                expected_a = f"({self.in_features}, R)" if self.is_embedding else f"(R, {self.in_features})"
                raise ValueError(
                    f"slice {index}: A and B have shapes {found[0]} and {found[1]}, expected {expected_a} "
                    f"and (R, {width}) with R >= 1"
                )
            if module.a.dtype != module.b.dtype or module.a.device != module.b.device:
                raise ValueError(
                    f"slice {index}: A is {module.a.dtype} on {module.a.device}, B is {module.b.dtype} on "
                    f"{module.b.device}, expected the same"
                )
            if not math.isfinite(module.scaling):
                raise ValueError(f"slice {index}: scaling is {module.scaling}, expected a finite number")

    def install(self, slot: int, weights: LoRALayerWeights) -> None:
        """Give a slot to an adapter; whatever the slot held before is gone as a whole.

        Parameters
        ----------
        slot
            Adapter slot, >= 0.
        weights
            One entry a slice; all None where the adapter has no module on this layer. Kept by reference.

        Raises
        ------
        ValueError
            ``slot`` is negative, or the weights do not fit (see :meth:`check`); the table is unchanged.
        """
        if slot < 0:
            raise ValueError(f"adapter slot is {slot}, expected 0 or above (-1 means no adapter)")
        self.check(weights)
        self._slots[slot] = tuple(weights)

    def install_lazily(self, slot: int, make_weights: Callable[[], LoRALayerWeights]) -> None:
        """As :meth:`install`, but the weights are asked for, and checked, when they are first read.

        Making views of hundreds of matrices takes milliseconds, which a step that runs on kernels that read
        the device's own tables should not wait for.

        Raises
        ------
        ValueError
            ``slot`` is negative; the table is unchanged.
        """
        if slot < 0:
            raise ValueError(f"adapter slot is {slot}, expected 0 or above (-1 means no adapter)")
        self._slots[slot] = make_weights

    def clear(self, slot: int) -> None:
        """Empty a slot; a slot that is empty already stays so."""
        self._slots.pop(slot, None)

    def get(self, slot: int) -> LoRALayerWeights | None:
        """The weights of a slot, or None where no adapter is installed.

        Raises
        ------
        ValueError
            Weights that were installed lazily do not fit (see :meth:`check`).
        """
        weights = self._slots.get(slot)
        if callable(weights):
            weights = weights()
            self.install(slot, weights)
        return weights
