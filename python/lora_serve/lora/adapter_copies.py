"""How adapter bytes get to the device, and in which order with the steps that read them.

Two orders matter. The *execution stream* runs the steps, and everything that must happen between two of them:
table rows, compaction moves. *Loads* run beside the steps, also beside the one that runs now, which hides
most of a load: the scheduler takes an adapter off the device only when every step that reads it is over. A
load begins after the moves before it; and no step may read its target before somebody saw that it is done, or
joined it. The host never waits for a CUDA device.

On the CPU a step is over when its call returns, so the thread that runs the steps is the execution stream.
"""

from __future__ import annotations

import ctypes
import time
from concurrent import futures
from typing import Protocol

import torch
from torch import Tensor

from lora_serve.common.errors import InternalError

_BOUNCE_BYTES = 32 << 20
"""Largest piece of a move at once. On one H100 a piece of this size takes about 25 us."""


class PendingCopy(Protocol):
    """A load that was started. Its source belongs to it until it is done, its target until then or a join."""

    def join(self) -> None:
        """Let everything that is submitted to the execution stream from now on begin after the copy.

        On CUDA the streams wait for each other, not the host; on the CPU the caller waits. Afterwards the
        target may be read, moved and given away as if the copy were done, but its source is still read.
        """

    def is_done(self) -> bool:
        """Whether the copy is over, well or not. Never waits; once true, it stays true."""

    @property
    def error(self) -> Exception | None:
        """Why the copy failed; None while it runs, and where the target holds the source's bytes."""

    @property
    def copy_ms(self) -> float | None:
        """How long the copy took, without its wait for steps; None while it runs and where it failed."""


class AdapterCopies(Protocol):
    """The copies of one device. One thread, the one that runs the steps, calls everything, between steps."""

    def start_load(self, source: Tensor, target: Tensor) -> PendingCopy:
        """Begin to copy beside the steps, after the moves so far.

        Parameters
        ----------
        source
            [N] uint8 on the CPU, contiguous, page-locked for CUDA (else the calling thread waits for the
            copy). The caller keeps it alive and unchanged until the copy is done.
        target
            [N] uint8 on the device, contiguous. No step that was submitted and is not over reads it, nor may
            steps that are submitted before the copy was seen to be done, or was joined.

        Raises
        ------
        InternalError
            The tensors do not fit together, or the copies are closed.
        """

    def move(self, buffer: Tensor, source_offset: int, target_offset: int, num_bytes: int) -> None:
        """Move bytes inside `buffer` [N] uint8, in order with the steps. The ranges may overlap.

        Raises
        ------
        InternalError
            A range is not inside the buffer.
        """

    def write_row(self, target: Tensor, source: Tensor) -> None:
        """Overwrite a row, in order with the steps. The source may be changed as soon as this returns.

        Parameters
        ----------
        target, source
            [N] uint8 each, small, on the device and on the CPU.

        Raises
        ------
        InternalError
            The tensors do not fit together.
        """

    def close(self) -> None:
        """Wait until every load that was started is over; none may follow. Twice is nothing."""


class CpuCopies:
    """Copies where the device is the CPU: a thread carries out the loads."""

    def __init__(self) -> None:
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="lora-serve-copies")
        self._is_closed = False

    def start_load(self, source: Tensor, target: Tensor) -> PendingCopy:
        """See `AdapterCopies`."""
        _check_pair(source, target)
        if self._is_closed:
            raise InternalError("a load is started after the copies were closed")
        return _CpuCopy(self._thread.submit(_timed_copy_ms, source, target))

    def move(self, buffer: Tensor, source_offset: int, target_offset: int, num_bytes: int) -> None:
        """See `AdapterCopies`."""
        _check_move(buffer, source_offset, target_offset, num_bytes)
        start = buffer.data_ptr()
        ctypes.memmove(start + target_offset, start + source_offset, num_bytes)

    def write_row(self, target: Tensor, source: Tensor) -> None:
        """See `AdapterCopies`."""
        _check_pair(source, target)
        target.copy_(source)

    def close(self) -> None:
        """See `AdapterCopies`."""
        self._is_closed = True
        self._thread.shutdown()


class _CpuCopy:
    def __init__(self, future: futures.Future[float]) -> None:
        self._future = future

    def join(self) -> None:
        futures.wait([self._future])

    def is_done(self) -> bool:
        return self._future.done()

    @property
    def error(self) -> Exception | None:
        if not self._future.done():
            return None
        error = self._future.exception()
        return error if error is None or isinstance(error, Exception) else InternalError(repr(error))

    @property
    def copy_ms(self) -> float | None:
        return self._future.result() if self._future.done() and self.error is None else None


