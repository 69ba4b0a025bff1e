"""The tiles of a step: which rows, all of one adapter, a program of a LoRA kernel works on at a time.

Cut once a step, on the host, and read by every layer's kernels: a program finds its rows, how many they are,
and their slot in one entry of a list, in place of a search in the groups. A plan of the scheduler brings them
along (``csrc/scheduler/lora_tiles.h``), for everything else there is :func:`build_lora_tiles`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

TILE_KINDS: Final = ((16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (16, 128))
"""Largest numbers of rows (few, many) of a tile: many in groups of more than half as many, else few."""

SMALLEST_TILE: Final = 16
TILE_FIELDS: Final = 3
_FEW, _MANY = np.array(TILE_KINDS).T[:, :, None]  # [6, 1] each


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
        without an adapter, the first one where it exists. And how many tokens each has. Brought to the host.
    num_tokens
        T, not below the sum of the counts.
    num_groups
        The largest G of any step, max_loras + 1.

    Returns
    -------
    Tensor
        [6, 1 + T // 16 + num_groups, 3] int32 on the host, for each of `TILE_KINDS`. Entry 0: number of all
        tiles, of those with an adapter, and 0. Then the tiles of all groups with an adapter, and those of the
        group without: where the tile starts in the sorted order, its number of tokens, its slot. Behind the
        last tile all is 0.
    """
    of_groups = np.stack([slots.cpu().numpy(), counts.cpu().numpy()])
    starts = of_groups[1].cumsum() - of_groups[1]
    order = np.argsort(of_groups[0] < 0, kind="stable")
    (slot, count), start = of_groups[:, order], starts[order]
    rows = np.where(count > _MANY // 2, _MANY, _FEW)  # [6, G] of a tile
    num_tiles = -(-count // rows)
    tiles = np.zeros((len(TILE_KINDS), num_tile_entries(num_tokens, num_groups), TILE_FIELDS), dtype=np.int32)
    tiles[:, 0, 0] = num_tiles.sum(axis=1)
    tiles[:, 0, 1] = num_tiles[:, slot >= 0].sum(axis=1)
    # All tiles of all kinds at once: the group of a kind that each is of, and which of its tiles.
    group_of_kind = np.repeat(np.arange(num_tiles.size), num_tiles.ravel())
    first_tile = num_tiles.ravel().cumsum() - num_tiles.ravel()
    index = np.arange(len(group_of_kind)) - first_tile[group_of_kind]
    kind, group = np.divmod(group_of_kind, max(len(slot), 1))
    entry = 1 + (num_tiles.cumsum(axis=1) - num_tiles).ravel()[group_of_kind] + index
    most = rows.ravel()[group_of_kind]
    num_rows = np.minimum(most, count[group] - index * most)
    tiles[kind, entry] = np.stack([start[group] + index * most, num_rows, slot[group]], axis=1)
    return torch.from_numpy(tiles)


def as_lists(flat: Tensor) -> Tensor:
    """View the tiles of a plan, which lie one after the other, as [6, 1 + N, 3]."""
    return flat.view(len(TILE_KINDS), -1, TILE_FIELDS)
