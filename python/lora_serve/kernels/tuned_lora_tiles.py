"""The launch parameters of the LoRA kernels that were measured on this GPU; see `tuned_tables`.

All rows are found by class of T, element size and largest rank; those of "lora_shrink" also by input features
and number of slices, those of "lora_expand" by output features of all slices, number of slices and number of
parts of v, those of "lora_rotary_store" by the size of a head. Those of "lora_silu_mul" hold for all widths.
All must be equal but the rank: the row of the nearest one at or above is taken, its block of rank cut to what
the rank needs. What has no row is left to the heuristic in `triton_lora_tiles`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from lora_serve.kernels._triton import next_power_of_2
from lora_serve.kernels.lora_tiles import TILE_KINDS
from lora_serve.kernels.tuned_tables import int_of, read_tuned_rows

SMALLEST_BLOCK = 16
"""Of tokens, rank, and features: what the matrix units take."""


@dataclass(frozen=True)
class ShrinkTiles:
    """Launch parameters of the shrink: tokens, columns of rank and input features of one tile (>= 16).

    Adapters with more than half of `block_t_many` tokens get tiles of so many tokens and half the input
    features; 0 = none. A GPU starts programs in the order of their numbers: with `tiles_first` those of all
    tiles for one block of A come one after the other, else all programs of one tile.
    """

    block_t: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int
    block_t_many: int = 0
    tiles_first: bool = False

    @property
    def num_buffered(self) -> int:
        """Elements of x and A in a program's shared memory."""
        few, many = self.block_t + self.block_r, (self.block_t_many + self.block_r) // 2
        return self.num_stages * self.block_k * max(few, many if self.block_t_many else 0)


@dataclass(frozen=True)
class ExpandTiles:
    """Launch parameters of the expand: tokens, output features and columns of rank of one tile (>= 16).

    With `loads_y_first` the tile of y is on its way while v and B are multiplied. It takes registers.
    A program does `n_tiles` tiles of features one after the other and copies `num_stages - 1` of them ahead.
    """

    block_t: int
    block_n: int
    block_r: int
    num_warps: int
    loads_y_first: bool = False
    n_tiles: int = 1
    num_stages: int = 1

    @property
    def num_buffered(self) -> int:
        """Elements of y and B in a program's shared memory."""
        return self.num_stages * self.block_n * (self.block_t + self.block_r)


@dataclass(frozen=True)
class LoRASiluMulLaunch:
    """Launch parameters: tokens, features and columns of rank of one tile (powers of two, >= 16).

    A program does `n_tiles` tiles of features one after the other and copies `num_stages - 1` of them ahead.
    """

    block_t: int
    block_n: int
    block_r: int
    n_tiles: int
    num_warps: int
    num_stages: int

    @property
    def num_buffered(self) -> int:
        """Elements of gate, up and B in a program's shared memory."""
        return 2 * self.num_stages * self.block_n * (self.block_t + self.block_r)


@dataclass(frozen=True)
class LoRARotaryStoreLaunch:
    """Launch parameters: tokens and columns of rank of one tile (powers of two, >= 16).

    A program does `heads` heads one after the other and copies `num_stages - 1` of them ahead.
    """

    block_t: int
    block_r: int
    heads: int
    num_warps: int
    num_stages: int

    def num_buffered(self, head_dim: int) -> int:
        """Elements of queries, keys or values and B in a program's shared memory."""
        return self.num_stages * head_dim * (self.block_t + self.block_r)


@dataclass(frozen=True)
class TunedShrink:
    """How the shrink is split: P and the tiles."""

    num_parts: int
    tiles: ShrinkTiles


