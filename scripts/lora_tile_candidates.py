"""Which launch parameters of the LoRA kernels are worth a measurement.

A decode reads weights once and has few rows: what counts is that every multiprocessor has enough bytes on
their way, in few instructions. So blocks hold the whole rank where that leaves enough programs, and input
features are split until a program has one to three blocks of them. A prefill has rows enough: there the
candidates are tiles for the matrix units with several stages, in one part or two, because each tile of
output features reads the parts again.
"""

from __future__ import annotations

from lora_serve.kernels.triton_lora_tiles import (
    MIXED_TOKENS,
    ExpandTiles,
    ShrinkTiles,
    default_expand_tiles,
    default_num_parts,
    default_shrink_tiles,
)
from lora_serve.kernels.tuned_lora_tiles import (
    LoRARotaryStoreLaunch,
    LoRASiluMulLaunch,
    TunedShrink,
    block_of,
)

WHOLE = 128
"""A block of rank for all of the rank, up to this."""

_MOST_SHARED_BYTES = 200 << 10
_MOST_STAGES = 4

# block_t, block_r, block_k, parts, warps
_SHRINK_FEW = (
    (16, 16, 256, 4, 4),
    (16, 16, 1024, 4, 4),
    (16, 16, 512, 8, 4),
    (16, 16, 2048, 2, 8),
    (16, 32, 512, 4, 4),
    (16, 32, 512, 8, 4),
    (16, 32, 256, 16, 4),
    (16, 32, 1024, 4, 8),
    (16, WHOLE, 128, 8, 4),
    (16, WHOLE, 256, 4, 8),
    (16, WHOLE, 256, 8, 4),
    (16, WHOLE, 512, 8, 8),
    (16, WHOLE, 256, 16, 4),
)
# A long input in as many programs as a short one has.
_SHRINK_FEW_LONG = (
    (16, 32, 1024, 12, 4),
    (16, WHOLE, 512, 12, 8),
)
_SHRINK_128 = (
    (16, 16, 256, 2, 4),
    (16, 16, 512, 4, 4),
    (16, 32, 256, 4, 4),
    (16, 32, 512, 8, 4),
    (16, WHOLE, 128, 4, 4),
    (16, WHOLE, 128, 8, 4),
    (16, WHOLE, 256, 4, 4),
    (16, WHOLE, 256, 8, 4),
    (32, 32, 256, 4, 4),
    (32, WHOLE, 128, 4, 4),
    (32, WHOLE, 256, 4, 8),
    (32, WHOLE, 256, 8, 4),
)
_SHRINK_512 = (
    (16, 32, 256, 2, 4),
    (16, WHOLE, 128, 4, 4),
    (32, 32, 128, 2, 4),
    (32, WHOLE, 128, 2, 4),
    (32, WHOLE, 128, 4, 4),
    (32, WHOLE, 128, 8, 4),
    (32, WHOLE, 256, 4, 8),
    (64, WHOLE, 64, 1, 4),
    (64, WHOLE, 64, 4, 4),
    (64, WHOLE, 128, 2, 4),
    (64, WHOLE, 128, 4, 4),
)
_SHRINK_MANY = (
    (32, WHOLE, 128, 1, 4),
    (64, WHOLE, 64, 1, 4),
    (64, WHOLE, 128, 1, 4),
    (64, WHOLE, 128, 1, 8),
    (32, WHOLE, 128, 2, 4),
    (64, WHOLE, 64, 2, 4),
    (64, WHOLE, 128, 2, 4),
    (64, WHOLE, 128, 2, 8),
    (128, WHOLE, 64, 1, 4),
    (128, WHOLE, 64, 1, 8),
    (128, WHOLE, 128, 1, 8),
    (128, WHOLE, 64, 2, 4),
)
_SHRINK = {128: _SHRINK_128, 512: _SHRINK_512}

