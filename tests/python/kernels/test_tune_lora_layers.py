"""The tuner of whole layers: tiny layers on the CPU, what it keeps, and what is out."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from lora_serve.kernels import triton_lora_tiles as tiles_module
from lora_serve.kernels import tuned_tables
from lora_serve.kernels.triton_lora_tiles import (
    choose_expand_tiles,
    choose_num_parts,
    choose_rotary_store_launch,
    choose_silu_mul_launch,
    clear_choices,
)
from lora_serve.kernels.tuned_lora_tiles import ExpandTiles, LoRARotaryStoreLaunch, LoRASiluMulLaunch

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
SILU_MUL = {"block_t": 16, "block_n": 64, "block_r": 16, "n_tiles": 8, "num_warps": 4, "num_stages": 3}
ROTARY_STORE = {"block_t": 32, "block_r": 16, "heads": 4, "num_warps": 4, "num_stages": 3}
EXPAND = {"block_t": 16, "block_n": 128, "block_r": 16, "num_warps": 4, "loads_y_first": False}
EXPAND |= {"n_tiles": 4, "num_stages": 3}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the smallest run is one on the CPU")


@pytest.fixture
def tuner(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module("tune_lora_layers")


def tiles_in(table: dict, kernel: str) -> list[dict]:
    return [row["tiles"] for row in table.get(kernel, [])]


def test_what_costs_least_is_kept_for_the_next_kernel_written_and_read(tuner, tmp_path, monkeypatch):
    asked = []

    def times(_: object, tables: dict) -> dict:
        asked.append(tables)
        return {name: {(5, 2): cost_of(table), (7, 2): cost_of(table) + 2} for name, table in tables.items()}

    def cost_of(table: dict) -> float:
        gains = (
            SILU_MUL in tiles_in(table, "lora_silu_mul"),
            ROTARY_STORE in tiles_in(table, "lora_rotary_store"),
        )
        has_four = any(row["num_parts"] == 4 for row in table.get("lora_shrink", []))
        gains += (EXPAND in tiles_in(table, "lora_expand") and has_four,)
        return 100.0 - 10 * sum(gains)

    monkeypatch.setattr(tuner.Steps, "times", times)
    kernels = ["silu", "rotary", "o_and_down", "qkv"]
    assert tuner.main(["--smallest", "--out", str(tmp_path), "--kernels", *kernels]) == 0
    # The second kernel's candidates all have what was kept of the first.
    assert len(asked) == len(kernels)
    assert all(tiles_in(table, "lora_silu_mul") == [SILU_MUL] for table in asked[1].values())
    assert len({json.dumps(table) for table in asked[2].values()}) == len(asked[2])

    table = json.loads((tmp_path / "interpreter.json").read_text())
    said = {
        f"a layer over base, {tokens} tokens, 2 adapters of rank 16": us
        for tokens, us in ((5, 70.0), (7, 72.0))
    }
    rows = [
        row
        for kernel in ("lora_silu_mul", "lora_rotary_store", "lora_shrink", "lora_expand")
        for row in table[kernel]
    ]
    # One expand, and the shrinks of o and down; nothing was better for queries, keys and values.
    assert len(rows) == 5
    assert all(row["time_us"] == said and row["max_tokens"] == 8 for row in rows)
    monkeypatch.setattr(tuned_tables, "TUNING_FOLDER", tmp_path)
    monkeypatch.setattr(tiles_module, "current_gpu", lambda: "interpreter")
    clear_choices()
    try:
        assert choose_silu_mul_launch(8, 16, 4) == LoRASiluMulLaunch(**SILU_MUL)
        assert choose_rotary_store_launch(8, 16, 16, 4) == LoRARotaryStoreLaunch(**ROTARY_STORE)
        assert [choose_num_parts(8, 1, in_features, 16, 4) for in_features in (64, 96)] == [4, 4]
        assert choose_expand_tiles(8, 64, 16, 1, 4, 4) == ExpandTiles(**EXPAND)
    finally:
        clear_choices()


def steps_of(tuner: ModuleType) -> object:
    options = tuner.parse_arguments(["--smallest", "--out", "unused", "--repetitions", "1"])
    config = tuner.bench.make_config(True)
    return tuner.Steps(tuner.bench.make_layers(config, torch.device("cpu")), config, options)


@torch.inference_mode()
@pytest.mark.parametrize("wrong_from", [5, 7])
def test_table_whose_layers_are_wrong_in_one_step_is_out(tuner, monkeypatch, capsys, wrong_from):
    run = tuner.bench.Variant.run

    def run_wrongly(variant):
        (file,) = tuned_tables.TUNING_FOLDER.glob("*.json")
        result = run(variant)
        is_wrong = "is_wrong" in json.loads(file.read_text()) and len(result) >= wrong_from
        return result * 1.5 if is_wrong else result

    monkeypatch.setattr(tuner.bench.Variant, "run", run_wrongly)
    tables = {"now": {"gpu": "any"}, "wrong": {"gpu": "any", "is_wrong": True}, "right": {"gpu": "any"}}
    times = steps_of(tuner).times(tables)
    assert {name: list(of_steps) for name, of_steps in times.items()} == {
        "now": [(5, 2), (7, 2)],
        "right": [(5, 2), (7, 2)],
    }
    assert "RuntimeError: ours is off by" in capsys.readouterr().out
    with pytest.raises(ValueError, match="wrong with the table in use"):
        tuner.choose(steps_of(tuner).times({"now": tables["wrong"]}))


def test_gain_that_may_be_noise_changes_nothing(tuner):
    def times(mean: float) -> dict:
        return {(256, 8): mean - 5, (512, 8): mean + 5}

    now = {"now": times(50.0)}
    assert tuner.choose(now | {"other": times(49.8)}) == "now"
    assert tuner.choose(now | {"other": times(49.6)}) == "other"
    assert tuner.choose(now | {"other": times(49.6), "best": times(49.5)}) == "best"


def test_rows_that_were_there_keep_their_times(tuner):
    old, new = {"max_rank": 64, "time_us": {"8": 1.0}}, {"max_rank": 16}
    before = {"gpu": "any", "lora_silu_mul": [old], "other": [old]}
    table = tuner.with_times(before | {"lora_silu_mul": [old, new]}, before, {(256, 8): 41.234}, 16)
    said = {"a layer over base, 256 tokens, 8 adapters of rank 16": 41.23}
    assert table == {"gpu": "any", "lora_silu_mul": [old, new | {"time_us": said}], "other": [old]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tokens", "128", "129"],
            r"\[128, 129\] are of the classes up to \[128, 512\], expected one class",
        ),
        (["--tokens", "64", "--adapters", "8", "65"], "65 do not fit a step of 64 tokens"),
    ],
)
def test_steps_that_cannot_be_compared_are_refused(tuner, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tuner.main(["--out", "unused", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_programs_that_compile_ahead_share_the_candidates(tuner, monkeypatch, tmp_path):
    """Each table is compiled by one of them, and none is timed."""
    compiled = []
    monkeypatch.setattr(tuner.Steps, "compile", lambda _, tables: compiled.append(tables))
    monkeypatch.setattr(tuner.Steps, "times", lambda *_: pytest.fail("timed"))
    for index in range(3):
        given = ["--smallest", "--out", str(tmp_path), "--kernels", "silu", "rotary", "--part", f"{index}/3"]
        assert tuner.main(given) == 0
    tables = [json.dumps(table) for part in compiled for table in part]
    assert len(tables) == len(set(tables)) == len(tuner._SILU_MUL) + len(tuner._ROTARY_STORE)
    assert not list(tmp_path.iterdir())
