"""Small arrays on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.executor.pinned_buffers import COPY_ALIGNMENT, PinnedBuffers
from lora_serve.kernels.host_copy import copy_small

_TORCH_DTYPES = {"int32": torch.int32, "float32": torch.float32, "float64": torch.float64}


class Uploads:
    """Brings small arrays to the device in one copy that nobody waits for.

    Parameters
    ----------
    num_buffers : int
        Copies that may be on their way: an upload may be made when the step of the `num_buffers`-th upload
        before it has run.
    device : torch.device
        Where to; the CPU in tests.
    """

    def __init__(self, num_buffers: int, device: torch.device) -> None:
        self._device = device
        self._staging = PinnedBuffers(num_buffers, device)

    def upload(self, arrays: Sequence[npt.NDArray[np.generic]]) -> list[Tensor]:
        """Copy flat arrays of int32, float32 or float64, in the order of the current stream."""
        entries = [np.ascontiguousarray(array).view(np.int32) for array in arrays]
        starts = [0]
        for entry in entries:
            starts.append(starts[-1] + -(-len(entry) // COPY_ALIGNMENT) * COPY_ALIGNMENT)
        staging = self._staging.take(starts[-1])
        host = staging.numpy()
        for start, entry in zip(starts[:-1], entries, strict=True):
            host[start : start + len(entry)] = entry
        block = torch.empty(starts[-1], dtype=torch.int32, device=self._device)
        copy_small(block, staging[: starts[-1]])
        return [
            block[start : start + len(entry)].view(_TORCH_DTYPES[array.dtype.name])
            for start, entry, array in zip(starts[:-1], entries, arrays, strict=True)
        ]
