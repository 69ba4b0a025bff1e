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

With ``lora_embedding`` and ``lora_logits`` this file is the seam that layers call; behind it stands plain
torch, one matrix product for each (adapter, slice), which is the reference and the CPU path. The operators
are ordinary functions: their weights are Python tables of tensors, which a torch custom operator cannot take
as arguments. They become registered operators with the device tables of offsets, ranks and scalings, which
are tensors.

Source: the split in shrink and expand, and grouping tokens by adapter, are Punica's (Chen et al., 2023) and
S-LoRA's (Sheng et al., 2023). Different here: A and B are both stored [R, features] at their exact rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_segments import check_rows, compute_dtype, largest_rank, weights_by_segment
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
    if table.is_embedding:
        raise ValueError("the table is an embedding's, expected one of a linear layer")
    check_rows("x", x, metadata, table.in_features)
    step_weights = weights_by_segment(table, metadata)
    shape = (table.num_slices, x.shape[0], largest_rank(step_weights))
    v = x.new_zeros(shape, dtype=x.dtype if dtype is None else dtype)
    product_dtype = compute_dtype(x.dtype)
    for segment, weights in zip(metadata.segments, step_weights, strict=True):
        if all(module is None for module in weights):
            continue
        rows = x.index_select(0, segment.rows).to(product_dtype)
        for v_slice, module in zip(v, weights, strict=True):
            if module is None:
                continue
            product = torch.mm(rows, module.a.to(product_dtype).t()).mul_(module.scaling)
            v_slice[:, : module.lora_rank].index_copy_(0, segment.rows, product.to(v.dtype))
    return v


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
    _check_expand_shapes(y, v, table, metadata, offset_start)
    product_dtype = compute_dtype(y.dtype)
    for segment, weights in zip(metadata.segments, weights_by_segment(table, metadata), strict=True):
        offset = offset_start
        for v_slice, module, width in zip(v, weights, table.output_slices, strict=True):
            columns = y[:, offset : offset + width]
            offset += width
            if module is None:
                if not add_inputs:
                    columns.index_fill_(0, segment.rows, 0)
                continue
            if module.lora_rank > v.shape[2]:
                raise ValueError(
                    f"v has {v.shape[2]} columns of rank, the adapter in slot {segment.slot} has rank "
                    f"{module.lora_rank}: v must come from lora_shrink with the same table and metadata"
                )
            rows = v_slice[:, : module.lora_rank].index_select(0, segment.rows).to(product_dtype)
            delta = torch.mm(rows, module.b.to(product_dtype))
            if add_inputs:
                delta.add_(columns.index_select(0, segment.rows))
            columns.index_copy_(0, segment.rows, delta.to(y.dtype))


def add_lora_linear(y: Tensor, x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata | None) -> None:
    """Add the adapters' deltas of one packed linear layer to its base output, in place.

    Parameters
    ----------
    y
        [T, sum(O_s)]: the base product, with bias where the layer has one; changed in place.
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
    lora_expand(y, lora_shrink(x, table, metadata), table, metadata)


def _check_expand_shapes(
    y: Tensor, v: Tensor, table: LoRALayerTable, metadata: LoRAMetadata, offset_start: int
) -> None:
    columns_needed = offset_start + table.out_features
    if offset_start < 0 or y.dim() != 2 or y.shape[1] < columns_needed:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, expected [T, O] with O >= {columns_needed}, which is "
            f"offset_start {offset_start} (0 or above) and slices {table.output_slices}"
        )
    check_rows("y", y, metadata, y.shape[1])
    if v.dim() != 3 or tuple(v.shape[:2]) != (table.num_slices, metadata.num_tokens) or v.dtype != y.dtype:
        raise ValueError(
            f"v has shape {tuple(v.shape)} and dtype {v.dtype}, expected [{table.num_slices}, "
            f"{metadata.num_tokens}, R] of y's dtype {y.dtype}"
        )