class CudaCopies:
    """Copies to a CUDA device: loads on a stream of their own, the rest on the execution stream.

    Parameters
    ----------
    device
        The CUDA device.
    execution_stream
        The stream that runs the steps; None = the device's current stream of the calling thread.
    bounce_bytes
        Size of the buffer on the device through which overlapping moves go, >= 1.
    """

    def __init__(
        self,
        device: torch.device | str,
        execution_stream: torch.cuda.Stream | None = None,
        bounce_bytes: int = _BOUNCE_BYTES,
    ) -> None:
        self._execution = execution_stream or torch.cuda.current_stream(device)
        self._loads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._execution):
            self._bounce = torch.empty(bounce_bytes, dtype=torch.uint8, device=device)
        # Behind what is on the execution stream now, later behind the newest move: loads begin after it.
        self._moved = self._execution.record_event()
        self._is_closed = False

    def start_load(self, source: Tensor, target: Tensor) -> PendingCopy:
        """See `AdapterCopies`."""
        _check_pair(source, target)
        if self._is_closed:
            raise InternalError("a load is started after the copies were closed")
        self._loads.wait_event(self._moved)
        begin, end = (_timing_event() for _ in range(2))
        with torch.cuda.stream(self._loads):
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
        return _CudaCopy(begin, end, self._execution)

    def move(self, buffer: Tensor, source_offset: int, target_offset: int, num_bytes: int) -> None:
        """See `AdapterCopies`."""
        _check_move(buffer, source_offset, target_offset, num_bytes)
        distance = abs(target_offset - source_offset)
        if distance == 0:
            return
        # A piece no longer than the distance does not overlap its own target and needs no bounce buffer.
        is_direct = distance >= min(num_bytes, self._bounce.numel())
        step = distance if is_direct else self._bounce.numel()
        begins = range(0, num_bytes, step)
        with torch.cuda.stream(self._execution):
            # Down: from the low end, up: from the high end, so that no piece overwrites one still to come.
            for begin in begins if target_offset < source_offset else reversed(begins):
                size = min(step, num_bytes - begin)
                piece = buffer[source_offset + begin : source_offset + begin + size]
                if not is_direct:
                    piece = self._bounce[:size].copy_(piece)
                buffer[target_offset + begin : target_offset + begin + size].copy_(piece)
        self._moved = self._execution.record_event()

    def write_row(self, target: Tensor, source: Tensor) -> None:
        """See `AdapterCopies`."""
        _check_pair(source, target)
        with torch.cuda.stream(self._execution):
            # torch gives a pinned buffer to somebody else only after the copies from it are over on the
            # device: a ring of pinned buffers, without a limit at which the host would have to wait.
            staging = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=True)
            target.copy_(staging.copy_(source), non_blocking=True)

    def close(self) -> None:
        """See `AdapterCopies`."""
        self._is_closed = True
        self._loads.synchronize()


class _CudaCopy:
    def __init__(
        self, begin: torch.cuda.Event, end: torch.cuda.Event, execution_stream: torch.cuda.Stream
    ) -> None:
        self._begin = begin
        self._end = end
        self._execution = execution_stream
        self._copy_ms: float | None = None
        self.error: Exception | None = None

    def join(self) -> None:
        self._execution.wait_event(self._end)

    def is_done(self) -> bool:
        if self._copy_ms is None and self.error is None:
            try:
                if self._end.query():  # type: ignore[no-untyped-call]
                    self._copy_ms = self._begin.elapsed_time(self._end)
            except RuntimeError as error:  # the device has failed: no copy will ever end
                self.error = error
        return self._copy_ms is not None or self.error is not None

    @property
    def copy_ms(self) -> float | None:
        return self._copy_ms if self.is_done() else None


def _timed_copy_ms(source: Tensor, target: Tensor) -> float:
    begin = time.perf_counter()
    # NumPy copies in this thread alone: torch would start a team of threads beside that of the steps. Both
    # let go of the interpreter lock meanwhile.
    target.numpy()[:] = source.numpy()
    return (time.perf_counter() - begin) * 1e3


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _check_pair(source: Tensor, target: Tensor) -> None:
    for tensor in (source, target):
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise InternalError(f"a copy of {tensor.dtype} {tuple(tensor.shape)}, expected contiguous bytes")
    if source.device.type != "cpu" or source.numel() != target.numel():
        raise InternalError(
            f"a copy of {source.numel()} bytes on {source.device} to {target.numel()} on {target.device}"
        )


def _check_move(buffer: Tensor, source_offset: int, target_offset: int, num_bytes: int) -> None:
    low, high = min(source_offset, target_offset), max(source_offset, target_offset)
    if low < 0 or num_bytes < 0 or high + num_bytes > buffer.numel():
        raise InternalError(
            f"a move of {num_bytes} bytes from {source_offset} to {target_offset} in {buffer.numel()} bytes"
        )
