"""What has to be read for an adapter: which bytes of the file go where in the block, cut into tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_serve.lora.interpreter_lock import sharing_lock
from lora_serve.lora.peft_adapter import CheckedAdapter
from lora_serve.lora.safetensors_header import TensorInfo

TASK_BYTES = 4 << 20
"""Bytes of the file a task: small enough for the cache, large enough that few calls are made.

Digests depend on it: with another size, what was loaded is other content, also where it is not.
"""


@dataclass(frozen=True)
class MatrixPart:
    """Rows of a stored matrix that become one matrix of the block.

    Parameters
    ----------
    module
        The module whose matrix it is; of an A that several share, the first.
    first_row, num_rows
        Rows of the stored matrix.
    offset, num_bytes
        Bytes of the block.
    """

    module: str
    first_row: int
    num_rows: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class StoredMatrix:
    """One tensor of the file and where it goes.

    Parameters
    ----------
    key, info
        The tensor.
    half
        ``"A"`` or ``"B"``.
    is_transposed
        True: the block has each part's columns as rows.
    parts
        Cover all rows.
    """

    key: str
    info: TensorInfo
    half: str
    is_transposed: bool
    parts: tuple[MatrixPart, ...]


ReadTask = tuple[StoredMatrix, ...]


def plan_tasks(checked: CheckedAdapter) -> list[ReadTask]:
    """Cut the work into tasks, in the order of module paths, which is mostly that of the file too."""
    tasks: list[ReadTask] = []
    matrices: list[StoredMatrix] = []
    num_bytes = 0
    for matrix in sharing_lock(_matrices(checked)):
        matrices.append(matrix)
        num_bytes += matrix.info.num_bytes
        if num_bytes >= TASK_BYTES:
            tasks.append(tuple(matrices))
            matrices, num_bytes = [], 0
    if matrices:
        tasks.append(tuple(matrices))
    return tasks


def gaps(tasks: Sequence[ReadTask], num_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a block that no matrix fills.

    Parameters
    ----------
    tasks
        All tasks of the block.
    num_bytes
        The block's size.
    """
    end = 0
    parts = [part for task in tasks for matrix in task for part in matrix.parts]
    for part in sharing_lock(sorted(parts, key=lambda part: part.offset)):
        if part.offset > end:
            yield end, part.offset
        end = part.offset + part.num_bytes
    if num_bytes > end:
        yield end, num_bytes


def _matrices(checked: CheckedAdapter) -> Iterator[StoredMatrix]:
    """Yield A and B of every pair."""
    modules = {module.module: module for module in checked.layout.modules}
    for pair in checked.pairs:
        members = [modules[member] for member in pair.members]
        row_bytes = pair.lora_rank * checked.dtype.itemsize
        num_a_bytes = pair.in_features * row_bytes
        parts = [MatrixPart(members[0].module, 0, pair.lora_rank, members[0].a_offset, num_a_bytes)]
        yield _matrix(pair.key_a, "A", checked, parts, is_transposed=pair.is_embedding)
        parts = []
        first_row = 0
        for member, width in zip(members, pair.widths, strict=True):
            parts.append(MatrixPart(member.module, first_row, width, member.b_offset, width * row_bytes))
            first_row += width
        yield _matrix(pair.key_b, "B", checked, parts, is_transposed=True)


def _matrix(
    key: str, half: str, checked: CheckedAdapter, parts: Sequence[MatrixPart], *, is_transposed: bool
) -> StoredMatrix:
    return StoredMatrix(key, checked.header[key], half, is_transposed, tuple(parts))
