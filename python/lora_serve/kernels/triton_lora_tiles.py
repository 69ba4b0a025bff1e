"""How the Triton LoRA kernels split a step into programs, and how a program finds its rows.

Tiles of tokens
---------------
A tile is up to BLOCK_T rows of one adapter. Which there are is part of the step's metadata (`lora_tiles`) and
lies on the device. There are at most ``T // BLOCK_T + G`` of T rows in G groups, whatever the groups are:
grids come from T and the largest number of groups, never from values on the device, and one CUDA graph serves
every mix of adapters. Programs go through the tiles in strides; those without a tile end at once, but each
takes a turn on a multiprocessor. So there are no more than find room on a GPU at a time, or than the tokens
of a single adapter need.

Everything that a kernel is compiled for depends on the GPU, on the layer and on the class of T
(`TOKEN_CLASSES`), so that one launch of each class at start-up compiles all. What was measured on this GPU
(`tuned_lora_tiles`) is taken; the numbers here are for all other GPUs and shapes, and for the interpreter.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from lora_serve.kernels._triton import ceil_div, jit, tl
from lora_serve.kernels.lora_delta import FEW_TOKENS
from lora_serve.kernels.lora_metadata import LoRAMetadata
from lora_serve.kernels.tuned_lora_tiles import (
    SMALLEST_BLOCK,
    ExpandTiles,
    LoRARotaryStoreLaunch,
    LoRASiluMulLaunch,
    ShrinkTiles,
    block_of,
    clear_tuned_tiles,
    tuned_expand,
    tuned_rotary_store,
    tuned_shrink,
    tuned_silu_mul,
)
from lora_serve.kernels.tuned_tables import current_gpu

__all__ = [
    "DECODE_TOKENS",
    "MIXED_TOKENS",
    "NOT_SPECIALIZED",
    "TOKEN_CLASSES",
    "ExpandTiles",
    "LoRASlotTable",
    "ShrinkTiles",
    "SlotTensors",
    "TrialTiles",
    "check_metadata",
    "choose_expand_tiles",
    "choose_num_parts",
    "choose_num_tile_programs",
    "choose_rotary_store_launch",
    "choose_shrink_tiles",
    "choose_silu_mul_launch",
    "clear_choices",
    "default_expand_tiles",
    "default_num_parts",
    "default_rotary_store_launch",
    "default_shrink_tiles",
    "default_silu_mul_launch",
    "load_num_tiles",
    "load_rank",
    "load_tile",
    "metadata_of_tensors",
    "token_class",
    "trial_tiles",
]

TOKEN_CLASSES = (1, 8, 32, 128, 512, 2048, 1 << 30)
"""Largest T of each class."""

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
    "tiles_ptr",
    "num_tokens",
    "num_slots",
)

DECODE_TOKENS, MIXED_TOKENS = 128, 512
"""Bounds of classes of T: decodes alone, and decodes beside a piece of a prefill."""
_MULTIPROCESSORS, _SHARED_BYTES, _MOST_WARPS = 132, 227 << 10, 32
"""Of a large GPU: multiprocessors, and of each the bytes of shared memory and the warps that find room at a
time, with about 64 registers a thread.
"""


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
class TrialTiles:
    """What a tuner wants instead of tuned numbers and heuristics; None = those."""

    num_parts: int | None = None
    shrink: ShrinkTiles | None = None
    expand: ExpandTiles | None = None


_trial = TrialTiles()


def token_class(num_tokens: int) -> int:
    """The largest T of the class of `num_tokens`."""
    return TOKEN_CLASSES[bisect_left(TOKEN_CLASSES, num_tokens)]


def default_shrink_tiles(tokens: int, in_features: int, max_rank: int, element_size: int) -> ShrinkTiles:
    """Tiles of the shrink where none were measured."""
    if tokens == 1 or (FEW_TOKENS < tokens <= MIXED_TOKENS and max_rank <= 32):
        block_r = 16 if max_rank <= 64 else block_of(max_rank // 4, 64)
        block_k = block_of(in_features, 8192 // block_r // element_size)
        return ShrinkTiles(16 if tokens <= 128 else 32, block_r, block_k, num_warps=4, num_stages=3)
    if tokens <= FEW_TOKENS:
        # It runs beside the base product: programs so few that all find room at once, each of the whole rank.
        return ShrinkTiles(16, block_of(max_rank, 64), block_of(in_features, 256 // element_size), 4, 4)
    if tokens <= MIXED_TOKENS:
        block_t, block_k = 16 if tokens <= 128 else 32, block_of(in_features, 256 // element_size)
        many = 128 if element_size == 2 and block_k > SMALLEST_BLOCK and tokens <= 128 else 0
        return ShrinkTiles(block_t, block_of(max_rank, 64), block_k, 4, num_stages=4, block_t_many=many)
    block_k = block_of(in_features, 128 // element_size)
    return ShrinkTiles(64, block_of(max_rank, 64), block_k, num_warps=4, num_stages=4)


def default_num_parts(tokens: int, num_slices: int, in_features: int, max_rank: int) -> int:
    """P where none was measured: a power of two."""
    if tokens == TOKEN_CLASSES[-1]:
        return 1
    tiles = default_shrink_tiles(tokens, in_features, max_rank, 2)
    programs = ceil_div(tokens, tiles.block_t) * num_slices * ceil_div(max_rank, tiles.block_r)
    most, wanted = (8 if max_rank <= 32 else 4, 256) if tokens <= MIXED_TOKENS else (4, 128)
    if tokens == 1:
        most = 16
    elif tokens <= FEW_TOKENS:
        most = 4
    num_parts = 1
    while num_parts < most and num_parts * programs < wanted and in_features >= 2 * num_parts * tiles.block_k:
        num_parts *= 2
    return num_parts


def default_expand_tiles(tokens: int, out_features: int, max_rank: int, element_size: int) -> ExpandTiles:
    """Tiles of the expand where none were measured."""
    if tokens <= MIXED_TOKENS:
        block_t = 16 if tokens <= 128 else 32
        block_n = 64 if tokens <= FEW_TOKENS and out_features <= 8192 else 128
        return ExpandTiles(block_t, block_of(out_features, block_n), block_of(max_rank, 128), num_warps=4)
    if element_size == 2 and max_rank <= 128:
        n_tiles = min(8, ceil_div(out_features, 64))
        return ExpandTiles(64, 64, block_of(max_rank, 128), num_warps=4, n_tiles=n_tiles, num_stages=3)
    return ExpandTiles(64, block_of(out_features, 128), block_of(max_rank, 64), num_warps=4)


def default_silu_mul_launch(tokens: int, max_rank: int, element_size: int) -> LoRASiluMulLaunch:
    """Launch of `lora_silu_mul` where none was measured."""
    if element_size > 2:  # No tensor cores, twice the memory: small tiles.
        return LoRASiluMulLaunch(16, 64, block_of(max_rank, 32), n_tiles=1, num_warps=4, num_stages=1)
    block_r = block_of(max_rank, 128)
    if tokens <= DECODE_TOKENS:
        n_tiles = 4 if block_r > 32 else 8
        return LoRASiluMulLaunch(16, 64, block_r, n_tiles=n_tiles, num_warps=4, num_stages=2)
    if block_r <= 64:
        block_t, block_n = (32, 64) if block_r <= 32 else (64, 32)
        if tokens <= MIXED_TOKENS:
            block_t, block_n = 16, 64
        return LoRASiluMulLaunch(block_t, block_n, block_r, n_tiles=8, num_warps=4, num_stages=3)
    return LoRASiluMulLaunch(64, 64, block_r, n_tiles=4, num_warps=4, num_stages=2)


def default_rotary_store_launch(
    tokens: int, head_dim: int, max_rank: int, element_size: int
) -> LoRARotaryStoreLaunch:
    """Launch of `lora_norm_rotary_store` where none was measured."""
    if element_size > 2:  # No tensor cores, twice the memory: small tiles.
        return LoRARotaryStoreLaunch(16, block_of(max_rank, 32), heads=1, num_warps=4, num_stages=1)
    block_r = block_of(max_rank, 128)
    if tokens <= DECODE_TOKENS:
        heads = 1 if tokens <= FEW_TOKENS or block_r > 32 else 2
        return LoRARotaryStoreLaunch(16, block_r, heads=heads, num_warps=4, num_stages=1)
    if head_dim <= 128 and block_r <= 64:
        block_t = 16 if tokens <= MIXED_TOKENS else 64
        return LoRARotaryStoreLaunch(block_t, block_r, heads=4, num_warps=4, num_stages=3)
    # More stages, or larger blocks, would not fit a GPU with 99 KB of shared memory.
    num_stages = 1 if head_dim > 128 and block_r > 64 else 2
    if head_dim > 128 and max_rank > 128:
        block_r = 64
    return LoRARotaryStoreLaunch(64, block_r, heads=4, num_warps=8, num_stages=num_stages)


@cache
def choose_shrink_tiles(
    tokens: int, in_features: int, max_rank: int, element_size: int, num_slices: int = 1
) -> ShrinkTiles:
    """Tiles of the shrink for a class of T, and for S slices of H input features of `element_size` bytes."""
    if _trial.shrink is not None:
        return _trial.shrink
    tuned = tuned_shrink(current_gpu(), tokens, num_slices, in_features, max_rank, element_size)
    return tuned.tiles if tuned else default_shrink_tiles(tokens, in_features, max_rank, element_size)


@cache
def choose_num_parts(
    tokens: int, num_slices: int, in_features: int, max_rank: int, element_size: int = 2
) -> int:
    """P: among how many programs the H input features of one tile of the shrink are split.

    Few rows leave a GPU idle unless their input features are split. Each part costs the expand one more
    read of v, the more the more rows there are.
    """
    if _trial.num_parts is not None:
        return _trial.num_parts
    tuned = tuned_shrink(current_gpu(), tokens, num_slices, in_features, max_rank, element_size)
    return tuned.num_parts if tuned else default_num_parts(tokens, num_slices, in_features, max_rank)


@cache
def choose_expand_tiles(
    tokens: int,
    out_features: int,
    max_rank: int,
    num_slices: int = 1,
    num_parts: int = 1,
    element_size: int = 2,
) -> ExpandTiles:
    """Tiles of the expand for a class of T, O output features of all S slices together, and P parts of v."""
    if _trial.expand is not None:
        return _trial.expand
    layer = (num_slices, out_features, max_rank, num_parts, element_size)
    tuned = tuned_expand(current_gpu(), tokens, *layer)
    return tuned or default_expand_tiles(tokens, out_features, max_rank, element_size)


@cache
def choose_silu_mul_launch(tokens: int, max_rank: int, element_size: int) -> LoRASiluMulLaunch:
    """Launch of `lora_silu_mul` for a class of T, and any rank up to `max_rank`."""
    tuned = tuned_silu_mul(current_gpu(), tokens, max_rank, element_size)
    return tuned or default_silu_mul_launch(tokens, max_rank, element_size)


@cache
def choose_rotary_store_launch(
    tokens: int, head_dim: int, max_rank: int, element_size: int
) -> LoRARotaryStoreLaunch:
    """Launch of `lora_norm_rotary_store` for a class of T, and any rank up to `max_rank`."""
    tuned = tuned_rotary_store(current_gpu(), tokens, head_dim, max_rank, element_size)
    return tuned or default_rotary_store_launch(tokens, head_dim, max_rank, element_size)


@contextmanager
def trial_tiles(trial: TrialTiles) -> Iterator[None]:
    """Choose these for every layer and step, in all threads; for tuners and tests."""
    global _trial
    before, _trial = _trial, trial
    clear_choices()
    try:
        yield
    finally:
        _trial = before
        clear_choices()


def clear_choices() -> None:
    """Choose anew, from tables that are read anew; for tuners and tests."""
    for choose in (
        choose_shrink_tiles,
        choose_num_parts,
        choose_expand_tiles,
        choose_silu_mul_launch,
        choose_rotary_store_launch,
    ):
        choose.cache_clear()
    clear_tuned_tiles()


def choose_num_tile_programs(
    metadata: LoRAMetadata, block_t: int, programs_per_tile: int, num_bytes: int, num_warps: int
) -> int:
    """How many programs share the tiles: as many as find room on a GPU at a time.

    But not fewer than ``ceil(T / block_t)``, which the tokens of one adapter need. Each tile takes
    `programs_per_tile` programs of `num_warps` warps with `num_bytes` of shared memory.
    """
    at_once = _MULTIPROCESSORS * max(min(_SHARED_BYTES // num_bytes, _MOST_WARPS // num_warps), 1)
    wanted = max(at_once // programs_per_tile, ceil_div(metadata.num_tokens, block_t))
    return min(metadata.most_tiles(block_t), wanted)


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


def metadata_of_tensors(order: Tensor, lora_tiles: Tensor) -> LoRAMetadata:
    """The metadata that kernels read, made of what a torch operator is given; nothing else is there."""
    nothing = order[:0]
    return LoRAMetadata(order, order, nothing, nothing, nothing, lora_tiles, no_adapter=False)


@dataclass(frozen=True)
class SlotTensors:
    """A table made of what a torch operator is given; see `LoRASlotTable`."""

    a_offset: Tensor
    b_offset: Tensor
    lora_rank: Tensor
    scaling: Tensor


@jit
def load_num_tiles(tiles_ptr: tl.tensor, WITH_BASE: tl.constexpr) -> tl.tensor:
    """How many tiles the step has, those of tokens without an adapter among them or not."""
    return tl.load(tiles_ptr) if WITH_BASE else tl.load(tiles_ptr + 1)


@jit
def load_tile(tiles_ptr: tl.tensor, tile: tl.tensor, is_there: tl.tensor) -> tl.tensor:
    """Where a tile starts in the sorted order, its number of rows, and its slot."""
    entry = tiles_ptr + 3 * (tile + 1)  # TILE_FIELDS, behind the head
    first = tl.load(entry, mask=is_there, other=0)
    num_rows = tl.load(entry + 1, mask=is_there, other=0)
    slot = tl.load(entry + 2, mask=is_there, other=-1)
    return first, num_rows, slot


@jit
def load_rank(
    slot: tl.tensor, rank_ptr: tl.tensor, num_slots: tl.tensor, stride: tl.tensor, MAX_RANK: tl.constexpr
) -> tl.tensor:
    """The row of the tables to read for a slot (0 where there is none), and the rank found there.

    The rank is -1 where there is no such slot, and where v has too few columns for the rank.
    """
    has_row = (slot >= 0) & (slot < num_slots)
    row = tl.where(has_row, slot, 0).to(tl.int64)
    rank = tl.load(rank_ptr + row * stride)
    return row, tl.where(has_row & (rank <= MAX_RANK), rank, -1)
