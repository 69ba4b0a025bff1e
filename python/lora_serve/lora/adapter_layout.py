"""Where each matrix of one adapter lies in its block of memory, on the host and on the device alike.

A block is one contiguous stretch of bytes, so that an adapter goes to the device in one copy. Every module is
stored at its own rank, without padding: A is [R, H] and B is [R, O], row-major, in the model's dtype. For an
embedding A is [V, R] (a row a token) and B is [R, H]. Modules that were trained as one fused module (q, k and
v under ``qkv_proj``) share one A: their ``a_offset`` is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_serve.kernels.lora_weights import LoRASliceWeights
from lora_serve.layers.linear import LoRATarget

MATRIX_ALIGNMENT = 16
"""Bytes; every matrix starts at a multiple of it, counted from the block's start."""

BLOCK_ALIGNMENT = 256
"""Bytes; a block starts at a multiple of it and its size is one."""


@dataclass(frozen=True)
class ModuleSize:
    """What the layout of one module depends on.

    Parameters
    ----------
    module
        Module path in the served model.
    lora_rank
        R, >= 1.
    scaling
        ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA.
    num_a_bytes, num_b_bytes
        Bytes of A and of B in the model's dtype, >= 1.
    shared_a
        Modules with the same text here share one A of the same size; None = an A of its own.
    """

    module: str
    lora_rank: int
    scaling: float
    num_a_bytes: int
    num_b_bytes: int
    shared_a: str | None = None


@dataclass(frozen=True)
class ModuleLayout:
    """One module of an adapter in its block.

    Parameters
    ----------
    module
        Module path in the served model.
    lora_rank
        R, >= 1.
    scaling
        What the product with A is multiplied by, once.
    a_offset, b_offset
        Bytes from the block's start, multiples of ``MATRIX_ALIGNMENT``. Modules trained as one fused module
        have the same ``a_offset``.
    """

    module: str
    lora_rank: int
    scaling: float
    a_offset: int
    b_offset: int


@dataclass(frozen=True)
class AdapterLayout:
    """All modules of one adapter in its block.

    Parameters
    ----------
    modules
        Sorted by module path, each path once.
    num_bytes
        Size of the block, a multiple of ``BLOCK_ALIGNMENT``.
    """

    modules: tuple[ModuleLayout, ...]
    num_bytes: int

    @cached_property
    def lora_rank(self) -> int:
        """The largest rank of its modules; 0 where it has none."""
        return max((module.lora_rank for module in self.modules), default=0)

    @cached_property
    def target_modules(self) -> tuple[str, ...]:
        """Last components of the module paths, sorted, each once: ``("k_proj", "q_proj")``."""
        return tuple(sorted({module.module.rsplit(".", 1)[-1] for module in self.modules}))


def lay_out(sizes: Iterable[ModuleSize]) -> AdapterLayout:
    """Place the matrices of an adapter one after another: by module path, A before B.

    Parameters
    ----------
    sizes
        One entry a module, in any order.

    Returns
    -------
    AdapterLayout
        The same for the same entries, whatever their order.

    Raises
    ------
    ValueError
        A module is named twice, or two modules share an A of different sizes.
    """
    modules: list[ModuleLayout] = []
    shared: dict[str, tuple[int, int]] = {}
    end = 0
    for size in sorted(sizes, key=lambda size: size.module):
        if modules and modules[-1].module == size.module:
            raise ValueError(f"module '{size.module}' is laid out twice, expected each module once")
        a_offset, num_a_bytes = shared.get(size.shared_a or "", (end, size.num_a_bytes))
        if num_a_bytes != size.num_a_bytes:
            raise ValueError(
                f"module '{size.module}' shares an A of {num_a_bytes} bytes, but its own has "
                f"{size.num_a_bytes}"
            )
        if a_offset == end:
            end = align(end + size.num_a_bytes, MATRIX_ALIGNMENT)
        if size.shared_a:
            shared[size.shared_a] = (a_offset, size.num_a_bytes)
        modules.append(ModuleLayout(size.module, size.lora_rank, size.scaling, a_offset, end))
        end = align(end + size.num_b_bytes, MATRIX_ALIGNMENT)
    return AdapterLayout(tuple(modules), align(end, BLOCK_ALIGNMENT))


def matrix_shapes(target: LoRATarget, lora_rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B in a block: [R, H] and [R, O]; for an embedding [V, R] and [R, H]."""
    return target.a_shape(lora_rank), (lora_rank, target.out_features)


def view_modules(
    layout: AdapterLayout, block: Tensor, targets: Mapping[str, LoRATarget], dtype: torch.dtype
) -> dict[str, LoRASliceWeights]:
    """Give the matrices of every module as views of a block, without a copy.

    Parameters
    ----------
    layout
        Of the block.
    block
        [layout.num_bytes] uint8, any device, starting at a multiple of ``BLOCK_ALIGNMENT`` bytes or at least
        of the dtype's size.
    targets
        Module paths of the model; every module of the layout is among them.
    dtype
        The model's.
    """
    views = {}
    for module in layout.modules:
        matrices = []
        shapes = matrix_shapes(targets[module.module], module.lora_rank)
        for offset, (rows, columns) in zip((module.a_offset, module.b_offset), shapes, strict=True):
            stored = block[offset : offset + rows * columns * dtype.itemsize]
            matrices.append(stored.view(dtype).view(rows, columns))
        views[module.module] = LoRASliceWeights(matrices[0], matrices[1], module.scaling)
    return views


def align(num_bytes: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is at least ``num_bytes``."""
    return -(-num_bytes // alignment) * alignment
