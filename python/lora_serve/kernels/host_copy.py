"""Small copies between pinned host memory and the device, done by a kernel.

Semantics
---------
``destination[i] = source[i]`` for every i; either side may lie in pinned host memory, which a CUDA device
reads and writes at its own address.

A copy engine carries out copies of one direction one after the other: a step's few kilobytes would wait there
behind the megabytes of an adapter or of KV pages. A kernel does not. Host memory that it has written may be
read when an event behind it has come.

Grid: one program for each 1,024 elements. Nothing is launched for an empty copy.
"""

from __future__ import annotations

from torch import Tensor

from lora_serve.kernels._triton import ceil_div, jit, tl

_BLOCK = 1024


@jit(do_not_specialize=["num_elements"])
def _copy_kernel(
    destination: tl.tensor, source: tl.tensor, num_elements: tl.tensor, BLOCK: tl.constexpr
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = index < num_elements
    tl.store(destination + index, tl.load(source + index, mask=is_inside), mask=is_inside)


def copy_small(destination: Tensor, source: Tensor) -> None:
    """Copy between pinned host memory and the device, in the order of the current stream.

    Parameters
    ----------
    destination, source
        [N] int32 each, contiguous; on the device, or pinned on the host.

    Raises
    ------
    ValueError
        They differ in shape or dtype, or are not flat and contiguous.
    """
    is_flat = destination.dim() == 1 and destination.is_contiguous() and source.is_contiguous()
    if destination.shape != source.shape or destination.dtype != source.dtype or not is_flat:
        raise ValueError(
            f"destination has shape {tuple(destination.shape)} and dtype {destination.dtype}, source "
            f"{tuple(source.shape)} and {source.dtype}; expected two flat contiguous tensors alike"
        )
    num_elements = source.numel()
    if num_elements:
        _copy_kernel[(ceil_div(num_elements, _BLOCK),)](destination, source, num_elements, BLOCK=_BLOCK)
