"""The launch parameters that ship, each run: halves of a layer of its row's sizes, against an exact oracle.

The rows are read as the kernels read them, and forced, so that it does not matter which GPU is there. On a
GPU the layer and the step have the sizes that a row is for; in the interpreter, the least that has a program
go through several tiles and end in the middle of one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.lora_grid_cases import NAN, GridCase
from kernels.lora_grid_checks import check_expand, check_shrink
from lora_serve.kernels import LoRALayerTable, LoRASliceWeights, build_lora_metadata
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.triton_lora_tiles import TrialTiles, trial_tiles
from lora_serve.kernels.tuned_lora_tiles import tuned_expand, tuned_shrink
from lora_serve.kernels.tuned_tables import TUNING_FOLDER, read_table

# As in `test_lora_grid`: the interpreter's NumPy warns of columns of v that are added up and dropped.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

TOKENS_OF_CLASS = {1: 1, 8: 7, 32: 30, 128: 100, 512: 300, 2048: 700, 1 << 30: 2100}
# In the interpreter: a large tile of 64 rows and a rest, or most of one of 128; and a part in the middle.
FEW_TOKENS, FEW_PARTS = 75, 3
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU")


def rows_of(kernel: str, features: str) -> list[tuple[str, dict[str, Any], TrialTiles]]:
    """Name and numbers of each committed row, and its launch parameters as the kernels find them."""
    found = []
    for file in sorted(TUNING_FOLDER.glob("*.json")):
        table = read_table(file)
        for row in table.get(kernel, []):
            tokens, num_slices, rank = row["max_tokens"], row["num_slices"], row["max_rank"]
            num_parts, size = row["num_parts"], row["element_size"]
            if kernel == "lora_shrink":
                shrink = tuned_shrink(table["gpu"], tokens, num_slices, row[features], rank, size)
                assert shrink is not None
                trial = TrialTiles(shrink.num_parts, shrink=shrink.tiles)
            else:
                layer = (num_slices, row[features], rank, num_parts, size)
                trial = TrialTiles(num_parts, expand=tuned_expand(table["gpu"], tokens, *layer))
            name = f"{file.stem}-{tokens}-tokens-{row[features]}x{num_slices}-rank-{rank}-parts-{num_parts}"
            found.append((name, row, trial))
    return found


SHRINKS, EXPANDS = rows_of("lora_shrink", "in_features"), rows_of("lora_expand", "out_features")


def params(rows: list[tuple[str, dict[str, Any], TrialTiles]]) -> list[Any]:
    return [pytest.param(row, trial, id=name) for name, row, trial in rows]


def distinct(rows: list[tuple[str, dict[str, Any], TrialTiles]]) -> list[Any]:
    """One row of those that differ in nothing that the interpreter looks at, with few parts."""
    kept = {}
    for name, row, trial in rows:
        few_parts = replace(trial, num_parts=min(row["num_parts"], FEW_PARTS))
        shrink = trial.shrink and replace(trial.shrink, num_warps=0, num_stages=0)
        expand = trial.expand and replace(trial.expand, num_warps=0, num_stages=0)
        key = (few_parts.num_parts, shrink, expand, row["num_slices"], row["max_rank"])
        kept.setdefault(key, (name, row, few_parts))
    return params(list(kept.values()))


def slices_of(out_features: int, num_slices: int) -> tuple[int, ...]:
    """Widths of one output, of gate and up, or of queries, keys and values with four queries a key."""
    narrow = out_features // (num_slices if num_slices < 3 else 2 * num_slices)
    return (out_features - (num_slices - 1) * narrow, *[narrow] * (num_slices - 1))


def make_step(
    num_tokens: int, in_features: int, widths: tuple[int, ...], rank: int, dtype: torch.dtype, device: str
) -> GridCase:
    """One adapter of the row's rank with nearly all tokens; between them a few of another, and of none.

    The other one's rank is smaller, and on the last of several slices it has no module.
    """
    generator = torch.Generator(device).manual_seed(num_tokens)

    def signed(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    def module(lora_rank: int, width: int, scaling: float) -> LoRASliceWeights:
        a = signed(lora_rank, in_features, scale=in_features**-0.5)
        return LoRASliceWeights(a, signed(lora_rank, width, scale=lora_rank**-0.5), scaling)

    many, few, num_slots = 3, 0, 4
    mapping = torch.full((num_tokens,), many, dtype=torch.int32)
    mapping[5::16], mapping[11::16] = few, -1
    # A layer before and one behind, so that neither the tables nor the arena begin or end with this one.
    before, table, behind = (LoRALayerTable(each, in_features) for each in ((3,), widths, (5, 2)))
    of_few = [module(max(rank - 3, 1), width, 0.75) for width in widths]
    installed = {
        many: tuple(module(rank, width, -1.75) for width in widths),
        few: (*of_few[:-1], None) if len(widths) > 1 else tuple(of_few),
    }
    install_weights({before: {}, table: installed, behind: {}}, num_slots=num_slots)
    x, y = signed(num_tokens, in_features), signed(num_tokens, sum(widths))
    x[11::16] = NAN
    metadata = build_lora_metadata(mapping, num_slots, device=torch.device(device))
    return GridCase(x, y, table, mapping, metadata, rank, offset_start=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("row", "trial"), params(SHRINKS))
def test_every_shrink_that_ships_is_exact_to_rounding_at_its_size(row, trial, dtype):
    num_tokens, widths = TOKENS_OF_CLASS[row["max_tokens"]], (16,) * row["num_slices"]
    case = make_step(num_tokens, row["in_features"], widths, row["max_rank"], dtype, "cuda")
    with trial_tiles(trial):
        check_shrink(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("row", "trial"), params(EXPANDS))
def test_every_expand_that_ships_is_exact_to_rounding_at_its_size(row, trial, dtype):
    num_tokens, widths = TOKENS_OF_CLASS[row["max_tokens"]], slices_of(row["out_features"], row["num_slices"])
    case = make_step(num_tokens, 64, widths, row["max_rank"], dtype, "cuda")
    with trial_tiles(trial):
        check_expand(case, add_inputs=True)
        check_expand(case, add_inputs=False)


@ON_CPU
@pytest.mark.parametrize(("row", "trial"), distinct(SHRINKS))
def test_every_kind_of_shrink_that_ships_is_exact_to_rounding(row, trial):
    # Two steps for each part but the last, which has nothing but the tail.
    in_features = (trial.num_parts + 1) * trial.shrink.block_k + 13
    widths = (2,) * row["num_slices"]
    case = make_step(FEW_TOKENS, in_features, widths, row["max_rank"], torch.float16, "cpu")
    with trial_tiles(trial):
        check_shrink(case)


@ON_CPU
@pytest.mark.parametrize(("row", "trial"), distinct(EXPANDS))
def test_every_kind_of_expand_that_ships_is_exact_to_rounding(row, trial):
    tiles = trial.expand
    # A run of tiles and the beginning of another; less than one.
    widths = (tiles.n_tiles * tiles.block_n + 13, *[tiles.block_n + 5] * (row["num_slices"] - 1))
    case = make_step(FEW_TOKENS, 16, widths, row["max_rank"], torch.float16, "cpu")
    with trial_tiles(trial):
        check_expand(case, add_inputs=True)