def tuned_shrink(
    gpu: str | None, tokens: int, num_slices: int, in_features: int, max_rank: int, element_size: int
) -> TunedShrink | None:
    """Give what was measured for a layer's shrink.

    Parameters
    ----------
    gpu
        Its name; None = no GPU.
    tokens
        Class of T.
    num_slices, in_features, max_rank
        S, H and R of the layer.
    element_size
        Bytes of a weight.

    Returns
    -------
    TunedShrink | None
        None = nothing was measured.

    Raises
    ------
    ValueError
        A table of this GPU is damaged.
    """
    by_rank = _shrink_rows(gpu).get((tokens, num_slices, in_features, element_size), {})
    row = _at_or_above(by_rank, max_rank)
    if row is None:
        return None
    return replace(row, tiles=_cut(row.tiles, max_rank))


def tuned_expand(
    gpu: str | None,
    tokens: int,
    num_slices: int,
    out_features: int,
    max_rank: int,
    num_parts: int,
    element_size: int,
) -> ExpandTiles | None:
    """Give what was measured for a layer's expand.

    Parameters
    ----------
    gpu
        Its name; None = no GPU.
    tokens
        Class of T.
    num_slices, out_features, max_rank
        S, O of all slices together, and R of the layer.
    num_parts
        P of the v that it reads.
    element_size
        Bytes of a weight.

    Returns
    -------
    ExpandTiles | None
        None = nothing was measured.

    Raises
    ------
    ValueError
        A table of this GPU is damaged.
    """
    by_rank = _expand_rows(gpu).get((tokens, num_slices, out_features, num_parts, element_size), {})
    tiles = _at_or_above(by_rank, max_rank)
    return tiles and _cut(tiles, max_rank)


def tuned_silu_mul(
    gpu: str | None, tokens: int, max_rank: int, element_size: int
) -> LoRASiluMulLaunch | None:
    """Give what was measured for `lora_silu_mul`; parameters and errors are those of `tuned_shrink`."""
    launch = _at_or_above(_silu_mul_rows(gpu).get((tokens, element_size), {}), max_rank)
    return launch and _cut(launch, max_rank)


def tuned_rotary_store(
    gpu: str | None, tokens: int, head_dim: int, max_rank: int, element_size: int
) -> LoRARotaryStoreLaunch | None:
    """Give what was measured for `lora_norm_rotary_store` and heads of `head_dim`; see `tuned_silu_mul`."""
    launch = _at_or_above(_rotary_store_rows(gpu).get((tokens, head_dim, element_size), {}), max_rank)
    return launch and _cut(launch, max_rank)


_Key = tuple[int, ...]
_Found = TypeVar("_Found", TunedShrink, ExpandTiles, LoRASiluMulLaunch, LoRARotaryStoreLaunch)
_Tiles = TypeVar("_Tiles", ShrinkTiles, ExpandTiles, LoRASiluMulLaunch, LoRARotaryStoreLaunch)


@cache
def _shrink_rows(gpu: str | None) -> dict[_Key, dict[int, TunedShrink]]:
    names = ("max_tokens", "num_slices", "in_features", "element_size")

    def read_row(row: Mapping[str, Any]) -> tuple[_Key, int, TunedShrink]:
        many = int_of(row["tiles"], "block_t_many", at_least=0)
        numbers = _numbers(row, ["block_k"], ["num_stages"], block_t_many=many)
        order = _bool_of(row["tiles"], "tiles_first")
        tiles = ShrinkTiles(**numbers, block_t_many=many, tiles_first=order)
        return _key(row, names), int_of(row, "max_rank"), TunedShrink(int_of(row, "num_parts"), tiles)

    return _by_key(read_tuned_rows(gpu, "lora_shrink", read_row))


@cache
def _expand_rows(gpu: str | None) -> dict[_Key, dict[int, ExpandTiles]]:
    names = ("max_tokens", "num_slices", "out_features", "num_parts", "element_size")

    def read_row(row: Mapping[str, Any]) -> tuple[_Key, int, ExpandTiles]:
        loads_y_first = _bool_of(row["tiles"], "loads_y_first")
        numbers = _numbers(row, ["block_n"], ["n_tiles", "num_stages"])
        return _key(row, names), int_of(row, "max_rank"), ExpandTiles(loads_y_first=loads_y_first, **numbers)

    return _by_key(read_tuned_rows(gpu, "lora_expand", read_row))


