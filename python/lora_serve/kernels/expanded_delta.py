"""Adding LoRA deltas that the expand has written to memory, where a packed layer's output is read next.

Semantics
---------
For token t with adapter slot l::

    y[t, o] = round(y[t, o] + delta[t, o])      l >= 0 and delta[t, o] != 0

The delta is fp32, so that there is one rounding, to the dtype of y, as where the expand adds its product
itself. All other elements keep their bits, also -0.0. Rows without an adapter hold anything in the delta:
they are read and dropped, so that no load waits for the slot.
NaN, which the expand writes for a slot without its adapter, goes on.

Source: the second half of `triton_lora_expand`, which adds its product to y itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels._triton import jit, tl
from lora_serve.kernels.lora_delta import LoRADelta


@jit
def add_expanded(y: tl.tensor, delta_ptrs: tl.tensor, mask: tl.tensor, slot: tl.tensor) -> tl.tensor:
    """A tile of y, loaded already, after the delta at the same places."""
    delta = tl.load(delta_ptrs, mask=mask, other=0.0)
    total = (y.to(tl.float32) + delta).to(y.dtype)
    return tl.where((slot >= 0) & (delta != 0.0), total, y)


def expanded_tensors(delta: LoRADelta | None, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What a kernel reads of a delta to add it to y: the product [T, O], and the slots of the tokens [T].

    Raises
    ------
    ValueError
        The delta is not expanded, or not one of y.
    """
    if delta is None:
        return None, None
    expanded, mapping = delta.expanded, delta.metadata.token_lora_mapping
    if expanded is None or expanded.shape != y.shape or expanded.dtype != torch.float32:
        found = "not expanded" if expanded is None else f"{tuple(expanded.shape)} {expanded.dtype}"
        raise ValueError(f"the delta is {found}, expected {tuple(y.shape)} float32 for what it is added to")
    if not expanded.is_contiguous() or mapping.shape != y.shape[:1] or mapping.device != y.device:
        raise ValueError(
            f"the delta has strides {expanded.stride()} and {tuple(mapping.shape)} slots on "
            f"{mapping.device}, expected contiguous rows and ({len(y)},) slots on {y.device}"
        )
    return expanded, mapping
