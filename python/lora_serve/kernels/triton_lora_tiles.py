"""How the Triton LoRA kernels split a step into programs, and how a program finds its rows.

Tiles of tokens
---------------
A tile is up to BLOCK_T rows of one adapter. The tiles of all groups are numbered without a scan: those of
group g, whose rows start at ``start_g`` in the sorted order, begin at::

    first_tile_g = start_g // BLOCK_T + g

That leaves room for each group's ``ceil(n_g / BLOCK_T)`` tiles, since ``ceil(n / B) <= n // B + 1``. So T
rows in G groups have at most ``T // BLOCK_T + G`` tile numbers, whatever the groups are: grids come from T
and the largest number of groups, never from values on the device, and one CUDA graph serves every mix of
adapters. Programs go through the tile numbers in strides; those without a tile end at once.

Everything that a kernel is compiled for depends on the layer and on the class of T (`TOKEN_CLASSES`), so that
one launch of each class at start-up compiles all. The numbers here are a first choice, not yet measured.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from lora_serve.kernels._triton import ceil_div, jit, next_power_of_2, tl
from lora_serve.kernels.lora_metadata import LoRAMetadata

TOKEN_CLASSES = (4, 32, 256, 1024, 1 << 30)
"""Largest T of each class. Up to 256 tokens a step is taken for decodes: few rows of each adapter."""

# Views of a plan's block and of the tables start anywhere, and sizes differ from step to step: a kernel that
# is compiled for their alignment or value would be compiled again and again while it serves.
NOT_SPECIALIZED = (
    "a_offset_ptr",
    "b_offset_ptr",
    "rank_ptr",
    "scaling_ptr",
    "mapping_ptr",
    "token_ids_ptr",
    "order_ptr",
    "counts_ptr",
    "starts_ptr",
    "slots_ptr",
    "num_tokens",
    "num_groups",
    "num_slots",
)

_DECODE_TOKENS = 256
_TARGET_PROGRAMS = 1024
"""Programs wanted on a large GPU; where there would be more, each takes several tiles of tokens."""


class LoRASlotTable(Protocol):
    """Where the weights of each adapter slot lie, L slots by S slices; see `DeviceLayerTable`."""

    @property
    def a_offset(self) -> Tensor:
        """[L, S] int64: start of A in elements, from the arena's start."""

    @property
    def b_offset(self) -> Tensor:
        """[L, S] int64: start of B."""

    @property
    def lora_rank(self) -> Tensor:
        """[L, S] int32: 0 = no module, -1 = no adapter in the slot."""

    @property
    def scaling(self) -> Tensor:
        """[L, S] float32."""


@dataclass(frozen=True)
class ShrinkTiles:
    """Launch parameters of the shrink: tokens, columns of rank and input features of one tile (>= 16)."""

    block_t: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandTiles:
    """Launch parameters of the expand: tokens, output features and columns of rank of one tile (>= 16)."""

    block_t: int
    block_n: int
    block_r: int
    num_warps: int


def token_class(num_tokens: int) -> int:
    """The largest T of the class of `num_tokens`."""
    return TOKEN_CLASSES[bisect_left(TOKEN_CLASSES, num_tokens)]


def _block(size: int, largest: int) -> int:
    return min(max(next_power_of_2(size), 16), max(largest, 16))


