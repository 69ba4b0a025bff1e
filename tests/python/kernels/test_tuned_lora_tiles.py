"""The tables of launch parameters: what is read, what overrides the heuristic, how much scratch it needs."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES
from kernels.lora_cases import LAST_SLOT, assert_within_bounds, make_case
from kernels.triton_lora_cases import assert_same_on_cpu, mixed_case, on_device, random_case
from lora_serve.kernels import triton_lora_tiles as tiles_module
from lora_serve.kernels import tuned_tables
from lora_serve.kernels.reference import lora_expand_reference, lora_shrink_reference
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import lora_scratch_elements, triton_add_lora_linear
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink
from lora_serve.kernels.triton_lora_tiles import (
    TOKEN_CLASSES,
    TrialTiles,
    choose_expand_tiles,
    choose_num_parts,
    choose_rotary_store_launch,
    choose_shrink_tiles,
    choose_silu_mul_launch,
    clear_choices,
    default_expand_tiles,
    default_num_parts,
    default_rotary_store_launch,
    default_shrink_tiles,
    default_silu_mul_launch,
    token_class,
    trial_tiles,
)
from lora_serve.kernels.tuned_lora_tiles import (
    ExpandTiles,
    LoRARotaryStoreLaunch,
    LoRASiluMulLaunch,
    ShrinkTiles,
    TunedShrink,
    tuned_expand,
    tuned_rotary_store,
    tuned_shrink,
    tuned_silu_mul,
)
from lora_serve.kernels.tuned_tables import TUNING_FOLDER, read_table, read_tuned_rows

SHRINK = {
    "in_features": 4096,
    "num_slices": 3,
    "max_rank": 64,
    "element_size": 2,
    "max_tokens": 32,
    "num_parts": 16,
    "tiles": {
        "block_t": 16,
        "block_r": 64,
        "block_k": 256,
        "num_warps": 8,
        "num_stages": 1,
        "block_t_many": 128,
        "tiles_first": True,
    },
    "time_us": {"32 tokens, 8 adapters": 7.0},
}
EXPAND = {
    "out_features": 6144,
    "num_slices": 3,
    "num_parts": 16,
    "max_rank": 64,
    "element_size": 2,
    "max_tokens": 32,
    "tiles": {"block_t": 32, "block_n": 256, "block_r": 64, "num_warps": 2, "loads_y_first": True}
    | {"n_tiles": 2, "num_stages": 3},
}
SILU_MUL = {
    "max_rank": 64,
    "element_size": 2,
    "max_tokens": 32,
    "tiles": {"block_t": 32, "block_n": 128, "block_r": 64, "n_tiles": 3, "num_warps": 8, "num_stages": 5},
}
ROTARY_STORE = {
    "head_dim": 128,
    "max_rank": 64,
    "element_size": 2,
    "max_tokens": 32,
    "tiles": {"block_t": 32, "block_r": 64, "heads": 5, "num_warps": 8, "num_stages": 3},
}
TUNED_SHRINK = ShrinkTiles(16, 64, 256, num_warps=8, num_stages=1, block_t_many=128, tiles_first=True)
TUNED_EXPAND = ExpandTiles(32, 256, 64, num_warps=2, loads_y_first=True, n_tiles=2, num_stages=3)
TUNED_SILU_MUL = LoRASiluMulLaunch(32, 128, 64, n_tiles=3, num_warps=8, num_stages=5)
TUNED_ROTARY_STORE = LoRARotaryStoreLaunch(32, 64, heads=5, num_warps=8, num_stages=3)


@pytest.fixture
def write_table(tmp_path, monkeypatch):
    """Writes the only table there is, and makes its card the current one."""

    def write(table: object, *, current: str = "Some Card") -> None:
        (tmp_path / "card.json").write_text(table if isinstance(table, str) else json.dumps(table))
        monkeypatch.setattr(tuned_tables, "TUNING_FOLDER", tmp_path)
        monkeypatch.setattr(tiles_module, "current_gpu", lambda: current)
        clear_choices()

    yield write
    monkeypatch.undo()
    clear_choices()


def table_of(shrinks: object = (SHRINK,), expands: object = (EXPAND,), **others: object) -> dict[str, object]:
    lists = {"lora_shrink": shrinks, "lora_expand": expands}
    lists |= {"lora_silu_mul": (SILU_MUL,), "lora_rotary_store": (ROTARY_STORE,)} | others
    return {"gpu": "Some Card"} | {
        name: list(rows) if isinstance(rows, tuple) else rows for name, rows in lists.items()
    }


def choices(tokens: int, num_slices: int, in_features: int, out_features: int, rank: int, size: int):
    parts = choose_num_parts(tokens, num_slices, in_features, rank, size)
    return (
        parts,
        choose_shrink_tiles(tokens, in_features, rank, size, num_slices),
        choose_expand_tiles(tokens, out_features, rank, num_slices, parts, size),
    )


def defaults(tokens: int, num_slices: int, in_features: int, out_features: int, rank: int, size: int):
    return (
        default_num_parts(tokens, num_slices, in_features, rank),
        default_shrink_tiles(tokens, in_features, rank, size),
        default_expand_tiles(tokens, out_features, rank, size),
    )


def test_measured_layer_overrides_the_heuristic(write_table):
    write_table(table_of())
    layer = (32, 3, 4096, 6144, 64, 2)
    assert choices(*layer) == (16, TUNED_SHRINK, TUNED_EXPAND)
    assert choices(*layer) != defaults(*layer)


@pytest.mark.parametrize(
    "layer",
    [
        (8, 3, 4096, 6144, 64, 2),  # another class of T
        (32, 2, 4096, 6144, 64, 2),  # other slices
        (32, 3, 4080, 6128, 64, 2),  # other widths
        (32, 3, 4096, 6144, 64, 4),  # another element size
        (32, 3, 4096, 6144, 65, 2),  # above every rank that was measured
    ],
)
def test_everything_else_is_left_to_the_heuristic(write_table, layer):
    write_table(table_of())
    assert choices(*layer) == defaults(*layer)


def test_measured_launches_of_silu_and_rotary_kernels_override_the_heuristic(write_table):
    write_table(table_of())
    assert choose_silu_mul_launch(32, 64, 2) == TUNED_SILU_MUL
    assert choose_rotary_store_launch(32, 128, 64, 2) == TUNED_ROTARY_STORE
    assert choose_silu_mul_launch(32, 20, 2) == replace(TUNED_SILU_MUL, block_r=32)
    assert choose_rotary_store_launch(32, 128, 3, 2) == replace(TUNED_ROTARY_STORE, block_r=16)


@pytest.mark.parametrize(("tokens", "max_rank", "element_size"), [(8, 64, 2), (32, 65, 2), (32, 64, 4)])
def test_other_launches_of_silu_and_rotary_kernels_are_left_to_the_heuristic(
    write_table, tokens, max_rank, element_size
):
    write_table(table_of())
    silu_mul, rotary_store = (tokens, max_rank, element_size), (tokens, 128, max_rank, element_size)
    assert choose_silu_mul_launch(*silu_mul) == default_silu_mul_launch(*silu_mul)
    assert choose_rotary_store_launch(*rotary_store) == default_rotary_store_launch(*rotary_store)
    assert choose_rotary_store_launch(32, 64, 64, 2) == default_rotary_store_launch(32, 64, 64, 2)


@pytest.mark.parametrize("current", [None, "Other Card"])
def test_unknown_gpu_and_none_are_left_to_the_heuristic(write_table, current):
    write_table(table_of(), current=current)
    assert choices(32, 3, 4096, 6144, 64, 2) == defaults(32, 3, 4096, 6144, 64, 2)


def test_expand_of_another_number_of_parts_is_left_to_the_heuristic(write_table):
    write_table(table_of())
    assert choose_expand_tiles(32, 6144, 64, 3, 16) == TUNED_EXPAND
    assert choose_expand_tiles(32, 6144, 64, 3, 8) == default_expand_tiles(32, 6144, 64, 2)


def test_rank_between_two_takes_the_row_above_with_its_block_cut(write_table):
    rank_16 = SHRINK | {"max_rank": 16, "num_parts": 4, "tiles": SHRINK["tiles"] | {"block_r": 16}}
    write_table(table_of([SHRINK, rank_16]))
    assert choices(32, 3, 4096, 6144, 16, 2)[0] == 4
    parts, shrink, expand = choices(32, 3, 4096, 6144, 17, 2)
    assert (parts, shrink.block_r, expand.block_r) == (16, 32, 32)
    assert (shrink.block_k, expand.block_n) == (256, 256)
    assert choices(32, 3, 4096, 6144, 3, 2)[1].block_r == 16  # the smallest that there is


@pytest.mark.parametrize("max_rank", [16, 48, 64, 512])
@pytest.mark.parametrize("parts_of_class", [(16, 1, 1, 1), (1, 1, 2, 5), (3, 16, 2, 4)])
def test_scratch_is_enough_whatever_was_measured(write_table, max_rank, parts_of_class):
    classes = (1, 32, 128, TOKEN_CLASSES[-1])
    rows = [
        SHRINK | {"max_tokens": limit, "num_parts": parts}
        for limit, parts in zip(classes, parts_of_class, strict=True)
    ]
    write_table(table_of(rows))
    needed = 0
    for tokens in (*range(1, 600), *range(600, 5000, 97)):
        parts = choose_num_parts(token_class(tokens), 3, 4096, max_rank)
        needed = max(needed, parts * 3 * tokens * max_rank)
        assert lora_scratch_elements(tokens, 3, 4096, max_rank) >= needed
    if max_rank == 64:
        assert choose_num_parts(TOKEN_CLASSES[-1], 3, 4096, max_rank) == parts_of_class[-1]


DAMAGED = [
    ("{", "is no JSON"),
    ([], "expected a table with the GPU's name"),
    ({"lora_shrink": []}, "expected a table with the GPU's name"),
    (table_of({"tiles": 3}), "lora_shrink is dict, expected a list"),
    (table_of([SHRINK, {}]), "row 1 of lora_shrink has no 'tiles'"),
    (table_of([3]), "row 0 of lora_shrink: "),
    (table_of([SHRINK | {"num_parts": 0}]), "num_parts is 0, expected an integer of at least 1"),
    (table_of([SHRINK | {"max_rank": "64"}]), "max_rank is '64', expected an integer"),
    (table_of([SHRINK | {"max_rank": True}]), "max_rank is True, expected an integer"),
    (table_of([SHRINK | {"tiles": SHRINK["tiles"] | {"block_k": 24}}]), "block_k is 24, expected a power"),
    (table_of([SHRINK | {"tiles": SHRINK["tiles"] | {"block_r": 8}}]), "block_r is 8, .* at least 16"),
    (table_of([{k: v for k, v in SHRINK.items() if k != "max_tokens"}]), "lora_shrink has no 'max_tokens'"),
    (table_of(expands=[EXPAND | {"tiles": EXPAND["tiles"] | {"loads_y_first": 1}}]), "loads_y_first is 1"),
    (table_of([SHRINK | {"tiles": SHRINK["tiles"] | {"tiles_first": "no"}}]), "tiles_first is 'no'"),
    (
        table_of(expands=[EXPAND | {"tiles": EXPAND["tiles"] | {"n_tiles": 0}}]),
        "n_tiles is 0, expected an integer",
    ),
    (table_of(expands=[EXPAND, EXPAND | {"tiles": None}]), "row 1 of lora_expand: "),
]


DAMAGED_LAUNCHES = [
    (
        {"lora_silu_mul": (SILU_MUL | {"tiles": SILU_MUL["tiles"] | {"block_n": 24}},)},
        "block_n is 24, expected",
    ),
    ({"lora_silu_mul": (SILU_MUL | {"tiles": 3},)}, "row 0 of lora_silu_mul: tiles is 3, expected a table"),
    ({"lora_rotary_store": (SILU_MUL,)}, "row 0 of lora_rotary_store has no 'heads'"),
    ({"lora_rotary_store": (ROTARY_STORE | {"head_dim": 0},)}, "head_dim is 0, expected an integer"),
]


@pytest.mark.parametrize(
    ("others", "message"), DAMAGED_LAUNCHES, ids=[message for _, message in DAMAGED_LAUNCHES]
)
def test_damaged_launch_is_refused_with_file_and_row(write_table, others, message):
    write_table(table_of(**others))
    with pytest.raises(ValueError, match=rf"card\.json.*{message}"):
        (choose_silu_mul_launch(32, 64, 2), choose_rotary_store_launch(32, 128, 64, 2))


@pytest.mark.parametrize(("table", "message"), DAMAGED, ids=[str(index) for index in range(len(DAMAGED))])
def test_damaged_table_is_refused_with_file_and_row(write_table, table, message):
    write_table(table)
    with pytest.raises(ValueError, match=rf"card\.json.*{message}"):
        choices(32, 3, 4096, 6144, 64, 2)


def test_damaged_rows_of_other_gpus_do_no_harm(write_table):
    write_table(table_of([{}]), current="Other Card")
    assert choices(32, 3, 4096, 6144, 64, 2) == defaults(32, 3, 4096, 6144, 64, 2)


def test_rows_of_any_kernel_come_in_the_order_of_the_files(tmp_path):
    for name, numbers in (("b", [3]), ("a", [2, 1])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"gpu": "G", "any": [{"n": n} for n in numbers]}))
    assert read_tuned_rows("G", "any", lambda row: row["n"], folder=tmp_path) == [2, 1, 3]
    assert read_tuned_rows("G", "other", lambda row: row["n"], folder=tmp_path) == []
    assert read_tuned_rows(None, "any", lambda row: row["n"], folder=tmp_path) == []
    with pytest.raises(ValueError, match=re.escape("a.json: row 0 of any has no 'm'")):
        read_tuned_rows("G", "any", lambda row: row["m"], folder=tmp_path)


@pytest.mark.parametrize("file", sorted(TUNING_FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_every_row_of_the_committed_tables_is_found(file):
    """By the function that reads it: a default may be the same as a row."""
    table = read_table(file)
    gpu, names = table["gpu"], ("max_tokens", "max_rank", "element_size")
    for row in table.get("lora_shrink", []):
        tokens, rank, size = (row[name] for name in names)
        found = tuned_shrink(gpu, tokens, row["num_slices"], row["in_features"], rank, size)
        assert found == TunedShrink(row["num_parts"], ShrinkTiles(**row["tiles"]))
    for row in table.get("lora_expand", []):
        tokens, rank, size = (row[name] for name in names)
        layer = (row["num_slices"], row["out_features"], rank, row["num_parts"])
        assert tuned_expand(gpu, tokens, *layer, size) == ExpandTiles(**row["tiles"])
    for row in table.get("lora_silu_mul", []):
        assert tuned_silu_mul(gpu, *(row[name] for name in names)) == LoRASiluMulLaunch(**row["tiles"])
    for row in table.get("lora_rotary_store", []):
        tokens, rank, size = (row[name] for name in names)
        found = tuned_rotary_store(gpu, tokens, row["head_dim"], rank, size)
        assert found == LoRARotaryStoreLaunch(**row["tiles"])
    rows = [row for kernel in table if kernel.startswith("lora_") for row in table[kernel]]
    assert {row["max_tokens"] for row in rows} <= set(TOKEN_CLASSES)


TRIALS = {
    "whole_rank": TrialTiles(5, ShrinkTiles(16, 64, 512, 8, 1), ExpandTiles(16, 256, 64, 4, True)),
    "large_tiles": TrialTiles(2, ShrinkTiles(128, 64, 64, 8, 4), ExpandTiles(128, 128, 64, 8, True)),
    "many_rows": TrialTiles(2, ShrinkTiles(16, 16, 32, 4, 3, block_t_many=64), ExpandTiles(16, 64, 64, 4)),
    "blocks_of_rank": TrialTiles(3, ShrinkTiles(32, 16, 16, 4, 3), ExpandTiles(32, 32, 16, 2)),
    "runs": TrialTiles(1, ShrinkTiles(64, 64, 64, 4, 3), ExpandTiles(32, 16, 64, 4, n_tiles=2, num_stages=3)),
    "long_runs": TrialTiles(2, ShrinkTiles(16, 64, 64, 4, 2), ExpandTiles(64, 64, 64, 4, False, 8, 3)),
    "tiles_first": TrialTiles(
        3, ShrinkTiles(16, 16, 64, 4, 2, block_t_many=64, tiles_first=True), ExpandTiles(16, 64, 64, 4)
    ),
    "runs_of_blocks": TrialTiles(2, ShrinkTiles(16, 16, 64, 4, 2), ExpandTiles(16, 16, 16, 4, True, 3, 2)),
}


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("trial", list(TRIALS.values()), ids=list(TRIALS))
def test_halves_are_exact_to_rounding_with_any_tiles(device, dtype, trial):
    # Adapters with just as many tokens as make a tile of either kind, and with one more; and one with a large
    # tile and a rest of one more.
    at_bounds = [0] * 16 + [1] * 17 + [2] * 32 + [LAST_SLOT] * 33 + [4] * (64 + 17)
    ranks: dict[int, tuple[int | None, ...]] = {0: (5,), 1: (16,), 2: (20,), LAST_SLOT: (8,), 4: (3,)}
    for case in (
        mixed_case(dtype, in_features=100),
        random_case(140, dtype, in_features=70),
        make_case(at_bounds, ranks, output_slices=(21,), in_features=70, dtype=dtype),
    ):
        step = on_device(case, device)
        v = step.new_v(trial.num_parts)
        parts = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
        y = step.y.clone()
        with trial_tiles(trial):
            triton_lora_shrink(v, step.x, step.arena, step.table, step.metadata, fill_zeros=True)
            triton_lora_expand(
                y,
                parts.to(device),
                step.arena,
                step.table,
                step.metadata,
                output_slices=step.output_slices,
            )
        total = v.cpu().double().sum(0).float()
        expected = lora_shrink_reference(case.x, case.table, case.mapping, step.max_rank, dtype=torch.float32)
        assert_within_bounds(total, expected)
        summed = parts[0]
        for part in parts[1:]:
            summed = summed + part
        assert_within_bounds(
            y.cpu(), lora_expand_reference(case.y, summed.to(dtype), case.table, case.mapping)
        )


def test_overwriting_expand_ignores_that_y_would_be_loaded_first():
    step = on_device(mixed_case(), "cpu")
    v = torch.randn(1, 3, len(step.x), step.max_rank, generator=torch.Generator().manual_seed(1))
    results = []
    for first in (False, True):
        y = torch.full_like(step.y, float("nan"))
        with trial_tiles(TrialTiles(expand=ExpandTiles(16, 64, 64, 4, first))):
            triton_lora_expand(
                y,
                v,
                step.arena,
                step.table,
                step.metadata,
                output_slices=step.output_slices,
                add_inputs=False,
            )
        results.append(y)
    assert_same_on_cpu(*results)
    assert results[0].isfinite().any()


def test_trial_tiles_rule_the_whole_layer_and_end_with_the_trial():
    before = choose_num_parts(32, 1, 70, 22)
    step = on_device(random_case(20, torch.float32, in_features=70), "cpu")
    ours, trial = step.y.clone(), step.y.clone()
    with trial_tiles(TRIALS["blocks_of_rank"]):
        assert choose_num_parts(32, 1, 70, 22) == 3 != before
        for y in (ours, trial):
            triton_add_lora_linear(
                y,
                step.x,
                step.arena,
                step.table,
                step.metadata,
                output_slices=step.output_slices,
                max_rank=step.max_rank,
            )
    assert choose_num_parts(32, 1, 70, 22) == before
    assert_same_on_cpu(ours, trial)
