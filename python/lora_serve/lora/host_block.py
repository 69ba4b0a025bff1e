"""A block of the host pool as its holders see it, and what the pool tells about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from lora_serve.common.errors import InternalError


@dataclass
class BlockRecord:
    """What the pool knows of one block; the pool's lock guards it.

    Parameters
    ----------
    offset, num_bytes
        Where in the slab.
    num_holds
        HostBlocks that were not released.
    adapter_id
        The adapter that it is kept for; None while it is being filled, and after a drop.
    last_use
        Logical time of the last use.
    was_kept
        It had an adapter; it gets no second one.
    """

    offset: int
    num_bytes: int
    num_holds: int = 1
    adapter_id: int | None = None
    last_use: int = 0
    was_kept: bool = False


@dataclass(frozen=True)
class HostBlockState:
    """One adapter that the pool keeps.

    Parameters
    ----------
    adapter_id
        Its generation.
    num_bytes
        As reserved.
    num_leases
        Holds on it, that of who has filled it included; above 0 it is not evicted.
    last_use
        Logical time of its last use: when it was kept, leased or touched. A higher number is later.
    """

    adapter_id: int
    num_bytes: int
    num_leases: int
    last_use: int


@dataclass(frozen=True)
class HostPoolSnapshot:
    """The pool at one moment.

    Parameters
    ----------
    num_bytes, num_free_bytes, num_held_bytes
        The whole; what no block takes; what blocks take that cannot be evicted now: those with a hold,
        which are being filled, leased, or dropped and not released yet.
    num_waiters
        Threads that wait in `HostPool.reserve`.
    num_evictions
        Blocks evicted so far to make room.
    adapters
        What `HostPool.lease` would find, by generation.
    """

    num_bytes: int
    num_free_bytes: int
    num_held_bytes: int
    num_waiters: int
    num_evictions: int
    adapters: tuple[HostBlockState, ...]


class HostBlock:
    """One hold on a block of a host pool; while it lasts, the bytes stay where they are.

    `HostPool.reserve` and `HostPool.lease` make them. As a context manager it releases itself.

    Parameters
    ----------
    record
        The pool's record of the block; None once the hold was released. The pool's lock guards it.
    slab
        [slab bytes] uint8: the pool's memory.
    release
        The pool's way to end a hold.
    """

    def __init__(self, record: BlockRecord, slab: Tensor, release: Callable[[HostBlock], None]) -> None:
        self.record: BlockRecord | None = record
        self._tensor = slab[record.offset : record.offset + record.num_bytes]
        self._release = release

    @property
    def tensor(self) -> Tensor:
        """[num_bytes] uint8 on the CPU, contiguous, aligned to ``BLOCK_ALIGNMENT``; uninitialised at first.

        Raises
        ------
        InternalError
            The hold was released: the bytes may be somebody else's.
        """
        if self.record is None:
            raise InternalError("a host block is used after its release")
        return self._tensor

    def release(self) -> None:
        """End the hold, from any thread. A block that nobody kept is freed; a second call is nothing."""
        self._release(self)

    def __enter__(self) -> HostBlock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
