"""The LoRA operator of the projection to logits, which runs on sampled rows only.

Semantics
---------
For row n, which is the hidden state of a token whose logits are wanted, with adapter slot l::

    v[0, n, r]        = scaling[l] * sum_h hidden[n, h] * A[l][r, h]
    logits[n, o]     += sum_r v[0, n, r] * B[l][r, o]

The rows are not the step's tokens: they need a mapping of their own, one entry a row of logits. Logits are
wider (fp32) than the hidden states, and so is ``v``: the delta is rounded once, to the dtype of the logits.
Everything else is as in ``lora_ops``.
"""

from __future__ import annotations

from torch import Tensor

from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_ops import add_lora_linear
from lora_serve.kernels.lora_weights import LoRALayerTable


def add_lora_logits(
    logits: Tensor, hidden: Tensor, table: LoRALayerTable, metadata: LoRAMetadata | None
) -> None:
    """Add the adapters' deltas of the projection to logits, in place.

    Parameters
    ----------
    logits
        [N, V], the base product; changed in place.
    hidden
        [N, H]: the projection's input, any floating-point dtype.
    table
        The projection's weights by adapter slot.
    metadata
        Grouping of the N rows (not of the step's tokens). None, or no row with an adapter: nothing is done.

    Raises
    ------
    ValueError
        Shapes do not fit together: the metadata of the step's tokens, for example.
    LookupError
        A row names an adapter slot that holds no adapter.
    """
    add_lora_linear(logits, hidden, table, metadata)
