"""What the adapters of a step still have to add to a layer's output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.lora_weights import LoRALayerTable

FEW_TOKENS = 32
"""Up to so many the base product is a kernel of ours, beside which the shrink runs.

The expand is a kernel of its own then: nothing is gained by leaving it to the next one. Where kernels cannot
be launched early (before Hopper), and in fp32, the shrink runs ahead of the product instead.
"""

MOST_TOKENS_BESIDE = 256
"""Up to so many, but more than `FEW_TOKENS`, a layer's adapters run beside its product, the expand as well.

With more, the product needs the whole device. So it does before Hopper, and in fp32.
"""


@dataclass(frozen=True, eq=False)
class LoRADelta:
    """A LoRA delta, or its second half, left to the kernel that reads the layer's output next.

    That kernel does what ``triton_lora_expand(y, v, ...)`` and then itself would do, without a launch and a
    pass over y for the first of the two, or adds what the expand has written. Only CUDA has such kernels; see
    :mod:`lora_serve.layers.ops`.

    Parameters
    ----------
    v
        [P, S, T, R] on the device of y: the shrink's parts, as `triton_lora_shrink` wrote them.
    table
        The layer's weights by adapter slot.
    metadata
        Grouping of the T tokens.
    expanded
        [T, O] fp32, contiguous: ``v B``, where the expand ran beside the base product.
        Rows without an adapter hold anything. None = the expand is still to be done.
    """

    v: Tensor
    table: LoRALayerTable
    metadata: LoRAMetadata
    expanded: Tensor | None = None
