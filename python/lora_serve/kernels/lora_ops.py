"""The LoRA operators: shrink, expand and both in one, over adapter segments.

Semantics
---------
For token t with adapter slot l, and slice s of a packed layer at column offset ``offset_s``::

    v[s, t, r]            = scaling[l, s] * sum_h x[t, h] * A[l, s][r, h]
    y[t, offset_s + o]  (+)= sum_r v[s, t, r] * B[l, s][r, o]

Scaling is applied once, in fp32, before ``v`` is rounded to the dtype of ``y``. Both sums are accumulated in
fp32 (fp64 for fp64 inputs); ``y`` is rounded once, to its own dtype, which never changes. Tokens of slot -1
give rows of zeros in ``v`` and keep their rows of ``y`` bit for bit. A slice on which the adapter has no
module counts as rank 0. Columns outside the slices are not touched. An empty step is fine. Nothing is summed
in an order that depends on chance, so the same inputs give the same bits.

With ``lora_embedding`` and ``lora_logits`` this file is the seam that layers call: `add_lora_linear` runs the
implementation that ``lora_dispatch`` has for the device. `lora_shrink` and `lora_expand` are the halves in
torch, on any device.

Source: the split in shrink and expand, and grouping tokens by adapter, are Punica's (Chen et al., 2023) and
S-LoRA's (Sheng et al., 2023). Different here: A and B are both stored [R, features] at their exact rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels import torch_lora
from lora_serve.kernels.lora_dispatch import lora_implementation
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_weights import LoRALayerTable


def lora_shrink(
    x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Project the input onto each adapter's rank: ``v[s] = scaling * x A[s]^T``.

    Parameters
    ----------
    x
        [T, H], floating point, any strides.
    table
        Weights by adapter slot, on the device of ``x``.
    metadata
        Grouping of the T tokens; slot -1 = no adapter.
    dtype
        Of v: that of the output that it will be added to. None = that of ``x``.

    Returns
    -------
    Tensor
        v [S, T, R] on the device of ``x``; R is the largest rank on this layer among the adapters of the step
        (0 where none has a module). Rows of slot -1, slices without a module and columns at or above an
        adapter's own rank are 0.

    Raises
    ------
    ValueError
        ``x`` is not [T, H] of floating point with the table's H and the metadata's T, or the table is an
        embedding's.
    LookupError
        A token names an adapter slot that holds no adapter.
    """
    _check_input(x, table, metadata)
    return torch_lora.shrink(x, table, metadata, x.dtype if dtype is None else dtype)


def lora_expand(
    y: Tensor,
    v: Tensor,
    table: LoRALayerTable,
    metadata: LoRAMetadata,
    *,
    offset_start: int = 0,
    add_inputs: bool = True,
) -> None:
    """Project from rank to output features, in place: ``y[:, offset_s : offset_s + O_s] (+)= v[s] B[s]``.

    Parameters
    ----------
    y
        [T, O], floating point, O >= offset_start + sum(O_s), any strides; changed in place.
    v
        [S, T, R] as :func:`lora_shrink` gives it, R at least the largest rank of the step on this layer.
    table
        Weights by adapter slot, on the device of ``y``.
    metadata
        Grouping of the T tokens; rows of slot -1 are left as they are.
    offset_start
        Column of ``y`` where the first slice starts, >= 0; the others follow without gaps.
    add_inputs
        True: add to ``y``. False: overwrite the slices of rows with an adapter (with 0 where the adapter has
        no module) without reading them.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit together, or ``offset_start`` is negative.
    LookupError
        A token names an adapter slot that holds no adapter.
    """
    check_output(y, table, metadata, offset_start)
    if v.dim() != 3 or tuple(v.shape[:2]) != (table.num_slices, metadata.num_tokens) or v.dtype != y.dtype:
        raise ValueError(
            f"v has shape {tuple(v.shape)} and dtype {v.dtype}, expected [{table.num_slices}, "
            f"{metadata.num_tokens}, R] of y's dtype {y.dtype}"
        )
    torch_lora.expand(y, v, table, metadata, offset_start, add_inputs)


def add_lora_linear(y: Tensor, x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata | None) -> None:
    """Add the adapters' deltas of one packed linear layer to its base output, in place.

    Parameters
    ----------
    y
        [T, sum(O_s)]: the base product, with bias where the layer has one; changed in place. Its dtype is
        that of ``x``, or wider.
    x
        [T, H]: the layer's input.
    table
        The layer's weights by adapter slot.
    metadata
        Grouping of the T tokens. None, or a step without adapters: nothing is done.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit together.
    LookupError
        A token names an adapter slot that holds no adapter.
    """
    if metadata is None or metadata.no_adapter:
        return
    _check_input(x, table, metadata)
    check_output(y, table, metadata)
    lora_implementation(y.device.type).add_linear(y, x, table, metadata)


def check_output(y: Tensor, table: LoRALayerTable, metadata: LoRAMetadata, offset_start: int = 0) -> None:
    """Raise ``ValueError`` unless ``y`` is [T, O] of a floating-point dtype and has room for the slices."""
    columns_needed = offset_start + table.out_features
    if offset_start < 0 or y.dim() != 2 or y.shape[1] < columns_needed:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, expected [T, O] with O >= {columns_needed}, which is "
            f"offset_start {offset_start} (0 or above) and slices {table.output_slices}"
        )
    _check_rows("y", y, metadata, y.shape[1])


def _check_input(x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
    if table.is_embedding:
        raise ValueError("the table is an embedding's, expected one of a linear layer")
    _check_rows("x", x, metadata, table.in_features)


def _check_rows(name: str, tensor: Tensor, metadata: LoRAMetadata, features: int) -> None:
    expected = (metadata.num_tokens, features)
    if tuple(tensor.shape) != expected or not tensor.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected {expected} of a "
            "floating-point dtype"
        )
