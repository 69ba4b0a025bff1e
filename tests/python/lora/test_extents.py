from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lora_serve.common.errors import InternalError
from lora_serve.lora.extents import Extent, ExtentAllocator, Move

CAPACITY = 64


def allocator_with(*extents: tuple[int, int], capacity: int = CAPACITY) -> ExtentAllocator:
    """An allocator that holds exactly the given (offset, size) extents."""
    allocator = ExtentAllocator(capacity, 1)
    sizes = dict(extents)
    fillers = []
    end = 0
    for offset in [*sorted(sizes), capacity]:
        if offset > end:
            fillers.append(allocator.allocate(offset - end))
        if offset < capacity:
            assert allocator.allocate(sizes[offset]) == offset
            end = offset + sizes[offset]
    for filler in fillers:
        allocator.free(filler)
    assert allocator.extents() == [Extent(offset, size) for offset, size in sorted(extents)]
    return allocator


def all_movable(offset: int) -> bool:
    return True


def test_smallest_hole_that_fits_is_taken_and_the_lowest_of_equals():
    allocator = allocator_with((8, 4), (18, 4), (26, 4), (34, 30))  # holes of 8, 6, 4 and 4

    assert allocator.allocate(5) == 12
    assert allocator.allocate(4) == 22
    assert allocator.allocate(4) == 30
    assert allocator.allocate(8) == 0
    assert allocator.allocate(2) is None


def test_sizes_are_rounded_up_to_the_alignment_and_so_is_nothing():
    allocator = ExtentAllocator(100, 16)

    assert allocator.capacity == 96
    assert [allocator.allocate(1), allocator.allocate(17), allocator.allocate(0)] == [0, 16, 48]
    assert allocator.num_free_bytes == 96 - 16 - 32 - 16


def test_compaction_moves_the_fewest_bytes():
    # Holes of 4, 4 and 4; to join the first two, 20 bytes move, for the last two only 3.
    allocator = allocator_with((4, 20), (28, 3), (35, 29))

    assert allocator.plan_compaction(8, all_movable) == [Move(28, 24, 3)]


def test_compaction_goes_round_an_immovable_extent():
    allocator = allocator_with((4, 20), (28, 3), (35, 29))

    moves = allocator.plan_compaction(8, lambda offset: offset != 28)
    assert moves == [Move(4, 0, 20)]
    assert allocator.plan_compaction(9, lambda offset: offset != 28) is None
    assert allocator.plan_compaction(9, all_movable) == [Move(4, 0, 20), Move(28, 20, 3)]


def test_compaction_of_a_range_with_a_hole_large_enough_moves_nothing():
    assert allocator_with((4, 20)).plan_compaction(40, all_movable) == []


def test_compaction_cannot_make_more_than_the_free_bytes():
    assert allocator_with((4, 20), (28, 3)).plan_compaction(42, all_movable) is None


@pytest.mark.parametrize(
    "move", [Move(4, 0, 19), Move(5, 0, 20), Move(4, 9, 20), Move(4, -1, 20), Move(4, 45, 20)]
)
def test_move_that_does_not_fit_is_refused_and_changes_nothing(move):
    allocator = allocator_with((4, 20), (28, 3))
    before = allocator.extents()

    with pytest.raises(InternalError):
        allocator.apply([move])
    assert allocator.extents() == before
    assert allocator.num_free_bytes == CAPACITY - 23


def test_free_of_an_unknown_offset_is_refused():
    with pytest.raises(InternalError, match="offset 5"):
        allocator_with((4, 20)).free(5)


def cheapest_window(allocator: ExtentAllocator, wanted: int, immovable: set[int]) -> int | None:
    """Fewest bytes to move, by trying every run of neighbouring extents."""
    extents = allocator.extents()
    ends = [0, *(extent.offset + extent.num_bytes for extent in extents)]
    starts = [*(extent.offset for extent in extents), allocator.capacity]
    costs = []
    for first in range(len(extents) + 1):
        for last in range(first, len(extents) + 1):
            inside = extents[first:last]
            num_moved = sum(extent.num_bytes for extent in inside)
            is_movable = not any(extent.offset in immovable for extent in inside)
            if is_movable and starts[last] - ends[first] - num_moved >= wanted:
                costs.append(num_moved)
    return min(costs, default=None)


def test_eviction_takes_the_window_whose_newest_extent_is_oldest():
    allocator = allocator_with((0, 10), (10, 10), (24, 10), (34, 10), (50, 14))
    use = {0: 1, 10: 9, 24: 3, 34: 2, 50: 8}

    assert allocator.plan_eviction(20, use.get) == [24, 34]
    assert allocator.plan_eviction(14, use.get) == [34]  # with the hole behind it
    assert allocator.plan_eviction(17, use.get) == [24, 34]
    assert allocator.plan_eviction(4, use.get) == []
    assert allocator.plan_eviction(64, use.get) == [0, 10, 24, 34, 50]
    assert allocator.plan_eviction(65, use.get) is None


def test_eviction_leaves_what_has_to_stay():
    allocator = allocator_with((0, 10), (10, 10), (24, 10), (34, 10), (50, 14))
    use = {0: 1, 10: 9, 34: 2, 50: 8}

    assert allocator.plan_eviction(20, use.get) == [50]
    assert allocator.plan_eviction(21, use.get) == [34, 50]
    del use[50]
    assert allocator.plan_eviction(20, use.get) == [0, 10]
    use[50] = 8
    assert allocator.plan_eviction(30, use.get) == [34, 50]
    assert allocator.plan_eviction(31, use.get) is None


