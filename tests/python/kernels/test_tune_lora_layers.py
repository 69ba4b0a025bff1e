"""The tuner of whole layers: tiny layers, what it keeps, and what is out."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


@pytest.fixture
def tuner(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module("tune_lora_layers")


def table_in_use() -> dict:
    (file,) = tuned_tables.TUNING_FOLDER.glob("*.json")
    return json.loads(file.read_text())


def tiles_in(table: dict, kernel: str) -> list[dict]:
    return [row["tiles"] for row in table.get(kernel, [])]


def shrinks_in(table: dict, num_slices: int) -> list[dict]:
    return [row for row in table.get("lora_shrink", []) if row["num_slices"] == num_slices]


def parts_in(table: dict, kernel: str) -> set[int]:
    return {row["num_parts"] for row in table.get(kernel, [])}


def cost_of(table: dict) -> float:
    """Less for one launch of each kernel, and for o in four parts."""
    parts = [row["num_parts"] for row in table.get("lora_shrink", []) if row["in_features"] == 64]
    gains = (
        SILU_MUL in tiles_in(table, "lora_silu_mul"),
        ROTARY_STORE in tiles_in(table, "lora_rotary_store"),
        EXPAND in tiles_in(table, "lora_expand") and 4 in parts,
    )
    return 100.0 - 10 * sum(gains)


def test_what_costs_least_is_kept_for_the_next_kernel_written_and_read(tuner, tmp_path, monkeypatch):
    asked = []

    def times(_: object, tables: dict, repetitions: int) -> dict:
        asked.append((tables, repetitions))
        return {
            name: {(33, 2): cost_of(table), (40, 2): cost_of(table) + 2} for name, table in tables.items()
        }

    monkeypatch.setattr(tuner.Steps, "times", times)
    kernels = ["silu", "rotary", "o", "gate_up_shrink"]
    options = ["--smallest", "--out", str(tmp_path), "--repetitions", "5"]
    assert tuner.main([*options, "--kernels", *kernels]) == 0
    # All that gains is timed a second time; nothing was better for gate and up.
    assert [(len(tables) == 2, repetitions) for tables, repetitions in asked] == [
        *((False, 5), (True, 15)) * 3,
        (False, 5),
    ]
    # What is in use is tried in the other order of programs, too; no other candidate changes the order.
    orders = [row["tiles"]["tiles_first"] for table in asked[-1][0].values() for row in shrinks_in(table, 2)]
    assert orders.count(True) == 1
    assert orders.count(False) > 1
    # The second kernel's candidates all have what was kept of the first.
    assert all(tiles_in(table, "lora_silu_mul") == [SILU_MUL] for table in asked[2][0].values())

    table = json.loads((tmp_path / "none.json").read_text())
    said = {
        kernel: [list(row["time_us"].values()) for row in table[kernel]]
        for kernel in ("lora_silu_mul", "lora_rotary_store", "lora_shrink", "lora_expand")
    }
    assert said == {
        "lora_silu_mul": [[90.0, 92.0]],
        "lora_rotary_store": [[80.0, 82.0]],
        "lora_shrink": [[70.0, 72.0]],
        "lora_expand": [[70.0, 72.0]],
    }
    assert list(table["lora_expand"][0]["time_us"]) == [
        f"a layer over base, {tokens} tokens, 2 adapters of rank 16" for tokens in (33, 40)
    ]
    monkeypatch.setattr(tuned_tables, "TUNING_FOLDER", tmp_path)
    monkeypatch.setattr(tiles_module, "current_gpu", lambda: "none")
    clear_choices()
    try:
        assert choose_silu_mul_launch(128, 16, 4) == LoRASiluMulLaunch(**SILU_MUL)
        assert choose_rotary_store_launch(128, 16, 16, 4) == LoRARotaryStoreLaunch(**ROTARY_STORE)
        assert choose_num_parts(128, 1, 64, 16, 4) == 4
        assert choose_expand_tiles(128, 64, 16, 1, 4, 4) == ExpandTiles(**EXPAND)
    finally:
        clear_choices()


@torch.inference_mode()
@pytest.mark.parametrize("linear", ["qkv", "o", "down"])
def test_expand_is_tried_in_all_numbers_of_parts_and_its_shrink_in_those_in_use(tuner, monkeypatch, linear):
    monkeypatch.setattr(tiles_module, "current_gpu", lambda: "any")
    layer = tuner.bench.make_layers(tuner.bench.make_config(True), torch.device("cpu"))[0]
    search = tuner.Search(128, 16, layer)
    expands = list(search.candidates(linear, {"gpu": "any"}).values())
    parts = [parts_in(table, "lora_shrink") for table in expands]
    assert [{2}, {4}, {8}] == [parts[0], parts[len(parts) // 2], parts[-1]]
    assert [parts_in(table, "lora_expand") for table in expands] == parts
    in_use = expands[-1]
    with tuner.using(in_use):
        shrinks = search.candidates(f"{linear}_shrink", in_use).values()
    assert shrinks
    assert all(parts_in(table, "lora_shrink") == {8} for table in shrinks)


def test_gain_that_is_gone_the_second_time_is_not_kept(tuner, tmp_path, monkeypatch):
    def times(_: object, tables: dict, repetitions: int) -> dict:
        return {
            name: {(33, 2): cost_of(table) if repetitions == 5 else 90.0} for name, table in tables.items()
        }

    monkeypatch.setattr(tuner.Steps, "times", times)
    options = ["--smallest", "--out", str(tmp_path), "--repetitions", "5"]
    assert tuner.main([*options, "--kernels", "silu"]) == 0
    assert not list(tmp_path.iterdir())


def steps_of(tuner: ModuleType) -> object:
    options = tuner.parse_arguments(["--smallest", "--out", "unused"])
    config = tuner.bench.make_config(True)
    return tuner.Steps(tuner.bench.make_layers(config, torch.device("cpu")), config, options)


TABLES = {"now": {"gpu": "any"}, "wrong": {"gpu": "any", "is_wrong": True}, "right": {"gpu": "any"}}


def spoil_a_result(result: torch.Tensor, _: object) -> torch.Tensor:
    result = result.clone()
    result[3, 5] *= 1.01  # a hundredth of what would be taken for rounding
    return result


def spoil_a_page(result: torch.Tensor, step: object) -> torch.Tensor:
    step._pages[2, 1, 0] = float("nan")  # keys that nobody stored
    return result


@torch.inference_mode()
@pytest.mark.parametrize("spoil", [spoil_a_result, spoil_a_page])
@pytest.mark.parametrize("wrong_from", [33, 40])
def test_table_whose_layers_are_wrong_in_one_step_is_out(tuner, monkeypatch, capsys, wrong_from, spoil):
    run = tuner.bench.Variant.run

    def run_wrongly(variant):
        result = run(variant)
        is_wrong = len(result) >= wrong_from and variant.adapters and "is_wrong" in table_in_use()
        return spoil(result, variant._step) if is_wrong else result

    monkeypatch.setattr(tuner.bench.Variant, "run", run_wrongly)
    steps = steps_of(tuner)
    times = steps.times(TABLES, 1)
    assert {name: list(of_steps) for name, of_steps in times.items()} == {
        "now": [(33, 2), (40, 2)],
        "right": [(33, 2), (40, 2)],
    }
    assert re.search(r"off by \S+ of what the adapters change", capsys.readouterr().out)
    if spoil is spoil_a_page:
        with pytest.raises(RuntimeError, match="wrong with table 'now'"):
            steps.times({"now": TABLES["wrong"]}, 1)


@torch.inference_mode()
def test_error_is_compared_to_that_of_the_table_in_use_and_of_no_candidate(tuner, monkeypatch):
    errors = {"now": 0.02, "exact": 0.0, "other": 0.029, "far": 0.031}

    def error_of(_: object, __: torch.Tensor) -> float:
        return errors[table_in_use()["gpu"]]

    monkeypatch.setattr(tuner.bench.Variant, "error_of", error_of)
    assert list(steps_of(tuner).times({name: {"gpu": name} for name in errors}, 1)) == [
        "now",
        "exact",
        "other",
    ]


@torch.inference_mode()
def test_table_whose_kernels_do_not_compile_is_out(tuner, monkeypatch):
    run = tuner.bench.Variant.run

    def run_or_raise(variant):
        if variant.adapters and "is_wrong" in table_in_use():
            raise RuntimeError("out of shared memory")
        return run(variant)

    monkeypatch.setattr(tuner.bench.Variant, "run", run_or_raise)
    assert list(steps_of(tuner).times(TABLES, 1)) == ["now", "right"]


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
        (["--tokens", "16"], r"\[16\]: up to 32 other kernels run, expected more"),
        (["--tokens", "2049"], r"\[2049\]: the GPU's clock changes .* at most 2048; tune_lora.py tunes"),
        (["--tokens", "64", "--adapters", "8", "65"], "65 do not fit a step of 64 tokens"),
    ],
)
def test_steps_that_cannot_be_compared_are_refused(tuner, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tuner.main(["--out", "unused", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_workers_share_the_candidates(tuner, monkeypatch, tmp_path):
    """Each table is compiled by one of them, and none is timed."""
    compiled = []
    monkeypatch.setattr(tuner.Steps, "compile", lambda _, tables: compiled.append(tables))
    monkeypatch.setattr(tuner.Steps, "times", lambda *_: pytest.fail("timed"))
    for index in range(3):
        given = ["--smallest", "--out", str(tmp_path), "--kernels", "silu", "o", "--share", f"{index}/3"]
        assert tuner.main(given) == 0
    tables = [json.dumps(table) for share in compiled for table in share]
    numbers = len(tuner.silu_mul_candidates(128, 16)), len(tuner.expands_in_layers(128, 16))
    assert len(tables) == len(set(tables)) == sum(numbers)
    assert max(map(len, compiled)) - min(map(len, compiled)) <= 1
    assert not list(tmp_path.iterdir())


def test_workers_are_started_with_the_same_options_and_failures_are_said(tuner, monkeypatch, capsys):
    started = []

    def start(command: list[str]) -> SimpleNamespace:
        started.append(command[2:])
        return SimpleNamespace(wait=lambda: 3 if command[-1] == "1/2" else 0)

    monkeypatch.setattr(tuner.subprocess, "Popen", start)
    tuner.compile_ahead(["--out", "o"], 2)
    assert started == [["--out", "o", "--share", "0/2"], ["--out", "o", "--share", "1/2"]]
    assert capsys.readouterr().out.startswith("worker 1 ended with 3")


@pytest.mark.gpu
def test_tiny_layers_are_tuned_on_a_gpu(tuner, tmp_path, monkeypatch, capsys):
    config = tuner.bench.make_config(True)
    monkeypatch.setattr(tuner.bench, "make_config", lambda _: config)
    monkeypatch.setattr(tuner, "choose", lambda times: list(times)[-1])  # whatever it gains
    options = ["--tokens", "40", "--adapters", "2", "--lora-rank", "8"]
    options += ["--repetitions", "2", "--workers", "0"]
    assert tuner.main([*options, "--out", str(tmp_path), "--kernels", "silu", "rotary", "o"]) == 0
    (file,) = tmp_path.iterdir()
    table = json.loads(file.read_text())
    assert table["gpu"] == torch.cuda.get_device_name()
    for kernel in ("lora_silu_mul", "lora_rotary_store", "lora_shrink", "lora_expand"):
        (row,) = (row for row in table[kernel] if row["max_rank"] == 8 and row["element_size"] == 4)
        assert list(row["time_us"]) == ["a layer over base, 40 tokens, 2 adapters of rank 8"]
    assert "out: " not in capsys.readouterr().out
