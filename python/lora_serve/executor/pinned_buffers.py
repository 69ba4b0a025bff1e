"""Pinned memory from which small arrays go to the device, in turn."""

from __future__ import annotations

import torch
from torch import Tensor

COPY_ALIGNMENT = 4
"""Entries: an array of a copy begins at a multiple, or kernels would be compiled anew for its address."""


class PinnedBuffers:
    """Buffers that are written by the host while kernels of earlier steps may still read the others.

    Parameters
    ----------
    num_buffers : int
        Steps that may be on their way: a buffer comes again when the step that took it `num_buffers` calls
        before has run.
    device : torch.device
        Where the copies go. Where it is the CPU, which tests use, the memory is not pinned.
    """

    def __init__(self, num_buffers: int, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._buffers = [torch.zeros(0, dtype=torch.int32) for _ in range(num_buffers)]
        self._next = 0

    def take(self, num_entries: int) -> Tensor:
        """Give the next buffer, enlarged if it is too small: [`num_entries` or more] int32 on the host."""
        buffer = self._buffers[self._next]
        if len(buffer) < num_entries:
            buffer = torch.zeros(2 * num_entries, dtype=torch.int32, pin_memory=self._is_pinned)
            self._buffers[self._next] = buffer
        self._next = (self._next + 1) % len(self._buffers)
        return buffer