# block_t, block_n, warps, loads_y_first
_EXPAND_FEW = (
    (16, 32, 2, True),
    (16, 64, 2, True),
    (16, 64, 4, True),
    (16, 128, 4, False),
    (16, 128, 4, True),
    (16, 128, 8, True),
    (16, 256, 4, True),
    (16, 256, 8, True),
)
_EXPAND_128 = (
    (16, 64, 4, True),
    (16, 128, 4, False),
    (16, 128, 4, True),
    (16, 256, 4, True),
    (16, 256, 8, True),
    (32, 128, 4, True),
    (64, 64, 4, True),
    (64, 128, 4, True),
)
_EXPAND_512 = (
    (16, 128, 4, True),
    (16, 256, 4, True),
    (32, 128, 4, False),
    (32, 128, 4, True),
    (32, 256, 8, True),
    (64, 64, 4, True),
    (64, 128, 4, True),
    (64, 128, 8, True),
)
_EXPAND_MANY = (
    (32, 128, 4, True),
    (32, 256, 4, True),
    (64, 64, 4, True),
    (64, 128, 4, False),
    (64, 128, 4, True),
    (64, 128, 8, True),
    (64, 256, 8, False),
    (64, 256, 8, True),
    (128, 64, 4, True),
    (128, 128, 8, False),
    (128, 128, 8, True),
)
_EXPAND = {128: _EXPAND_128, 512: _EXPAND_512}

