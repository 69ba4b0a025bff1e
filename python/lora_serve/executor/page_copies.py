"""How KV pages get from one tier to the other, and in which order with the steps that read and write them.

A write-back reads what the steps before it have computed, and a load-back overwrites pages that the steps
before it may still read: both begin after everything that was submitted to the execution stream before them.
The execution stream never waits for a copy. It need not: both ends of a copy stay as they are, and no step
reads its destination, until it is reported (`PageTransfers`). Neither does the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.executor.memcpy_batch import MemcpyBatch
from lora_serve.executor.transfer_orders import WRITE_BACK, Transfer

MAX_COPY_BYTES = 16 << 20
"""Longest piece that neighbouring pages are copied in at once. A small copy of a step, in the same
direction, may have to wait for the end of one piece; longer ones are not faster."""
_NO_TIERS = (torch.empty(0, 0), torch.empty(0, 0))


class PageCopy(Protocol):
    """A copy that was started."""

    def is_done(self) -> bool:
        """Whether nothing of it is on its way any more. Never waits; once true, it stays true."""

    @property
    def error(self) -> Exception | None:
        """Why not everything was copied, once it is done; None where it was."""


class PageCopies(Protocol):
    """The copies of one device. One thread, the one that submits the steps, calls everything."""

    def start(self, transfers: Sequence[Transfer]) -> list[PageCopy]:
        """Begin copies after everything that was submitted to the execution stream so far.

        Returns
        -------
        list of PageCopy
            [len(transfers)]; one that cannot be started has an error, and the others are started. Nothing of
            one that is done is on its way, also where it has an error.
        """

    def close(self) -> None:
        """Wait until every copy that was started is over; none may follow. Twice is nothing."""


class CpuPageCopies:
    """Copies where the device is the CPU: at once. The steps before are over when their calls return.

    Parameters
    ----------
    pool, block : Tensor
        [P, ...] and [H, ...] of the same page shape and dtype, contiguous: the pages of the two tiers.
    """

    def __init__(self, pool: Tensor, block: Tensor) -> None:
        self._tiers = _by_page(pool, block)

    def start(self, transfers: Sequence[Transfer]) -> list[PageCopy]:
        """See `PageCopies`; all are done on return."""
        return [_FinishedCopy(_error_of(self._submit, transfer)) for transfer in transfers]

    def close(self) -> None:
        """See `PageCopies`."""
        self._tiers = _NO_TIERS

    def _submit(self, transfer: Transfer) -> None:
        source, destination = self._tiers if transfer.kind == WRITE_BACK else self._tiers[::-1]
        copy_pieces(source, destination, pieces_of(transfer, max_pages=len(source)))


class CudaPageCopies:
    """Copies beside the steps of a CUDA device, on one stream for each direction.

    Parameters
    ----------
    pool : Tensor
        [P, ...] on the device, contiguous.
    block : Tensor
        [H, ...] on the CPU, contiguous, page-locked (else the calling thread waits for the copies); of the
        pool's page shape and dtype.
    execution_stream : torch.cuda.Stream or None
        The stream that runs the steps; None = whatever is the device's current stream at each `start`.
    batch : MemcpyBatch or None
        Submits all pieces of an order in one call; None = torch submits one after the other.
    max_copy_bytes : int
        As MAX_COPY_BYTES; at least a page is copied at once.
    """

    def __init__(
        self,
        pool: Tensor,
        block: Tensor,
        execution_stream: torch.cuda.Stream | None = None,
        *,
        batch: MemcpyBatch | None = None,
        max_copy_bytes: int = MAX_COPY_BYTES,
    ) -> None:
        self._tiers = _by_page(pool, block)
        self._device = pool.device
        self._execution = execution_stream
        self._write_backs, self._load_backs = (
            torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self._batch = batch
        page_bytes = pool[0].nbytes
        self._page_bytes = np.uint64(page_bytes)
        self._max_pages = max(1, max_copy_bytes // page_bytes)

    def start(self, transfers: Sequence[Transfer]) -> list[PageCopy]:
        """See `PageCopies`."""
        if not transfers:
            return []
        try:
            with torch.cuda.device(self._device):
                execution = self._execution or torch.cuda.current_stream(self._device)
                submitted = execution.record_event()
                for stream in {self._stream_of(transfer) for transfer in transfers}:
                    stream.wait_event(submitted)
                return [self._start(transfer) for transfer in transfers]
        except RuntimeError as broken:  # Before the first of them was begun: `_start` raises nothing.
            return [_FinishedCopy(broken) for _ in transfers]

    def close(self) -> None:
        """See `PageCopies`."""
        for stream in (self._write_backs, self._load_backs):
            with suppress(RuntimeError):  # A device that has failed copies nothing any more.
                stream.synchronize()
        self._tiers = _NO_TIERS

    def _start(self, transfer: Transfer) -> PageCopy:
        # The end is recorded whatever happened: some pieces may be on their way.
        error = _error_of(self._submit, transfer)
        stream = self._stream_of(transfer)
        try:
            return _CudaPageCopy(stream.record_event(), error)
        except RuntimeError as broken:
            with suppress(RuntimeError):  # A device that has failed copies nothing any more.
                stream.synchronize()
            return _FinishedCopy(error or broken)

    def _submit(self, transfer: Transfer) -> None:
        source, destination = self._tiers if transfer.kind == WRITE_BACK else self._tiers[::-1]
        stream = self._stream_of(transfer)
        pieces = pieces_of(transfer, self._max_pages)
        if self._batch is None:
            with torch.cuda.stream(stream):
                copy_pieces(source, destination, pieces)
            return
        self._batch.submit(
            source.data_ptr() + pieces.sources.astype(np.uint64) * self._page_bytes,
            destination.data_ptr() + pieces.destinations.astype(np.uint64) * self._page_bytes,
            pieces.lengths.astype(np.uint64) * self._page_bytes,
            stream,
        )

    def _stream_of(self, transfer: Transfer) -> torch.cuda.Stream:
        return self._write_backs if transfer.kind == WRITE_BACK else self._load_backs


@dataclass(frozen=True, eq=False)
class _FinishedCopy:
    error: Exception | None

    def is_done(self) -> bool:
        return True


class _CudaPageCopy:
    def __init__(self, end: torch.cuda.Event, error: Exception | None) -> None:
        self._end: torch.cuda.Event | None = end
        self.error = error

    def is_done(self) -> bool:
        if self._end is not None:
            try:
                if self._end.query():  # type: ignore[no-untyped-call]
                    self._end = None
            except RuntimeError as error:  # The device has failed: no copy will ever end.
                self._end, self.error = None, error
        return self._end is None


@dataclass(frozen=True, eq=False)
class Pieces:
    """Runs of pages that are contiguous in both tiers.

    Parameters
    ----------
    sources, destinations, lengths : numpy.ndarray
        [R] integers: piece i is of the pages [sources[i], sources[i] + lengths[i]), copied to as many from
        destinations[i] on.
    """

    sources: npt.NDArray[np.integer]
    destinations: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.integer]


_ONE = np.ones(1, dtype=np.int64)


def pieces_of(transfer: Transfer, max_pages: int) -> Pieces:
    """Cut a copy into as few pieces as possible, each of 1 to `max_pages` pages."""
    sources, destinations = transfer.source_pages, transfer.destination_pages
    num_pages = len(sources)
    if num_pages == 1:  # By far the most frequent: a decoding request has filled a page.
        return Pieces(sources, destinations, _ONE)
    index = np.arange(num_pages)
    is_new = np.ones(num_pages, dtype=np.bool_)
    is_new[1:] = (sources[1:] - sources[:-1] != 1) | (destinations[1:] - destinations[:-1] != 1)
    run_begins = np.maximum.accumulate(np.where(is_new, index, 0))
    begins = np.flatnonzero((index - run_begins) % max_pages == 0)
    lengths = np.empty_like(begins)
    lengths[:-1] = begins[1:] - begins[:-1]
    lengths[-1:] = num_pages - begins[-1:]
    return Pieces(sources[begins], destinations[begins], lengths)


def copy_pieces(source: Tensor, destination: Tensor, pieces: Pieces) -> None:
    """Copy between [P, E] and [H, E], the pages of the two tiers; with CUDA, on the current stream."""
    rows = (pieces.sources.tolist(), pieces.destinations.tolist(), pieces.lengths.tolist())
    for from_page, to_page, length in zip(*rows, strict=True):
        pages = source[from_page : from_page + length]
        destination[to_page : to_page + length].copy_(pages, non_blocking=True)


def _by_page(pool: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    return pool.view(len(pool), -1), block.view(len(block), pool[0].numel())


def _error_of(run: Callable[[Transfer], None], transfer: Transfer) -> Exception | None:
    try:
        run(transfer)
    except Exception as error:  # Whatever its type: a failed copy costs time, never the engine.
        return error
    return None
