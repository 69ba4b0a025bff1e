"""Pinned memory that brings a step's attention plan to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

NUM_BUFFERS = 4
"""One is filled while the copies of two plans may be on their way; one more, so that nobody waits."""


class CopyEvent(Protocol):
    """What of ``torch.cuda.Event`` is used."""

    def record(self) -> None:
        """Mark the place that the current stream has reached."""

    def synchronize(self) -> None:
        """Wait until the marked place is passed."""


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class StagingRing:
    """Pinned buffers taken in turn.

    A copy from pinned memory reads it when the stream gets there, which may be long after the call: a buffer
    is written again only once the event behind its last copy has passed. All copies are on one stream.

    Parameters
    ----------
    num_buffers
        Plans whose copies may be outstanding at once without a wait.
    make_event, allocate
        An event on the current stream, and pinned bytes; tests replace them.
    """

    def __init__(
        self,
        num_buffers: int = NUM_BUFFERS,
        make_event: Callable[[], CopyEvent] = torch.cuda.Event,
        allocate: Callable[[int], Tensor] = _pinned,
    ) -> None:
        self._buffers: list[Tensor | None] = [None] * num_buffers
        self._events = [make_event() for _ in range(num_buffers)]
        self._allocate = allocate
        self._next = 0

    @contextmanager
    def buffer(self, num_bytes: int) -> Iterator[Tensor]:
        """Lend a buffer; the copies from it are submitted to the current stream before the block is left.

        Parameters
        ----------
        num_bytes
            Bytes that are needed.

        Yields
        ------
        Tensor
            [>= num_bytes] uint8, pinned, at a multiple of 16 bytes. Its contents are anything.
        """
        place = self._next
        self._next = (place + 1) % len(self._buffers)
        self._events[place].synchronize()
        buffer = self._buffers[place]
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._buffers[place] = self._allocate(2 * num_bytes)
        try:
            yield buffer
        finally:
            # Also after an error: some copies may have been submitted before it.
            self._events[place].record()
