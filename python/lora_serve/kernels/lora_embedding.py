"""The LoRA operators of a token embedding: the first half is a look-up instead of a product.

Semantics
---------
For token t with id ``i[t]`` and adapter slot l; A is [V, R], a row a token id, B is [R, O]::

    v[0, t, r]  = scaling[l] * A[l][i[t], r]
    y[t, o]    += sum_r v[0, t, r] * B[l][r, o]

Scaling is applied once, in fp32, before ``v`` is rounded to the dtype of ``y``. Everything else is as in
``lora_ops``, whose expand is the second half: slot -1, slots without an adapter, missing modules, rounding.
A's rows are token ids so that a look-up reads R neighbouring numbers; PEFT stores its transpose, [R, V].

Source: what PEFT computes for an embedding (``scaling * (embedding(i, A) B)``), by adapter segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels import torch_lora
from lora_serve.kernels.lora_dispatch import lora_implementation
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_ops import check_output
from lora_serve.kernels.lora_weights import LoRALayerTable


def lora_lookup(
    token_ids: Tensor, table: LoRALayerTable, metadata: LoRAMetadata, *, dtype: torch.dtype
) -> Tensor:
    """Look up each token in its adapter's A: ``v[0, t] = scaling * A[token_ids[t]]``.

    Parameters
    ----------
    token_ids
        [T] int32 or int64. In [0, V) where the token has an adapter; others are not read.
    table
        Weights by adapter slot, of an embedding, on the device of ``token_ids``.
    metadata
        Grouping of the T tokens; slot -1 = no adapter.
    dtype
        Of v: that of the output that it will be added to.

    Returns
    -------
    Tensor
        v [1, T, R] on the device of ``token_ids``; R is the largest rank on this layer among the adapters of
        the step (0 where none has a module). Rows of slot -1, of adapters without a module, and columns at or
        above an adapter's own rank are 0.

    Raises
    ------
    ValueError
        ``token_ids`` is not [T] int32 or int64 with the metadata's T, or the table is not an embedding's.
    LookupError
        A token names an adapter slot that holds no adapter.
    IndexError
        A token id is out of range (on the CPU; an accelerator does not check).
    """
    _check_token_ids(token_ids, table, metadata)
    return torch_lora.look_up(token_ids, table, metadata, dtype)


def add_lora_embedding(
    y: Tensor, token_ids: Tensor, table: LoRALayerTable, metadata: LoRAMetadata | None
) -> None:
    """Add the adapters' deltas of a token embedding to the base rows, in place.

    Parameters
    ----------
    y
        [T, O], the base embedding's rows; changed in place.
    token_ids
        [T] int32 or int64, in [0, V).
    table
        The embedding's weights by adapter slot.
    metadata
        Grouping of the T tokens. None, or a step without adapters: nothing is done.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit together, or the table is not an embedding's.
    LookupError
        A token names an adapter slot that holds no adapter.
    IndexError
        A token id is out of range (on the CPU; an accelerator does not check).
    """
    if metadata is None or metadata.no_adapter:
        return
    _check_token_ids(token_ids, table, metadata)
    check_output(y, table, metadata)
    lora_implementation(y.device.type).add_embedding(y, token_ids, table, metadata)


def _check_token_ids(token_ids: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
    if not table.is_embedding:
        raise ValueError("the table is of a linear layer, expected an embedding's")
    is_integer = token_ids.dtype in (torch.int32, torch.int64)
    if tuple(token_ids.shape) != (metadata.num_tokens,) or not is_integer:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)} and dtype {token_ids.dtype}, expected "
            f"({metadata.num_tokens},) int32 or int64"
        )