@cache
def choose_shrink_tiles(tokens: int, in_features: int, max_rank: int, element_size: int) -> ShrinkTiles:
    """Tiles of the shrink for a class of T, H input features of `element_size` bytes, and any rank."""
    if tokens <= _DECODE_TOKENS:
        block_r = 16 if max_rank <= 64 else _block(max_rank // 4, 64)
        block_k = _block(in_features, 8192 // block_r // element_size)
        return ShrinkTiles(16, block_r, block_k, num_warps=4, num_stages=3)
    block_k = _block(in_features, 128 // element_size)
    return ShrinkTiles(64, _block(max_rank, 64), block_k, num_warps=4, num_stages=4)


@cache
def choose_num_parts(tokens: int, num_slices: int, in_features: int, max_rank: int) -> int:
    """P: among how many programs the H input features of one tile of the shrink are split, a power of two.

    Few rows leave a GPU idle unless their input features are split. Each part costs the expand one more
    read of v, the more the more rows there are.
    """
    if tokens == TOKEN_CLASSES[-1]:
        return 1
    tiles = choose_shrink_tiles(tokens, in_features, max_rank, 2)
    programs = ceil_div(tokens, tiles.block_t) * num_slices * ceil_div(max_rank, tiles.block_r)
    most, wanted = (8, 256) if tokens <= _DECODE_TOKENS else (4, 128)
    if tokens == TOKEN_CLASSES[0]:
        most = 16
    num_parts = 1
    while num_parts < most and num_parts * programs < wanted and in_features >= 2 * num_parts * tiles.block_k:
        num_parts *= 2
    return num_parts


@cache
def choose_expand_tiles(tokens: int, out_features: int, max_rank: int) -> ExpandTiles:
    """Tiles of the expand for a class of T and O output features of all slices together."""
    if tokens <= _DECODE_TOKENS:
        block_n = 128 if out_features > 8192 else 64
        return ExpandTiles(16, _block(out_features, block_n), _block(max_rank, 128), num_warps=4)
    return ExpandTiles(64, _block(out_features, 128), _block(max_rank, 64), num_warps=4)


def num_groups_of(metadata: LoRAMetadata) -> int:
    """G: the largest number of groups that the step's T tokens can form, known without the device."""
    return min(metadata.num_tokens, metadata.active_lora_ids.shape[0])


def choose_groups_block(metadata: LoRAMetadata) -> int:
    """How many groups a kernel reads at once: within one warp for few tokens, else all there can be."""
    largest = max(next_power_of_2(metadata.active_lora_ids.shape[0]), 2)
    return min(largest, TOKEN_CLASSES[1]) if metadata.num_tokens <= TOKEN_CLASSES[1] else largest


@cache
def choose_num_tile_programs(num_tokens: int, num_groups: int, block_t: int, programs_per_tile: int) -> int:
    """How many programs share the tile numbers: one each, unless that is more than a GPU can use."""
    num_tiles = num_tokens // block_t + num_groups
    return min(num_tiles, max(ceil_div(_TARGET_PROGRAMS, programs_per_tile), ceil_div(num_tokens, block_t)))


def check_metadata(metadata: LoRAMetadata, rows: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless the grouping is one of the rows of a tensor."""
    if metadata.num_tokens != rows.shape[0]:
        raise ValueError(
            f"{name} has {rows.shape[0]} rows, the metadata {metadata.num_tokens} tokens: expected the same"
        )
    order = metadata.token_indices_sorted_by_lora_ids
    if order.dtype != torch.int32 or order.device != rows.device:
        raise ValueError(
            f"the metadata is {order.dtype} on {order.device}, expected int32 on {rows.device} as {name}"
        )


def metadata_of_tensors(
    order: Tensor, num_tokens_per_lora: Tensor, start_loc: Tensor, active_lora_ids: Tensor
) -> LoRAMetadata:
    """The grouping made of what a torch operator is given; it has no slot for each token."""
    return LoRAMetadata(order, order, num_tokens_per_lora, start_loc, active_lora_ids, no_adapter=False)


@dataclass(frozen=True)
class SlotTensors:
    """A table made of what a torch operator is given; see `LoRASlotTable`."""

    a_offset: Tensor
    b_offset: Tensor
    lora_rank: Tensor
    scaling: Tensor


@jit
def load_groups(
    counts_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_groups: tl.tensor,
    GROUPS_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WITH_BASE: tl.constexpr,
) -> tl.tensor:
    """First tile number of each group, 2**30 for a group without work; and the end of all numbers."""
    group = tl.arange(0, GROUPS_BLOCK)
    inside = group < num_groups
    count = tl.load(counts_ptr + group, mask=inside, other=0)
    start = tl.load(starts_ptr + group, mask=inside, other=0)
    has_work = count > 0
    if not WITH_BASE:
        has_work = has_work & (tl.load(slots_ptr + group, mask=inside, other=-1) >= 0)
    first_tile = start // BLOCK_T + group
    end = tl.max(tl.where(has_work, first_tile + (count + BLOCK_T - 1) // BLOCK_T, 0), axis=0)
    return tl.where(has_work, first_tile, 1 << 30), end


@jit
def find_group(first_tile: tl.tensor, tile: tl.tensor, GROUPS_BLOCK: tl.constexpr) -> tl.tensor:
    """The last group that starts at a tile number or before it, -1 where there is none."""
    return tl.max(tl.where(first_tile <= tile, tl.arange(0, GROUPS_BLOCK), -1), axis=0)


@jit
def load_slot(
    slot_ptr: tl.tensor, rank_ptr: tl.tensor, num_slots: tl.tensor, stride: tl.tensor, MAX_RANK: tl.constexpr
) -> tl.tensor:
    """A group's slot, the row of the tables to read (0 where there is none), and the rank found there.

    The rank is -1 where there is no such slot, and where v has too few columns for the rank.
    """
    slot = tl.load(slot_ptr)
    has_row = (slot >= 0) & (slot < num_slots)
    row = tl.where(has_row, slot, 0).to(tl.int64)
    rank = tl.load(rank_ptr + row * stride)
    return slot, row, tl.where(has_row & (rank <= MAX_RANK), rank, -1)
