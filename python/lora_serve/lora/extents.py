"""Where extents of unequal sizes lie in one range of bytes, and how to slide them together.

Arithmetic only: no memory is touched here, so that the host pool and the device arena share it.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_serve.common.errors import InternalError


@dataclass(frozen=True)
class Extent:
    """A half-open range of bytes ``[offset, offset + num_bytes)``; a hole has the same shape.

    Parameters
    ----------
    offset, num_bytes
        Multiples of the allocator's alignment.
    """

    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Move:
    """One extent's way to a lower offset; source and target may overlap.

    Parameters
    ----------
    source_offset, target_offset, num_bytes
        In bytes.
    """

    source_offset: int
    target_offset: int
    num_bytes: int


class ExtentAllocator:
    """Extents in the range ``[0, capacity)``.

    Owns: the list of extents. What is not in an extent is free; holes are not stored, so that the two can
    never disagree.
    Deliberately does not know: what the bytes hold, who may be moved or evicted, threads.
    Invariants: extents do not overlap and lie in ``[0, capacity)``; offsets and sizes are multiples of the
    alignment, sizes at least one; ``num_free_bytes`` is the capacity less the sum of their sizes. The same
    calls give the same offsets.
    Complexity: O(extents) for `allocate` and `plan_compaction`, with hundreds of extents some 0.1 ms.

    Parameters
    ----------
    capacity
        Bytes; what is above a multiple of the alignment is not used.
    alignment
        Bytes, >= 1; sizes are rounded up to it.

    Raises
    ------
    InternalError
        ``capacity`` is negative or ``alignment`` below 1.
    """

    def __init__(self, capacity: int, alignment: int) -> None:
        if capacity < 0 or alignment < 1:
            raise InternalError(f"an extent allocator has capacity {capacity} and alignment {alignment}")
        self.capacity = capacity // alignment * alignment
        self.alignment = alignment
        self.num_free_bytes = self.capacity
        self._offsets: list[int] = []  # ascending
        self._sizes: dict[int, int] = {}

    def __len__(self) -> int:
        """The number of extents."""
        return len(self._offsets)

    def rounded(self, num_bytes: int) -> int:
        """What an extent of ``num_bytes`` takes: the next multiple of the alignment, at least one."""
        return max(-(-num_bytes // self.alignment), 1) * self.alignment

    def extents(self) -> list[Extent]:
        """Every extent, by offset."""
        return [Extent(offset, self._sizes[offset]) for offset in self._offsets]

    def holes(self) -> list[Extent]:
        """Every free range between, before and behind the extents, by offset; none is empty."""
        gaps = zip(self._gap_starts(), [*self._offsets, self.capacity], strict=True)
        return [Extent(start, end - start) for start, end in gaps if end > start]

    @property
    def largest_hole(self) -> int:
        """Bytes of the largest hole: the largest extent that `allocate` gives now."""
        return max((hole.num_bytes for hole in self.holes()), default=0)

    def allocate(self, num_bytes: int) -> int | None:
        """Take the smallest hole that is large enough, the lowest of several.

        Returns
        -------
        int or None
            Offset of the new extent, at the start of the hole; None where no hole is large enough.
        """
        size = self.rounded(num_bytes)
        fitting = [(hole.num_bytes, hole.offset) for hole in self.holes() if hole.num_bytes >= size]
        if not fitting:
            return None
        _, offset = min(fitting)
        self._insert(offset, size)
        return offset

    def free(self, offset: int) -> None:
        """Give an extent back.

        Raises
        ------
        InternalError
            No extent starts at ``offset``.
        """
        self._remove(offset)

    def plan_compaction(self, num_bytes: int, is_movable: Callable[[int], bool]) -> list[Move] | None:
        """The cheapest way to make a hole by sliding neighbouring extents together.

        Parameters
        ----------
        num_bytes
            Size that `allocate` shall find room for.
        is_movable
            Whether the extent at an offset may be moved.

        Returns
        -------
        list of Move or None
            Among all windows (some neighbouring holes with the extents between them) without an immovable
            extent and with free bytes enough, the one with the fewest bytes to move; the fewest moves, then
            the lowest offset among equals. Its extents all go to the window's lower end. Empty where a hole
            is large enough already; None where there is no such window, which with ``num_bytes`` free means
            that immovable extents stand in the way.

        Notes
        -----
        In the order of the list no move overwrites an extent that has not moved yet. Nothing changes before
        `apply`. O(extents).
        """
        wanted = self.rounded(num_bytes)
        starts = list(self._gap_starts())
        gaps = [end - start for start, end in zip(starts, [*self._offsets, self.capacity], strict=True)]
        best: tuple[int, int, int] | None = None  # bytes moved, extents moved, index of the first one
        first = num_free = num_moved = 0
        for last, gap in enumerate(gaps):
            # The window has the gaps first..last and the extents first..last - 1 between them.
            if last > 0 and is_movable(self._offsets[last - 1]):
                num_moved += self._sizes[self._offsets[last - 1]]
            else:
                first, num_free, num_moved = last, 0, 0
            num_free += gap
            while first < last and num_free - gaps[first] >= wanted:
                num_free -= gaps[first]
                num_moved -= self._sizes[self._offsets[first]]
                first += 1
            if num_free >= wanted:
                found = (num_moved, last - first, first)
                best = found if best is None else min(best, found)
        if best is None:
            return None
        _, num_extents, first = best
        return list(self._slide(starts[first], self._offsets[first : first + num_extents]))

    def plan_eviction(self, num_bytes: int, last_use_of: Callable[[int], int | None]) -> list[int] | None:
        """Which extents to free so that a hole appears, the least recently used ones as far as possible.

        Parameters
        ----------
        num_bytes
            Size that `allocate` shall find room for.
        last_use_of
            When the extent at an offset was used last, higher = later; None = it has to stay.

        Returns
        -------
        list of int or None
            Offsets of neighbouring extents. Among all windows (as in `plan_compaction`, but here the extents'
            bytes count as well) large enough, the one whose most recently used extent is the oldest; the
            smallest, then the lowest among equals. None where extents that have to stay leave no
            such window. O(extents); nothing changes.
        """
        wanted = self.rounded(num_bytes)
        starts = list(self._gap_starts())
        uses = [last_use_of(offset) for offset in self._offsets]
        newest: deque[tuple[int, int]] = deque()  # (use, index) in the window, later ones used less recently
        best: tuple[int, int, int, int] | None = (
            None  # latest use, size of the window, its first, its last gap
        )
        first = 0
        for last, end in enumerate([*self._offsets, self.capacity]):
            # The window goes from the start of the gap `first` to the end of the gap `last`.
            use = uses[last - 1] if last > 0 else None
            if use is None:
                first = last
            else:
                while newest and newest[-1][0] <= use:
                    newest.pop()
                newest.append((use, last - 1))
            while first < last and end - starts[first + 1] >= wanted:
                first += 1
            while newest and newest[0][1] < first:
                newest.popleft()
            if end - starts[first] >= wanted:
                found = (newest[0][0] if newest else -1, end - starts[first], first, last)
                best = found if best is None else min(best, found)
        return None if best is None else self._offsets[best[2] : best[3]]

    def apply(self, moves: Sequence[Move]) -> None:
        """Give the moved extents their new offsets, in the order of the list.

        Raises
        ------
        InternalError
            A move names no extent, or would end on another extent or outside the range. The moves before it
            have been applied.
        """
        for move in moves:
            size = self._remove(move.source_offset)
            if size != move.num_bytes or not self._is_free(move.target_offset, size):
                self._insert(move.source_offset, size)
                raise InternalError(f"{move} does not fit the extents {self.extents()}")
            self._insert(move.target_offset, size)

    def _slide(self, target: int, offsets: Sequence[int]) -> Iterator[Move]:
        for offset in offsets:
            yield Move(offset, target, self._sizes[offset])
            target += self._sizes[offset]

    def _gap_starts(self) -> Iterator[int]:
        """Where each gap starts: 0 and the end of every extent."""
        yield 0
        for offset in self._offsets:
            yield offset + self._sizes[offset]

    def _is_free(self, offset: int, size: int) -> bool:
        index = bisect.bisect_right(self._offsets, offset)
        begin = 0 if index == 0 else self._offsets[index - 1] + self._sizes[self._offsets[index - 1]]
        end = self.capacity if index == len(self._offsets) else self._offsets[index]
        return begin <= offset and offset + size <= end

    def _insert(self, offset: int, size: int) -> None:
        bisect.insort(self._offsets, offset)
        self._sizes[offset] = size
        self.num_free_bytes -= size

    def _remove(self, offset: int) -> int:
        size = self._sizes.pop(offset, None)
        if size is None:
            raise InternalError(f"no extent starts at offset {offset}; extents: {self.extents()}")
        del self._offsets[bisect.bisect_left(self._offsets, offset)]
        self.num_free_bytes += size
        return size