# block_t, block_n, n_tiles, num_stages
_EXPAND_RUNS_512 = (
    (16, 128, 4, 3),
    (16, 128, 8, 3),
    (32, 64, 2, 2),
    (32, 64, 4, 3),
    (32, 64, 8, 3),
    (32, 128, 2, 2),
    (32, 128, 4, 2),
    (32, 128, 4, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
)
_EXPAND_RUNS_MANY = (
    (32, 128, 4, 2),
    (32, 128, 4, 3),
    (32, 128, 8, 3),
    (32, 256, 4, 3),
    (64, 64, 4, 3),
    (64, 64, 8, 3),
    (64, 64, 16, 3),
    (64, 64, 16, 4),
    (64, 128, 4, 3),
    (64, 128, 8, 3),
)
_FEW_TOKENS = 32

# For whole layers, in steps of up to 512 tokens and of more.
# block_t, block_n, n_tiles, num_stages
_EXPAND_IN_LAYERS = (
    (16, 128, 1, 1),
    (16, 128, 2, 2),
    (16, 128, 4, 3),
    (16, 64, 4, 3),
    (16, 64, 4, 4),
    (16, 256, 1, 1),
    (16, 256, 2, 2),
    (16, 512, 1, 1),
    (32, 128, 1, 1),
    (32, 128, 2, 2),
    (64, 64, 2, 2),
)
_EXPAND_IN_LAYERS_MANY = (
    (16, 128, 8, 3),
    (32, 128, 4, 3),
    (32, 128, 8, 3),
    (64, 64, 8, 3),
    (64, 128, 4, 3),
    (64, 128, 8, 3),
)
_SILU_MUL = (
    (16, 32, 8, 3),
    (16, 64, 2, 2),
    (16, 64, 3, 3),
    (16, 64, 4, 2),
    (16, 64, 4, 3),
    (16, 64, 4, 4),
    (16, 64, 5, 3),
    (16, 64, 6, 2),
    (16, 64, 6, 3),
    (16, 64, 6, 4),
    (16, 64, 8, 2),
    (16, 64, 8, 3),
    (16, 64, 8, 4),
    (16, 64, 12, 3),
    (16, 128, 2, 2),
    (16, 128, 3, 3),
    (16, 128, 4, 2),
    (16, 128, 4, 3),
    (32, 64, 4, 2),
    (32, 64, 8, 3),
    (64, 32, 8, 3),
)
_SILU_MUL_MANY = (
    (16, 64, 8, 3),
    (32, 64, 4, 3),
    (32, 64, 6, 3),
    (32, 64, 8, 3),
    (64, 32, 6, 3),
    (64, 32, 8, 3),
    (64, 32, 8, 4),
    (64, 32, 12, 3),
    (64, 64, 3, 3),
    (64, 64, 4, 2),
    (64, 64, 6, 2),
    (64, 64, 8, 2),
)
# block_t, heads, num_stages
_ROTARY_STORE = (
    (16, 1, 1),
    (16, 2, 1),
    (16, 2, 2),
    (16, 4, 2),
    (16, 4, 3),
    (32, 2, 2),
    (32, 4, 3),
    (64, 4, 3),
)
_ROTARY_STORE_MANY = ((16, 4, 3), (32, 2, 2), (32, 4, 2), (32, 4, 3), (64, 2, 2), (64, 4, 3))


def shrink_candidates(
    tokens: int, num_slices: int, in_features: int, max_rank: int, element_size: int
) -> list[TunedShrink]:
    """What to try for a class of T; the default comes first."""
    default = TunedShrink(
        default_num_parts(tokens, num_slices, in_features, max_rank),
        default_shrink_tiles(tokens, in_features, max_rank, element_size),
    )
    wanted = _SHRINK_FEW if tokens <= _FEW_TOKENS else _SHRINK.get(tokens, _SHRINK_MANY)
    if tokens <= _FEW_TOKENS and in_features > 8192:
        wanted += _SHRINK_FEW_LONG
    found = [default]
    for block_t, block_r, block_k, num_parts, num_warps in wanted:
        rows = block_of(max_rank, block_r)
        steps = -(-in_features // (num_parts * block_k))
        stage_bytes = (block_t + rows) * block_k * element_size
        num_stages = 1 if steps == 1 else min(steps + 1, _MOST_STAGES, _MOST_SHARED_BYTES // stage_bytes)
        if num_stages >= 1 and num_stages * stage_bytes <= _MOST_SHARED_BYTES:
            tiles = ShrinkTiles(block_t, rows, block_k, num_warps, num_stages)
            found.append(TunedShrink(num_parts, tiles))
    return list(dict.fromkeys(found))


def expand_candidates(tokens: int, out_features: int, max_rank: int, element_size: int) -> list[ExpandTiles]:
    """What to try for a class of T; the default comes first."""
    wanted = _EXPAND_FEW if tokens <= _FEW_TOKENS else _EXPAND.get(tokens, _EXPAND_MANY)
    block_r = block_of(max_rank, 256)
    found = [default_expand_tiles(tokens, out_features, max_rank, element_size)]
    found += [ExpandTiles(t, n, block_r, warps, first) for t, n, warps, first in wanted]
    if tokens > 128 and element_size == 2 and max_rank <= block_r:
        found += [
            ExpandTiles(t, n, block_r, num_warps=4, n_tiles=n_tiles, num_stages=num_stages)
            for t, n, n_tiles, num_stages in (_EXPAND_RUNS_512 if tokens == 512 else _EXPAND_RUNS_MANY)
            if (block_r + t) * n * element_size * num_stages <= _MOST_SHARED_BYTES
        ]
    return list(dict.fromkeys(found))


def expands_in_layers(tokens: int, max_rank: int) -> list[tuple[int, ExpandTiles]]:
    """Numbers of parts and tiles to try for a class of T among the layer's other kernels, in 16 bits."""
    block_r = block_of(max_rank, WHOLE)
    few, many = ((2, 4, 8), _EXPAND_IN_LAYERS), ((1, 2, 4), _EXPAND_IN_LAYERS_MANY)
    parts, wanted = few if tokens <= MIXED_TOKENS else many
    return [
        (num_parts, ExpandTiles(block_t, block_n, block_r, 4, False, n_tiles, num_stages))
        for num_parts in parts
        for block_t, block_n, n_tiles, num_stages in wanted
    ]


def silu_mul_candidates(tokens: int, max_rank: int) -> list[LoRASiluMulLaunch]:
    """What to try for a class of T, in 16 bits."""
    block_r = block_of(max_rank, WHOLE)
    return [
        LoRASiluMulLaunch(block_t, block_n, block_r, n_tiles, 4, num_stages)
        for block_t, block_n, n_tiles, num_stages in (_SILU_MUL if tokens <= MIXED_TOKENS else _SILU_MUL_MANY)
    ]


def rotary_store_candidates(tokens: int, max_rank: int) -> list[LoRARotaryStoreLaunch]:
    """What to try for a class of T and heads of up to 128, in 16 bits."""
    block_r = block_of(max_rank, WHOLE)
    wanted = _ROTARY_STORE if tokens <= MIXED_TOKENS else _ROTARY_STORE_MANY
    return [LoRARotaryStoreLaunch(block_t, block_r, heads, 4, stages) for block_t, heads, stages in wanted]
