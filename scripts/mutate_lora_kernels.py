#!/usr/bin/env python3
"""Plant single-line faults in the LoRA kernels, one at a time, and see the tests find each.

Every fault below is planted in a copy of the package and must make the tests that are named beside
it fail in Triton's interpreter, so no GPU is needed. Exit status 1 when one survives. Faults that
only a GPU could show, such as a wait that is left out, are not here.

    scripts/mutate_lora_kernels.py                # all faults; several minutes
    scripts/mutate_lora_kernels.py --only 3 17    # some of them
    scripts/mutate_lora_kernels.py --list
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from planted_faults import ROOT, Fault, check_faults, list_faults, make_parser, planted

SCRIPT = "scripts/mutate_lora_kernels.py"
KERNELS = "python/lora_serve/kernels"
TESTS = "tests/python/kernels"


@dataclass(frozen=True)
class KernelFault(Fault):
    """A fault, and the file of tests that must find it."""

    tests: str


TUNED = "tuned_lora_tiles.py"
TILES, SHRINK, EXPAND, LOOK_UP = (
    f"triton_lora_{name}.py" for name in ("tiles", "shrink", "expand", "embedding")
)
CUT, METADATA, SILU, ROTARY = (
    f"lora_{name}.py" for name in ("tiles", "metadata", "silu_mul", "rotary_store")
)
OF_SHRINK, OF_EXPAND, OF_LOOK_UP = (f"test_{file}" for file in (SHRINK, EXPAND, LOOK_UP))
OF_CUT, OF_SILU, OF_ROTARY = (f"test_{file}" for file in (CUT, SILU, ROTARY))
OF_TILES, OF_GRID = "test_tuned_lora_tiles.py", "test_lora_grid.py"
OF_LINEAR, OF_CUDA = "test_triton_lora_linear.py", "test_cuda_lora_residual.py"
OF_PITFALLS, OF_FAR_ROWS = "test_pitfalls_lora_kernels.py", "test_far_rows.py"
LINEAR, CUDA = "triton_lora_linear.py", "cuda_lora.py"
ADDED, PLAIN_SILU, PLAIN_ROTARY = "expanded_delta.py", "silu_mul.py", "rotary_store.py"
OF_ADDED = "test_expanded_delta.py"

FAULTS = (
    # how a step is cut into tiles
    KernelFault(CUT, "np.minimum(most, count[group] - index * most)", "most", OF_CUT),
    KernelFault(CUT, "count > _MANY // 2", "count >= _MANY // 2", OF_CUT),
    KernelFault(CUT, "np.argsort(of_groups[0] < 0,", "np.argsort(of_groups[0] >= 0,", OF_CUT),
    KernelFault(CUT, "num_tiles[:, slot >= 0].sum(axis=1)", "num_tiles.sum(axis=1)", OF_CUT),
    KernelFault(CUT, "-(-count // rows)", "count // rows", OF_CUT),
    KernelFault(CUT, "rows.ravel()[group_of_kind]", "_FEW.ravel()[kind]", OF_CUT),
    KernelFault(CUT, "start[group] + index * most", "start[group]", OF_CUT),
    KernelFault(CUT, "entry = 1 + (num_tiles", "entry = (num_tiles", OF_CUT),
    KernelFault(CUT, "1 + num_tokens // SMALLEST_TILE", "num_tokens // SMALLEST_TILE", OF_CUT),
    KernelFault(METADATA, "self._lists[kind]", "self._lists[(few, few)]", OF_CUT),
    KernelFault(METADATA, "tiles.shape[1] >= least", "tiles.shape[1] > 0", OF_CUT),
    KernelFault(METADATA, " + min(num_groups, self.num_tokens)", "", OF_CUT),
    # how many programs there are, and how each finds its rows
    KernelFault(TILES, "return min(metadata.most_tiles(block_t), wanted)", "return 1", OF_LINEAR),
    KernelFault(
        TILES,
        "return min(metadata.most_tiles(block_t), wanted)",
        "return metadata.most_tiles(block_t)",
        OF_LINEAR,
    ),
    KernelFault(TILES, "max(at_once // programs_per_tile, ", "max(1, ", OF_LINEAR),
    KernelFault(
        TILES,
        "min(_SHARED_BYTES // num_bytes, _MOST_WARPS // num_warps)",
        "(_SHARED_BYTES // num_bytes)",
        OF_LINEAR,
    ),
    KernelFault(
        TILES, "tl.load(tiles_ptr) if WITH_BASE else tl.load(tiles_ptr + 1)", "tl.load(tiles_ptr)", OF_EXPAND
    ),
    KernelFault(
        TILES,
        "tl.load(tiles_ptr) if WITH_BASE else tl.load(tiles_ptr + 1)",
        "tl.load(tiles_ptr + 1)",
        OF_SHRINK,
    ),
    KernelFault(TILES, "tiles_ptr + 3 * (tile + 1)", "tiles_ptr + 3 * tile", OF_SHRINK),
    KernelFault(
        TILES,
        "num_rows = tl.load(entry + 1, mask=is_there, other=0)",
        "num_rows = tl.load(entry + 1, mask=is_there, other=0) + 1",
        OF_EXPAND,
    ),
    KernelFault(
        TILES,
        "    has_row = (slot >= 0) & (slot < num_slots)\n    row = tl.where(has_row, slot, 0)",
        "    has_row = slot < num_slots\n    row = tl.where(slot < 0, num_slots - 1, slot)",
        OF_SHRINK,
    ),
    KernelFault(TILES, "(slot >= 0) & (slot < num_slots)", "(slot >= 0)", OF_EXPAND),
    KernelFault(TILES, "has_row & (rank <= MAX_RANK)", "has_row", OF_EXPAND),
    KernelFault(
        SHRINK,
        "for tile in range(tl.program_id(TILE_AXIS), end, tl.num_programs(TILE_AXIS)):",
        "for tile in range(tl.program_id(TILE_AXIS), tl.minimum(end, tl.num_programs(TILE_AXIS))):",
        OF_GRID,
    ),
    KernelFault(SHRINK, "next_tile = tile + tl.num_programs(TILE_AXIS)", "next_tile = tile + 1", OF_GRID),
    KernelFault(SHRINK, "tl.program_id(1 - TILE_AXIS)", "tl.program_id(0)", OF_TILES),
    KernelFault(SHRINK, "(programs, per_tile) if tiles.tiles_first else ", "", OF_TILES),
    KernelFault(TUNED, 'order = _bool_of(row["tiles"], "tiles_first")', "order = False", OF_TILES),
    KernelFault(EXPAND, "next_tile = tile + tl.num_programs(1)", "next_tile = tile + 1", OF_GRID),
    KernelFault(SILU, "next_tile = tile + tl.num_programs(1)", "next_tile = tile + 1", OF_SILU),
    KernelFault(ROTARY, "next_tile = tile + tl.num_programs(1)", "next_tile = tile + 1", OF_ROTARY),
    # shrink
    KernelFault(SHRINK, "is_k = k < IN_FEATURES", "is_k = k < IN_FEATURES // BLOCK_K * BLOCK_K", OF_SHRINK),
    KernelFault(SHRINK, "is_k = k < IN_FEATURES", "is_k = k < IN_FEATURES + 1", OF_SHRINK),
    KernelFault(SHRINK, "IS_EVEN=k_per_part * num_parts == in_features", "IS_EVEN=True", OF_SHRINK),
    KernelFault(SHRINK, "range(0, K_PER_PART, BLOCK_K)", "range(BLOCK_K, K_PER_PART, BLOCK_K)", OF_SHRINK),
    KernelFault(SHRINK, "k = part * K_PER_PART + k_step", "k = k_step", OF_SHRINK),
    KernelFault(SHRINK, "(part * NUM_SLICES + slice_index)", "(part + slice_index)", OF_SHRINK),
    KernelFault(SHRINK, "        acc *= scaling\n", "", OF_SHRINK),
    KernelFault(SHRINK, " + slice_index * scaling_stride_s", "", OF_SHRINK),
    KernelFault(SHRINK, " + slice_index * a_offset_stride_s", "", OF_SHRINK),
    KernelFault(SHRINK, "is_rank = r_index < rank", "is_rank = r_index < MAX_RANK", OF_SHRINK),
    KernelFault(
        SHRINK,
        "num_r_blocks = ceil_div(max_rank, tiles.block_r)",
        "num_r_blocks = max(max_rank // tiles.block_r, 1)",
        OF_SHRINK,
    ),
    KernelFault(SHRINK, "is_row = index < num_rows", "is_row = index < num_rows + 1", OF_SHRINK),
    KernelFault(
        SHRINK,
        "order_ptr + first, num_rows, r_index, part, slot, rank, scaling)",
        "order_ptr, num_rows, r_index, part, slot, rank, scaling)",
        OF_SHRINK,
    ),
    KernelFault(
        SHRINK,
        "order_ptr + first, num_rows, r_index, part, slot, rank),",
        "order_ptr, num_rows, r_index, part, slot, rank),",
        OF_TILES,
    ),
    KernelFault(SHRINK, "if num_rows <= BLOCK_T:", "if num_rows < BLOCK_T:", OF_TILES),
    KernelFault(SHRINK, "if num_rows > BLOCK_T:", "if num_rows > BLOCK_T + 1:", OF_TILES),
    KernelFault(SHRINK, "if (first_r < rank) | FILL_ZEROS:", "if first_r < rank:", OF_SHRINK),
    KernelFault(SHRINK, "acc = tl.where(is_rank[None, :], acc, 0.0)", "acc = acc", OF_SHRINK),
    KernelFault(SHRINK, 'tl.where((rank < 0) & (slot >= 0), float("nan"), acc)', "acc", OF_SHRINK),
    # expand
    KernelFault(
        EXPAND, "                acc += y.to(tl.float32)\n", "                acc += 0.0\n", OF_EXPAND
    ),
    KernelFault(EXPAND, "column + WIDTHS[s - 1]", "column + WIDTHS[0]", OF_EXPAND),
    KernelFault(EXPAND, "run * 0 + OFFSET_START", "run * 0", OF_EXPAND),
    KernelFault(EXPAND, "tl.constexpr = N_TILES * BLOCK_N", "tl.constexpr = BLOCK_N", OF_TILES),
    KernelFault(EXPAND, "(WIDTHS[s - 1] + RUN - 1) // RUN", "WIDTHS[s - 1] // RUN", OF_TILES),
    KernelFault(EXPAND, "run * RUN + n_tile * BLOCK_N", "run * RUN + n_tile", OF_TILES),
    KernelFault(EXPAND, "is_n = n < width", "is_n = n < width + 1", OF_EXPAND),
    KernelFault(EXPAND, "(NUM_SLICES * MAX_RANK)", "MAX_RANK", OF_EXPAND),
    KernelFault(EXPAND, "tl.static_range(1, NUM_PARTS)", "tl.static_range(1, NUM_PARTS - 1)", OF_EXPAND),
    KernelFault(EXPAND, "return tl.where((r < rank)[None, :], v, 0.0)", "return v", OF_EXPAND),
    KernelFault(
        EXPAND,
        "mask = (r < rank)[:, None] & is_n[None, :]",
        "mask = (r <= rank)[:, None] & is_n[None, :]",
        OF_EXPAND,
    ),
    KernelFault(EXPAND, "range(0, rank, BLOCK_R)", "range(0, rank // BLOCK_R * BLOCK_R, BLOCK_R)", OF_EXPAND),
    KernelFault(EXPAND, " + slice_index * b_offset_stride_s", "", OF_EXPAND),
    KernelFault(
        EXPAND, "slice_index.to(tl.int64) * num_tokens + rows", "slice_index.to(tl.int64) + rows", OF_EXPAND
    ),
    KernelFault(EXPAND, "order_ptr + first + index", "order_ptr + index", OF_EXPAND),
    KernelFault(EXPAND, "is_row = index < num_rows", "is_row = index < BLOCK_T", OF_EXPAND),
    KernelFault(EXPAND, 'acc = tl.where(rank < 0, float("nan"), acc)', "acc = acc", OF_EXPAND),
    KernelFault(EXPAND, "if (rank != 0) | (not ADD_INPUTS):", "if rank != 0:", OF_EXPAND),
    KernelFault(EXPAND, "return tl.where(rank == 0, y, total)", "return total", OF_SILU),
    # look-up
    KernelFault(LOOK_UP, "ids[:, None] * rank[:, None]", "ids[:, None] * MAX_RANK", OF_LOOK_UP),
    KernelFault(LOOK_UP, "v = a.to(tl.float32) * scaling[:, None]", "v = a.to(tl.float32)", OF_LOOK_UP),
    KernelFault(LOOK_UP, "rank = tl.where(rank > MAX_RANK, -1, rank)", "rank = rank", OF_LOOK_UP),
    KernelFault(LOOK_UP, "(slot >= 0) & (slot < num_slots)", "slot >= 0", OF_LOOK_UP),
    KernelFault(LOOK_UP, "token_ids_ptr + rows * token_ids_stride", "token_ids_ptr + rows", OF_LOOK_UP),
    # rows that lie far from each other
    *(
        KernelFault(file, "mask=is_row, other=0).to(tl.int64)", "mask=is_row, other=0)", OF_FAR_ROWS)
        for file in (SHRINK, EXPAND, SILU)
    ),
    # both halves together, beside the base product, and what is compiled for them
    KernelFault(LINEAR, "dtype=y.dtype, scratch=scratch)", "scratch=scratch)", OF_GRID),
    KernelFault(LINEAR, "{*TOKEN_CLASSES, *skinny, ", "{*skinny, ", OF_PITFALLS),
    KernelFault(CUDA, "if len(x) <= FEW_TOKENS:", "if len(x) < FEW_TOKENS:", OF_CUDA),
    KernelFault(CUDA, "        launch()\n        return", "        return", OF_CUDA),
    # expand in front of what reads its result
    KernelFault(SILU, "v1_rows = v0_rows + v_slice", "v1_rows = v0_rows", OF_SILU),
    KernelFault(SILU, "tl.range(0, N_TILES,", "tl.range(0, 5 if N_TILES > 5 else N_TILES,", OF_SILU),
    KernelFault(SILU, "tl.load(b_offset + b_offset_stride_s)", "tl.load(b_offset)", OF_SILU),
    KernelFault(SILU, "v_part = 2 * v_slice", "v_part = v_slice", OF_SILU),
    KernelFault(SILU, "order_ptr + first + index", "order_ptr + index", OF_SILU),
    KernelFault(SILU, "is_row = index < num_rows", "is_row = index < num_rows + 1", OF_SILU),
    KernelFault(ROTARY, "v_ptr + slice_index * v_slice", "v_ptr", OF_ROTARY),
    KernelFault(ROTARY, "        rank = tl.where(adapter_slot < 0, 0, rank)\n", "", OF_ROTARY),
    KernelFault(ROTARY, "order_ptr + first_row + index", "order_ptr + index", OF_ROTARY),
    KernelFault(ROTARY, "is_row = index < num_rows", "is_row = index < num_rows + 1", OF_ROTARY),
    # deltas that were expanded beside the product
    KernelFault(ADDED, "(slot >= 0) & (delta != 0.0)", "delta != 0.0", OF_ADDED),
    KernelFault(ADDED, "(slot >= 0) & (delta != 0.0)", "slot >= 0", OF_ADDED),
    KernelFault(ADDED, "y.to(tl.float32) + delta)", "y.to(tl.float32) + delta.to(y.dtype))", OF_ADDED),
    KernelFault(PLAIN_SILU, "delta_row + I", "delta_row", OF_ADDED),
    KernelFault(PLAIN_SILU, "delta + t * (2 * I) + i", "delta + t * gate_up_stride + i", OF_ADDED),
    KernelFault(PLAIN_SILU, "tl.load(mapping_ptr + t)", "tl.load(mapping_ptr)", OF_ADDED),
    KernelFault(PLAIN_ROTARY, "tl.load(mapping_ptr + t)", "tl.load(mapping_ptr)", OF_ADDED),
    KernelFault(PLAIN_ROTARY, "in_delta + HQ * D", "in_delta", OF_ADDED),
    KernelFault(PLAIN_ROTARY, "in_delta + start", "in_delta", OF_ADDED),
    KernelFault(PLAIN_ROTARY, "delta + in_delta + at + HALF", "delta + in_delta + at", OF_ADDED),
    KernelFault(EXPAND, "if V_AS_ARENA else", "if False else", OF_ADDED),
    KernelFault(CUDA, "            add_inputs=False,\n", "", OF_CUDA),
    KernelFault(CUDA, "or len(weight) > _MOST_EXPANDED", "or len(weight) >= _MOST_EXPANDED", OF_CUDA),
    KernelFault(CUDA, "max_rank > _LARGE_RANK", "max_rank >= _LARGE_RANK", OF_CUDA),
    KernelFault(CUDA, "len(x) > DECODE_TOKENS", "len(x) >= DECODE_TOKENS", OF_CUDA),
    KernelFault(CUDA, "FEW_TOKENS < len(x) <= MOST_TOKENS_BESIDE", "FEW_TOKENS < len(x)", OF_CUDA),
    KernelFault(LINEAR, "*skinny, MOST_TOKENS_BESIDE}", "*skinny}", OF_CUDA),
)

# The package is installed in a way that comes before the path; here the copy must.
RUN = """
import sys
sys.meta_path = [each for each in sys.meta_path if "editable" not in type(each).__module__]
sys.path.insert(0, "python")
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def copy_package(tree: Path) -> None:
    """Bring the package with its extension, and the tests, into ``tree``."""
    shutil.rmtree(tree, ignore_errors=True)
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in ("python/lora_serve", "tests/python"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", tree)
    extension = importlib.util.find_spec("lora_serve._core")
    if extension is None or extension.origin is None:
        raise SystemExit("the extension of lora_serve is not installed: run make setup")
    shutil.copy(extension.origin, tree / "python/lora_serve")


def run_tests(tree: Path, files: list[str], timeout_s: float) -> str:
    """Return the test that failed first; empty when all passed."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow"]
    paths = [f"{TESTS}/{file}" for file in files]
    # A fault and its repair may fall into one second: bytecode on disk could pass for the other's.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"}
    try:
        result = subprocess.run(
            [sys.executable, "-c", RUN, *options, *paths],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {timeout_s:.0f} s"
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    if not lines:
        end = (result.stdout + result.stderr)[-1500:]
        raise SystemExit(f"the tests ended with {result.returncode} and named none that failed:\n{end}")
    return lines[0].removeprefix(f"FAILED {TESTS}/").split(" - ")[0]


def main() -> int:
    """Check all faults and print one line for each; 1 when one survives."""
    parser = make_parser((__doc__ or "").splitlines()[0], 300.0)
    parser.add_argument("--tree", type=Path, default=ROOT / "build/kernel_mutants", help="where to copy to")
    arguments = parser.parse_args()
    numbers = arguments.only or range(1, len(FAULTS) + 1)
    if arguments.list:
        return list_faults(FAULTS, numbers)

    tree: Path = arguments.tree
    copy_package(tree)
    files = sorted({FAULTS[number - 1].tests for number in numbers})
    found = run_tests(tree, files, 10 * arguments.timeout)
    if found:
        raise SystemExit(f"the tests do not pass without a fault ({found}); nothing can be learned")

    def check(number: int) -> str:
        fault = FAULTS[number - 1]
        with planted(tree / KERNELS, fault, SCRIPT):
            return run_tests(tree, [fault.tests], arguments.timeout)

    return check_faults(FAULTS, numbers, check)


if __name__ == "__main__":
    sys.exit(main())
