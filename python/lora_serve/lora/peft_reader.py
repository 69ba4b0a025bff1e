"""Reads the tensors of a checked adapter into its block: converted, as operators want them, with a digest.

The work is cut into tasks of some megabytes. The calling thread reads a task's tensors into one buffer, so
that only itself waits for a slow file. A thread of a pool digests it and brings it into the block, a call for
either. Who releases the interpreter lock has to get it back, and so has the step loop, after nearly every
call to the device: what counts is how few calls are made, by how few threads (docs/decisions/0012 and 0013).
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_serve._core import MatrixPlacement, NumbersFound, place_matrices
from lora_serve.lora.adapter_files import WEIGHTS_FILE
from lora_serve.lora.adapter_layout import MATRIX_ALIGNMENT, align
from lora_serve.lora.interpreter_lock import sharing_lock
from lora_serve.lora.load_cancelled import LoadCancelledError
from lora_serve.lora.load_problems import LoadProblems
from lora_serve.lora.peft_adapter import CheckedAdapter
from lora_serve.lora.read_plan import ReadTask, StoredMatrix, gaps, plan_tasks

_Bytes = NDArray[np.uint8]

# The file format's name of each dtype that a model can have.
_FORMAT_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_MOST_AHEAD = 3
"""Tasks that are fetched before the first of them is in the block."""


def read_into(
    checked: CheckedAdapter,
    block: Tensor,
    *,
    threads: ThreadPoolExecutor | None,
    is_cancelled: Callable[[], bool],
) -> str:
    """Fill a block with an adapter's weights.

    Parameters
    ----------
    checked
        The adapter, its file open.
    block
        [layout.num_bytes] uint8, CPU, contiguous, starting at a multiple of ``MATRIX_ALIGNMENT`` bytes. Every
        byte is written, those between the matrices with 0. What it holds after an error is undefined.
    threads
        Digest what was read and place it in the block; None = the calling thread does. Not the pool that the
        caller itself runs in: it could wait for itself.
    is_cancelled
        Asked twice a task, by several threads.

    Returns
    -------
    str
        Hex SHA-256 of what the adapter computes: modules, ranks, scalings and tensors as stored in the file.
        Equal content in another folder, or under another spelling of the keys, has the same digest, and an
        equal digest means an equal layout. It does not depend on the model's dtype.

    Raises
    ------
    InvalidArgumentError
        A tensor holds NaN or Inf, or numbers that the model's dtype cannot hold (each is named); the file is
        not any more what was checked, or cannot be read.
    LoadCancelledError
        ``is_cancelled`` gave True.
    ValueError
        ``block`` is not as described.

    Notes
    -----
    Nothing writes to the block after this has returned or raised.
    """
    _check_block(block, checked.layout.num_bytes)
    checked.weights.check_unchanged()
    tasks = plan_tasks(checked)
    target = block.numpy()
    for start, end in gaps(tasks, checked.layout.num_bytes):
        target[start:end] = 0
    results = _run_all(_BlockRead(checked, target, tasks, is_cancelled), tasks, threads)
    checked.weights.check_unchanged()
    problems = LoadProblems(checked.name)
    for result in results:
        for text in result.problems:
            problems.add_in_file(WEIGHTS_FILE, text)
    problems.raise_if_any()
    return _content_digest(checked, [result.digest for result in results])


@dataclass
class _TaskResult:
    """SHA-256 of what was read, and what is wrong with the numbers."""

    digest: bytes
    problems: list[str] = field(default_factory=list)


class _BlockRead:
    """One read of one adapter into one block; its tasks run in any threads."""

    def __init__(
        self,
        checked: CheckedAdapter,
        block: _Bytes,
        tasks: Sequence[ReadTask],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._weights = checked.weights
        self.is_cancelled = is_cancelled
        self._dtype = checked.dtype
        self._block = block
        self._is_stopped = False
        # Of tasks that have ended; appending and popping are atomic.
        self._spare_buffers: deque[_Bytes] = deque()
        self._buffer_bytes = max(map(_buffer_bytes, tasks), default=0)

    def stop(self) -> None:
        """Let the tasks that have not ended raise soon."""
        self._is_stopped = True

    def is_over(self) -> bool:
        """Whether the read was cancelled, or a task has failed."""
        return self._is_stopped or self.is_cancelled()

    def fetch(self, task: ReadTask) -> _Bytes:
        """Read the tensors of a task into a buffer; in the thread that may wait for the file.

        Returns
        -------
        numpy.ndarray
            uint8, for `place`: it begins with the tensors, each from a multiple of ``MATRIX_ALIGNMENT`` on.

        Raises
        ------
        InvalidArgumentError
            The file cannot be read or ends too early.
        LoadCancelledError
            Cancelled, or a task has failed.
        """
        try:
            self._raise_if_over()
            buffer = self._take_buffer()
            self._read(task, buffer)
        except BaseException:
            self.stop()
            raise
        return buffer

    def place(self, task: ReadTask, buffer: _Bytes) -> _TaskResult:
        """Digest what was fetched and bring it into the block; the buffer may be used for another task then.

        Raises
        ------
        LoadCancelledError
            Cancelled, or another task has failed.
        """
        try:
            self._raise_if_over()
            result = _TaskResult(hashlib.sha256(buffer[: _buffer_bytes(task)].data).digest())
            found = place_matrices(buffer, _placements(task), self._block, _FORMAT_OF[self._dtype])
            for matrix, content, numbers in zip(task, _tensors_in(buffer, task), found, strict=True):
                if numbers != NumbersFound.FINITE:
                    result.problems.append(self._describe(matrix, content, numbers))
            self._spare_buffers.append(buffer)
        except BaseException:
            self.stop()
            raise
        return result

    def _raise_if_over(self) -> None:
        if self.is_over():
            raise LoadCancelledError("cancelled while its tensors were read")

    def _take_buffer(self) -> _Bytes:
        try:
            return self._spare_buffers.pop()
        except IndexError:
            return np.empty(self._buffer_bytes, np.uint8)

    def _read(self, task: ReadTask, buffer: _Bytes) -> None:
        stored = _tensors_in(buffer, task)
        end = 0
        for content in stored:
            end += content.nbytes
            buffer[end : align(end, MATRIX_ALIGNMENT)] = 0  # Digested, too.
            end = align(end, MATRIX_ALIGNMENT)
        pieces = sorted(zip(task, stored, strict=True), key=lambda piece: piece[0].info.start)
        views: list[memoryview] = []
        first = next_start = 0
        for matrix, content in pieces:
            if views and matrix.info.start != next_start:
                self._weights.read_into(first, views)
                views = []
            if not views:
                first = next_start = matrix.info.start
            views.append(content.data)
            next_start += matrix.info.num_bytes
        self._weights.read_into(first, views)

    def _describe(self, matrix: StoredMatrix, content: _Bytes, numbers: NumbersFound) -> str:
        if numbers == NumbersFound.NOT_FINITE:
            return f"key '{matrix.key}' holds NaN or Inf, expected finite numbers: train again"
        return (
            f"key '{matrix.key}' holds values up to {_largest_magnitude(content, matrix.info.dtype):.3g}, "
            f"which {self._dtype} cannot hold; serve the model in bfloat16 or float32"
        )


def _check_block(block: Tensor, num_bytes: int) -> None:
    is_plain = block.dtype == torch.uint8 and block.device.type == "cpu" and block.is_contiguous()
    if not is_plain or block.shape != (num_bytes,) or block.data_ptr() % MATRIX_ALIGNMENT:
        raise ValueError(
            f"the block has shape {tuple(block.shape)}, dtype {block.dtype}, device {block.device} and "
            f"starts at {block.data_ptr():#x}; expected [{num_bytes}] bytes of torch.uint8 in one piece on "
            f"the CPU, starting at a multiple of {MATRIX_ALIGNMENT}"
        )


def _run_all(
    read: _BlockRead, tasks: Sequence[ReadTask], threads: ThreadPoolExecutor | None
) -> list[_TaskResult]:
    """Run all tasks; when this ends, however it does, none of them runs any more."""
    if threads is None:
        return [read.place(task, read.fetch(task)) for task in tasks]
    futures: list[Future[_TaskResult]] = []
    failures: list[BaseException] = []
    try:
        for task in sharing_lock(tasks):
            if read.is_over():
                break
            if len(futures) >= _MOST_AHEAD:
                futures[-_MOST_AHEAD].exception()  # Waits for its buffer.
            futures.append(threads.submit(read.place, task, read.fetch(task)))
    except Exception as error:
        failures.append(error)
        read.stop()
    except BaseException:
        read.stop()
        _wait(futures)
        raise
    failures = [*_wait(futures), *failures]
    for failure in failures:
        # Who stops because somebody else failed says nothing about why, nor does a pool that was closed.
        is_end = isinstance(failure, RuntimeError) and read.is_cancelled()
        if not is_end and not isinstance(failure, LoadCancelledError):
            raise failure
    if failures or len(futures) < len(tasks):
        raise LoadCancelledError("cancelled while its tensors were read")
    return [future.result() for future in futures]


def _wait(futures: Sequence[Future[_TaskResult]]) -> list[BaseException]:
    """Wait for all tasks and give their errors."""
    return [error for error in (future.exception() for future in futures) if error is not None]


def _buffer_bytes(task: ReadTask) -> int:
    return sum(align(matrix.info.num_bytes, MATRIX_ALIGNMENT) for matrix in task)


def _offsets(task: ReadTask) -> Iterator[int]:
    """Where each matrix of a task begins in its buffer."""
    sizes = (align(matrix.info.num_bytes, MATRIX_ALIGNMENT) for matrix in task[:-1])
    return itertools.accumulate(sizes, initial=0)


def _tensors_in(buffer: _Bytes, task: ReadTask) -> list[_Bytes]:
    """The stored bytes of each matrix of a task, in its buffer."""
    starts = zip(_offsets(task), task, strict=True)
    return [buffer[start : start + matrix.info.num_bytes] for start, matrix in starts]


def _placements(task: ReadTask) -> list[MatrixPlacement]:
    return [
        MatrixPlacement(
            buffer_offset=start,
            num_rows=matrix.info.shape[0],
            num_columns=matrix.info.shape[1],
            number_format=matrix.info.dtype,
            is_transposed=matrix.is_transposed,
            parts=[(part.num_rows, part.offset) for part in matrix.parts],
        )
        for start, matrix in zip(_offsets(task), task, strict=True)
    ]


def _largest_magnitude(stored: _Bytes, number_format: str) -> float:
    """Of finite numbers. NumPy, because torch would start a team of threads for the thread that asks."""
    if number_format == "BF16":
        numbers = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = stored.view(np.float32 if number_format == "F32" else np.float16)
    return float(np.abs(numbers).max())


def _content_digest(checked: CheckedAdapter, of_tasks: Sequence[bytes]) -> str:
    """Hash the modules in the order of their paths, then the tasks; every field has its length in front.

    Tasks are cut by what is stored alone, so equal tensors have equal tasks.
    """
    fields = {}
    for pair in sharing_lock(checked.pairs):
        info_a, info_b = checked.header[pair.key_a], checked.header[pair.key_b]
        shared = struct.pack("<Q", len(pair.members)) + pair.members[0].encode()
        for member, width in zip(pair.members, pair.widths, strict=True):
            fields[member] = (
                member.encode(),
                # Whose A it is belongs to the content: an equal digest means an equal layout.
                shared if len(pair.members) > 1 else b"",
                struct.pack("<Qd", pair.lora_rank, pair.scaling + 0.0),  # One zero of the two.
                info_a.dtype.encode(),
                struct.pack("<QQ", *info_a.shape),
                info_b.dtype.encode(),
                struct.pack("<QQ", width, pair.lora_rank),
            )
    of_modules = (value for _, values in sorted(fields.items()) for value in values)
    content = b"".join(struct.pack("<Q", len(value)) + value for value in (*of_modules, *of_tasks))
    return hashlib.sha256(b"lora_serve adapter content 3" + content).hexdigest()
