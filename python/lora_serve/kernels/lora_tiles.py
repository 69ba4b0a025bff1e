"""The tiles of a step: which rows, all of one adapter, a program of a LoRA kernel works on at a time.

Cut once a step and read by every layer's kernels, so that a program finds its rows, how many they are, and
their slot by one load in place of a search in the groups. A plan of the scheduler brings them along
(``csrc/scheduler/lora_tiles.h``), for everything else there is :func:`build_lora_tiles`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

TILE_KINDS: Final = ((16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (16, 128))
"""Largest numbers of rows (few, many) of a tile: many in groups of more than half as many, else few."""

SMALLEST_TILE: Final = 16
TILE_FIELDS: Final = 3


def num_tile_entries(num_tokens: int, num_groups: int) -> int:
    """Entries of one kind: a head, and as many tiles as T tokens in G groups can have at most.

    That is T // 16 + G, for ``ceil(n / 16) <= n // 16 + 1``.
    """
    return 1 + num_tokens // SMALLEST_TILE + num_groups


def build_lora_tiles(slots: Tensor, counts: Tensor, num_tokens: int, num_groups: int) -> Tensor:
    """Cut groups of tokens into tiles.

    Parameters
    ----------
    slots, counts
        [G] integers: adapter slot of each group in the order of the sorted tokens, ascending; -1 = the group
        without an adapter, the first one where it exists. And how many tokens each has.
    num_tokens
        T, not below the sum of the counts.
    num_groups
        The largest G of any step, max_loras + 1.

    Returns
    -------
    Tensor
        [6, 1 + T // 16 + num_groups, 3] int32 where ``counts`` is, for each of `TILE_KINDS`. Entry 0: number
        of all tiles, of those with an adapter, and 0. Then the tiles of all groups with an adapter, and those
        of the group without: where the tile starts in the sorted order, its number of tokens, its slot.
        Behind the last tile all is 0.
    """
    starts = counts.cumsum(0) - counts
    order = (slots < 0).to(torch.int8).argsort(stable=True)
    slots, counts, starts = slots[order], counts[order], starts[order]
    shape = (len(TILE_KINDS), num_tile_entries(num_tokens, num_groups), TILE_FIELDS)
    tiles = torch.zeros(shape, dtype=torch.int32, device=counts.device)
    for kind, (few, many) in enumerate(TILE_KINDS):
        most = torch.where(counts > many // 2, many, few)
        tiles_of_group = -(-counts // most)
        group = torch.arange(len(counts), device=counts.device).repeat_interleave(tiles_of_group)
        first_tile = tiles_of_group.cumsum(0) - tiles_of_group
        first_row = (torch.arange(len(group), device=counts.device) - first_tile[group]) * most[group]
        num_rows = torch.minimum(most[group], counts[group] - first_row)
        tiles[kind, 0, 0] = len(group)
        tiles[kind, 0, 1] = tiles_of_group[slots >= 0].sum()
        entries = torch.stack([starts[group] + first_row, num_rows, slots[group]], dim=1)
        tiles[kind, 1 : 1 + len(group)] = entries
    return tiles