@cache
def _silu_mul_rows(gpu: str | None) -> dict[_Key, dict[int, LoRASiluMulLaunch]]:
    def read_row(row: Mapping[str, Any]) -> tuple[_Key, int, LoRASiluMulLaunch]:
        launch = LoRASiluMulLaunch(**_numbers(row, ["block_n"], ["n_tiles", "num_stages"]))
        return _key(row, ("max_tokens", "element_size")), int_of(row, "max_rank"), launch

    return _by_key(read_tuned_rows(gpu, "lora_silu_mul", read_row))


@cache
def _rotary_store_rows(gpu: str | None) -> dict[_Key, dict[int, LoRARotaryStoreLaunch]]:
    def read_row(row: Mapping[str, Any]) -> tuple[_Key, int, LoRARotaryStoreLaunch]:
        launch = LoRARotaryStoreLaunch(**_numbers(row, [], ["heads", "num_stages"]))
        return _key(row, ("max_tokens", "head_dim", "element_size")), int_of(row, "max_rank"), launch

    return _by_key(read_tuned_rows(gpu, "lora_rotary_store", read_row))


def _key(row: Mapping[str, Any], names: Sequence[str]) -> _Key:
    return tuple(int_of(row, name) for name in names)


def _numbers(
    row: Mapping[str, Any], blocks: Sequence[str], counts: Sequence[str], *, block_t_many: int = 0
) -> dict[str, int]:
    """What all tiles have, and more blocks (powers of two) and counts."""
    tiles = row["tiles"]
    if not isinstance(tiles, dict):
        raise ValueError(f"tiles is {tiles!r}, expected a table")
    all_blocks = ("block_t", "block_r", *blocks)
    numbers = {name: int_of(tiles, name, is_power_of_2=True, at_least=SMALLEST_BLOCK) for name in all_blocks}
    kind = (numbers["block_t"], block_t_many or numbers["block_t"])
    if kind not in TILE_KINDS:
        raise ValueError(f"block_t and block_t_many are {kind}, expected one of {TILE_KINDS}")
    numbers |= {name: int_of(tiles, name) for name in counts}
    return numbers | {"num_warps": int_of(tiles, "num_warps", is_power_of_2=True)}


def _bool_of(tiles: Mapping[str, Any], name: str) -> bool:
    value = tiles[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")
    return value


def _by_key(rows: list[tuple[_Key, int, _Found]]) -> dict[_Key, dict[int, _Found]]:
    """Rows by key, then by rank; where one is there twice, the first is taken."""
    table: dict[_Key, dict[int, _Found]] = {}
    for key, max_rank, found in rows:
        table.setdefault(key, {}).setdefault(max_rank, found)
    return table


def _at_or_above(by_rank: dict[int, _Found], max_rank: int) -> _Found | None:
    ranks = [rank for rank in by_rank if rank >= max_rank]
    return by_rank[min(ranks)] if ranks else None


def _cut(tiles: _Tiles, max_rank: int) -> _Tiles:
    """The same with a block of rank that is no larger than the rank needs."""
    return replace(tiles, block_r=block_of(max_rank, tiles.block_r))


def block_of(size: int, largest: int) -> int:
    """Give the block of a tile that holds `size` (>= 1): a power of two, at least `SMALLEST_BLOCK`.

    No larger than `largest`, a power of two; what does not fit is gone through in several blocks.
    """
    return min(max(next_power_of_2(size), SMALLEST_BLOCK), max(largest, SMALLEST_BLOCK))


def clear_tuned_tiles() -> None:
    """Forget what was read; for tests and tuners that change the tables."""
    for read in (_shrink_rows, _expand_rows, _silu_mul_rows, _rotary_store_rows):
        read.cache_clear()