def oldest_window(allocator: ExtentAllocator, wanted: int, use: dict[int, int]) -> int | None:
    """Latest use in the window that plan_eviction shall find, by trying every run of neighbours."""
    extents = allocator.extents()
    ends = [0, *(extent.offset + extent.num_bytes for extent in extents)]
    starts = [*(extent.offset for extent in extents), allocator.capacity]
    latest = []
    for first in range(len(extents) + 1):
        for last in range(first, len(extents) + 1):
            inside = extents[first:last]
            if starts[last] - ends[first] >= wanted and all(extent.offset in use for extent in inside):
                latest.append(max((use[extent.offset] for extent in inside), default=-1))
    return min(latest, default=None)


class ExtentModel(RuleBasedStateMachine):
    """Every byte has an owner or none; the naive model that the allocator must agree with."""

    @initialize(alignment=st.sampled_from([1, 4]))
    def start(self, alignment: int) -> None:
        self.allocator = ExtentAllocator(CAPACITY, alignment)
        self.owner = [0] * self.allocator.capacity
        self.sizes: dict[int, int] = {}
        self.next_owner = 1

    @rule(num_bytes=st.integers(0, CAPACITY + 1))
    def allocate(self, num_bytes: int) -> None:
        size = self.allocator.rounded(num_bytes)
        holes = [hole for hole in self.allocator.holes() if hole.num_bytes >= size]
        offset = self.allocator.allocate(num_bytes)
        if not holes:
            assert offset is None
            return
        best = min(hole.num_bytes for hole in holes)
        assert offset == next(hole.offset for hole in holes if hole.num_bytes == best)
        self._take(offset, size)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.sizes:
            offset = data.draw(st.sampled_from(sorted(self.sizes)))
            self.allocator.free(offset)
            for byte in range(offset, offset + self.sizes.pop(offset)):
                self.owner[byte] = 0

    @rule(data=st.data(), num_bytes=st.integers(1, CAPACITY))
    def compact(self, data: st.DataObject, num_bytes: int) -> None:
        immovable = data.draw(st.sets(st.sampled_from(sorted(self.sizes)))) if self.sizes else set()
        moves = self.allocator.plan_compaction(num_bytes, lambda offset: offset not in immovable)
        wanted = self.allocator.rounded(num_bytes)
        cost = cheapest_window(self.allocator, wanted, immovable)
        if moves is None:
            assert cost is None
            assert immovable or wanted > self.allocator.num_free_bytes
            return
        assert sum(move.num_bytes for move in moves) == cost
        self.allocator.apply(moves)
        for move in moves:  # as memory would: a moved extent that was overwritten before shows
            size = self.sizes.pop(move.source_offset)
            assert move.source_offset not in immovable
            content = self.owner[move.source_offset : move.source_offset + size]
            self.owner[move.source_offset : move.source_offset + size] = [0] * size
            assert len(set(content)) == 1
            assert set(self.owner[move.target_offset : move.target_offset + size]) == {0}
            self.owner[move.target_offset : move.target_offset + size] = content
            self.sizes[move.target_offset] = size
        assert self.allocator.largest_hole >= wanted

    @rule(data=st.data(), num_bytes=st.integers(1, CAPACITY))
    def plan_eviction(self, data: st.DataObject, num_bytes: int) -> None:
        order = data.draw(st.permutations(sorted(self.sizes)))
        staying = data.draw(st.sets(st.sampled_from(order))) if order else set()
        use = {offset: index for index, offset in enumerate(order) if offset not in staying}
        victims = self.allocator.plan_eviction(num_bytes, use.get)
        expected = oldest_window(self.allocator, self.allocator.rounded(num_bytes), use)
        if victims is None:
            assert expected is None
            return
        assert max((use[victim] for victim in victims), default=-1) == expected
        for victim in victims:
            self.allocator.free(victim)
            size = self.sizes.pop(victim)
            self.owner[victim : victim + size] = [0] * size
        assert self.allocator.largest_hole >= num_bytes

    def _take(self, offset: int, size: int) -> None:
        assert set(self.owner[offset : offset + size]) == {0}
        assert offset % self.allocator.alignment == 0
        self.owner[offset : offset + size] = [self.next_owner] * size
        self.sizes[offset] = size
        self.next_owner += 1

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "allocator"):
            return
        assert self.allocator.num_free_bytes == self.owner.count(0)
        assert self.allocator.extents() == [Extent(o, self.sizes[o]) for o in sorted(self.sizes)]
        assert sum(hole.num_bytes for hole in self.allocator.holes()) == self.allocator.num_free_bytes
        assert len(self.allocator) == len(self.sizes)


TestExtentModel = ExtentModel.TestCase
TestExtentModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(st.lists(st.integers(-30, 30), max_size=30))
def test_same_calls_give_the_same_offsets(steps):
    """Positive: allocate; negative: free the extent of that index."""

    def run() -> list[int | None]:
        allocator = ExtentAllocator(CAPACITY, 1)
        given_out: list[int | None] = []
        for step in steps:
            if step > 0:
                given_out.append(allocator.allocate(step))
            elif extents := allocator.extents():
                allocator.free(extents[step % len(extents)].offset)
        return given_out

    assert run() == run()
