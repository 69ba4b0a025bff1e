"""Device memory of adapters: one allocation that never moves, one extent an adapter, compacted as needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.lora.adapter_copies import AdapterCopies, PendingCopy
from lora_serve.lora.adapter_layout import BLOCK_ALIGNMENT
from lora_serve.lora.extents import ExtentAllocator, Move


class DeviceExtent:
    """Where one adapter lies in the arena. `DeviceArena.place` makes them and may change `offset`.

    Parameters
    ----------
    buffer
        The arena's memory.
    offset, num_bytes
        Bytes, from the arena's start.
    """

    def __init__(self, buffer: Tensor, offset: int, num_bytes: int) -> None:
        self._buffer = buffer
        self.offset = offset
        self.num_bytes = num_bytes
        self._load: PendingCopy | None = None

    @property
    def tensor(self) -> Tensor:
        """[num_bytes] uint8 on the device, at the present offset: do not keep it across a `place`."""
        return self._buffer[self.offset : self.offset + self.num_bytes]

    @property
    def is_movable(self) -> bool:
        """False while a load writes it, unless that was joined."""
        if self._load is not None and self._load.is_done():
            self._load = None
        return self._load is None

    def join_load(self) -> None:
        """Let the steps that are submitted from now on begin after its load, if one is under way."""
        if self._load is not None:
            self._load.join()
            self._load = None


@dataclass(frozen=True)
class Placement:
    """What `DeviceArena.place` did.

    Parameters
    ----------
    extent
        The new extent; None = try again when a load has ended (never where loads are joined).
    moved
        Extents that have another offset now. Their table rows must be written anew before the next step.
    """

    extent: DeviceExtent | None
    moved: tuple[DeviceExtent, ...] = ()


class DeviceArena:
    """One range of device memory for the weights of all resident adapters.

    Every adapter takes its exact bytes, rounded up to ``BLOCK_ALIGNMENT``. Nothing that fits in the free
    bytes is refused for long: where no hole is large enough, neighbours are slid together on the execution
    stream, as few bytes as possible. (With pages instead, a matrix would lie in pieces and every kernel had
    to look up each piece's address; a page of 2 MB leaves on average 1 MB of each adapter unused.)

    Owns: the memory, the place of each extent.
    Deliberately does not know: adapters, slots, tables, who may go.
    Invariants: extents that were placed and not freed do not overlap; one that a load writes is not moved;
    the bytes of an extent that was freed during its load are not given away before that load is over.
    Threads: one, the one that runs the steps, between two of them. Nothing here waits for the device.

    Who may use which bytes when: an extent's bytes belong to the steps that read them until these are over,
    which must be before `free`. A move into or out of them is ordered between the steps, a load begins after
    the moves before it. They belong to the load until it was seen to be done or joined, then to the steps.

    Parameters
    ----------
    num_bytes
        Size; rounded down to ``BLOCK_ALIGNMENT``.
    device
        Where.
    copies
        The device's copies.

    Raises
    ------
    InvalidArgumentError
        The device does not have that much memory.
    """

    def __init__(self, num_bytes: int, device: torch.device | str, copies: AdapterCopies) -> None:
        self._allocator = ExtentAllocator(num_bytes, BLOCK_ALIGNMENT)
        self._copies = copies
        self._extents: dict[int, DeviceExtent] = {}  # by offset; those that were freed while loading as well
        self._freed: list[DeviceExtent] = []  # freed, but a load still writes them
        self.num_moved_bytes = 0
        try:
            self.buffer: Tensor = torch.empty(self._allocator.capacity, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"{num_bytes} bytes of device memory for adapters are more than {device} gives ({error}); "
                "lower --lora-memory-gb"
            ) from error

    @property
    def num_bytes(self) -> int:
        """The arena's size: what extents can take together."""
        return self._allocator.capacity

    @property
    def num_free_bytes(self) -> int:
        """Bytes that no extent takes, nor a load into one that was freed."""
        self._reclaim()
        return self._allocator.num_free_bytes

    def place(self, num_bytes: int, *, joins_loads: bool = False) -> Placement:
        """Room for one more adapter.

        Parameters
        ----------
        num_bytes
            Size of the extent.
        joins_loads
            What happens to loads that stand in the way. True: they are joined, so that the steps to come wait
            for them. False: they stay, and there may be no extent.

        Returns
        -------
        Placement
            With an extent wherever ``num_bytes`` are free, unless extents that loads write stand in the way.
            Loads end without anybody's help, so if no other load is started meanwhile, a later try succeeds.

        Raises
        ------
        InternalError
            Fewer bytes are free, those of freed extents under a load included.
        """
        self._reclaim()
        wanted = self._allocator.rounded(num_bytes)
        num_bytes_to_come = sum(self._allocator.rounded(extent.num_bytes) for extent in self._freed)
        if wanted > self._allocator.num_free_bytes + num_bytes_to_come:
            raise InternalError(
                f"{num_bytes} bytes are to be placed in the arena, {self._allocator.num_free_bytes} of "
                f"{self._allocator.capacity} are free and {num_bytes_to_come} will be soon"
            )
        moved: tuple[DeviceExtent, ...] = ()
        if self._allocator.largest_hole < wanted:
            moves = self._allocator.plan_compaction(num_bytes, self._is_movable)
            if moves is None and joins_loads:
                self._join_loads()
                moves = self._allocator.plan_compaction(num_bytes, self._is_movable)
            moved = self._move(moves or [])
        offset = self._allocator.allocate(num_bytes)
        if offset is None:
            return Placement(None)
        extent = self._extents[offset] = DeviceExtent(self.buffer, offset, num_bytes)
        return Placement(extent, moved)

    def load(self, extent: DeviceExtent, source: Tensor) -> PendingCopy:
        """Begin to copy an adapter into its extent, which stays where it is until the copy is done.

        Parameters
        ----------
        extent
            Placed here, not freed, without a load that is under way.
        source
            [extent.num_bytes] uint8 on the CPU, pinned for CUDA; alive and unchanged until the copy is done.

        Raises
        ------
        InternalError
            The extent is not one of the arena's, is being loaded, or has another size.
        """
        self._check(extent)
        if not extent.is_movable:
            raise InternalError(f"the extent at {extent.offset} is loaded while a load into it is under way")
        extent._load = self._copies.start_load(source, extent.tensor)
        return extent._load

    def join(self, extent: DeviceExtent) -> None:
        """Let the steps that are submitted from now on begin after the extent's load, if one is under way.

        Raises
        ------
        InternalError
            The extent is not one of the arena's, or was freed.
        """
        self._check(extent)
        extent.join_load()

    def free(self, extent: DeviceExtent) -> None:
        """Give an extent back. Every step that reads it must be over, and no later one may.

        Raises
        ------
        InternalError
            The extent is not one of the arena's, or was freed.
        """
        self._check(extent)
        self._freed.append(extent)
        self._reclaim()

    def _join_loads(self) -> None:
        for extent in self._extents.values():
            extent.join_load()
        self._reclaim()

    def _move(self, moves: Sequence[Move]) -> tuple[DeviceExtent, ...]:
        self._allocator.apply(moves)
        moved = []
        for move in moves:
            extent = self._extents.pop(move.source_offset)
            self._copies.move(self.buffer, move.source_offset, move.target_offset, move.num_bytes)
            self._extents[move.target_offset] = extent
            extent.offset = move.target_offset
            self.num_moved_bytes += move.num_bytes
            moved.append(extent)
        return tuple(moved)

    def _is_movable(self, offset: int) -> bool:
        extent = self._extents[offset]
        return extent.is_movable and extent not in self._freed

    def _reclaim(self) -> None:
        """Free what was given back during a load that is over now."""
        for extent in [extent for extent in self._freed if extent.is_movable]:
            self._freed.remove(extent)
            del self._extents[extent.offset]
            self._allocator.free(extent.offset)

    def _check(self, extent: DeviceExtent) -> None:
        if self._extents.get(extent.offset) is not extent or extent in self._freed:
            raise InternalError(f"the extent at {extent.offset} is not in the arena, or was freed")
