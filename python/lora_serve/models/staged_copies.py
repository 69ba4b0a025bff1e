"""Copies of weights from the host to a CUDA device through pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor

_NUM_BUFFERS = 2
_BUFFER_BYTES = 64 * 2**20


class StagedCopies:
    """Brings tensors to a CUDA device in pieces: one is on its way while the next is read.

    A plain copy from a mapped file faults its pages in and stages them in one thread of the driver. Here
    torch's threads read the file into pinned memory, and the device fetches it from there meanwhile.

    Owns two pinned buffers of 64 MiB. Copies are on the current stream.

    Parameters
    ----------
    device
        A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [
            torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_BUFFERS)
        ]
        self._fetched = [_make_event() for _ in range(_NUM_BUFFERS)]
        self._next = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Begin a copy; the source has been read when this returns.

        Parameters
        ----------
        source
            On the host, any floating-point dtype, contiguous.
        target
            Of the same shape on the device, contiguous; the source is converted to its dtype.
        """
        flat_source, flat_target = source.view(-1), target.view(-1)
        step = self._buffers[0].numel() // target.element_size()
        with torch.cuda.device(self._device):
            for start in range(0, flat_target.numel(), step):
                self._copy_piece(flat_source[start : start + step], flat_target[start : start + step])

    def _copy_piece(self, source: Tensor, target: Tensor) -> None:
        buffer, fetched = self._buffers[self._next], self._fetched[self._next]
        self._next = (self._next + 1) % _NUM_BUFFERS
        fetched.synchronize()  # At once for an event that was never recorded.
        piece = buffer.view(target.dtype)[: target.numel()]
        piece.copy_(source)
        target.copy_(piece, non_blocking=True)
        fetched.record()

    def wait(self) -> None:
        """Wait until all copies are done; the buffers may go then."""
        for fetched in self._fetched:
            fetched.synchronize()


def _make_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
