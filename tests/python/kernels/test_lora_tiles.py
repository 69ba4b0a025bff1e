"""The tiles that a step's groups are cut into: every token in one, groups apart, adapters first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_serve.kernels import build_lora_metadata
from lora_serve.kernels.lora_tiles import TILE_KINDS, build_lora_tiles


def cut(slots: list[int], counts: list[int], few: int, many: int) -> list[tuple[int, int, int]]:
    """Tiles of one kind, one after the other."""
    tiles = []
    starts = [sum(counts[:group]) for group in range(len(counts))]
    for slot, count, start in sorted(zip(slots, counts, starts, strict=True), key=lambda group: group[0] < 0):
        rows = many if count > many // 2 else few
        tiles += [(start + at, min(rows, count - at), slot) for at in range(0, count, rows)]
    return tiles


@pytest.mark.parametrize(
    ("slots", "counts"),
    [
        ([], []),
        ([-1], [40]),
        ([3], [33]),
        ([-1, 0, 7], [17, 16, 65]),
        ([0, 1, 2, 3], [32, 33, 64, 129]),
        ([-1, *range(9)], [1] * 10),
    ],
)
def test_groups_are_cut_into_tiles_of_every_kind(slots, counts):
    tiles = build_lora_tiles(
        torch.tensor(slots, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64), 300, 10
    )

    assert tiles.dtype == torch.int32
    assert tiles.shape == (6, 1 + 300 // 16 + 10, 3)
    for kind, (few, many) in enumerate(TILE_KINDS):
        expected = cut(slots, counts, few, many)
        num_with_adapter = sum(slot >= 0 for _, _, slot in expected)
        assert tiles[kind, 0].tolist() == [len(expected), num_with_adapter, 0]
        assert [tuple(tile) for tile in tiles[kind, 1 : 1 + len(expected)].tolist()] == expected
        assert not tiles[kind, 1 + len(expected) :].any()


def test_there_is_room_for_the_tiles_of_any_groups():
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        num_groups = int(torch.randint(1, 9, (), generator=generator))
        counts = torch.randint(1, 50, (num_groups,), generator=generator)
        mapping = torch.arange(num_groups).repeat_interleave(counts) - int(counts[0]) % 2
        metadata = build_lora_metadata(mapping, num_groups)
        tiles = metadata.tiles_of(16)
        num_tiles = int(tiles[0, 0])
        assert num_tiles <= metadata.most_tiles(16) <= len(tiles) - 1
        order = metadata.token_indices_sorted_by_lora_ids
        taken = []
        for first, num_rows, slot in tiles[1 : 1 + num_tiles].tolist():
            rows = order[first : first + num_rows]
            assert set(mapping[rows].tolist()) == {slot}
            taken += rows.tolist()
        assert sorted(taken) == list(range(len(mapping)))


def test_tiles_of_each_kind_are_found():
    metadata = build_lora_metadata(torch.tensor([0] * 300 + [1] * 20), 2)
    assert [int(metadata.tiles_of(*kind)[0, 0]) for kind in TILE_KINDS] == [21, 11, 6, 4, 7, 5]
    assert metadata.tiles_of(16).equal(metadata.tiles_of(16, 16))


def test_tiles_of_other_sizes_are_refused():
    metadata = build_lora_metadata(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match=r"no step has tiles of \(16, 32\) rows"):
        metadata.tiles_of(16, 32)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tiles: tiles[:, :3],
        lambda tiles: tiles[:5],
        lambda tiles: tiles.long(),
        lambda tiles: tiles.repeat(1, 1, 2)[:, :, ::2],
        lambda tiles: tiles.to("meta"),
    ],
    ids=["of fewer tokens", "of fewer kinds", "int64", "strided", "elsewhere"],
)
def test_tiles_that_are_not_those_of_the_step_are_refused(spoil):
    metadata = build_lora_metadata(torch.arange(100) % 2, 2)
    with pytest.raises(
        ValueError, match=r"lora_tiles has shape .* expected at least \[6, 8, 3\] for 100 tokens"
    ):
        replace(metadata, lora_tiles=spoil(metadata.lora_tiles)).tiles_of(16)
