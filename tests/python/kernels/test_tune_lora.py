"""The tuner of the LoRA kernels: a tiny layer in the interpreter, and what it may not choose."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from lora_serve.kernels.triton_lora_tiles import (
    choose_expand_tiles,
    choose_num_parts,
    choose_shrink_tiles,
    clear_choices,
)
from lora_serve.kernels.tuned_lora_tiles import ExpandTiles, ShrinkTiles, TunedShrink

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU"),
    # What no kernel has written is NaN, on the way to be dropped.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture
def tuner(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module("tune_lora")


def test_steps_in_which_the_shrink_is_not_tuned_alone_are_refused(tuner, capsys):
    with pytest.raises(SystemExit):
        tuner.parse_arguments(["--out", "folder", "--tokens", "128", "32"])

    assert "--tokens [128, 32]: up to 32 other kernels run, expected more" in capsys.readouterr().err


def test_smallest_run_writes_a_table_that_is_read(tuner, tmp_path, monkeypatch):
    few = [TunedShrink(parts, ShrinkTiles(16, 16, 16, 4, 1)) for parts in (1, 3)]
    trials = sys.modules["lora_tile_trials"]
    monkeypatch.setattr(trials, "shrink_candidates", lambda *_: few)
    monkeypatch.setattr(trials, "expand_candidates", lambda *_: [ExpandTiles(16, 64, 16, 4, True)])
    assert tuner.main(["--smallest", "--out", str(tmp_path)]) == 0

    table = json.loads((tmp_path / "interpreter.json").read_text())
    assert [row["max_tokens"] for row in table["lora_shrink"]] == [1, 8]
    monkeypatch.setattr("lora_serve.kernels.tuned_tables.TUNING_FOLDER", tmp_path)
    monkeypatch.setattr("lora_serve.kernels.triton_lora_tiles.current_gpu", lambda: "interpreter")
    clear_choices()
    try:
        for shrink, expand in zip(table["lora_shrink"], table["lora_expand"], strict=True):
            key = (shrink["max_tokens"], 40, 8, 4, 2)
            assert choose_shrink_tiles(*key) == ShrinkTiles(**shrink["tiles"])
            parts = choose_num_parts(shrink["max_tokens"], 2, 40, 8, 4)
            assert parts == shrink["num_parts"] == expand["num_parts"]
            tiles = choose_expand_tiles(shrink["max_tokens"], 32, 8, 2, parts, 4)
            assert tiles == ExpandTiles(**expand["tiles"])
    finally:
        clear_choices()


def test_every_candidate_of_the_smallest_layer_is_right(tuner):
    task = tuner.Task(tuner.MODELS["smallest"][0], 8, (5,), (2,))
    point = tuner.Point(task, 5, 2)
    shrinks, expands = {s: [] for s in task.shrinks(4)}, {(3, t): [] for t in task.expands(4)}
    run = tuner.Tuner(math.inf, None)
    exact = {3: point.exact_expand(3)}
    assert all(run._shrink_us(task, point, shrink) < math.inf for shrink in shrinks)
    assert all(run._expand_us(task, point, exact, expand) < math.inf for expand in expands)


@pytest.mark.parametrize("half", ["shrink", "expand"])
def test_kernel_that_does_nothing_is_out_however_fast(tuner, monkeypatch, capsys, half):
    monkeypatch.setattr(sys.modules["lora_tile_trials"], f"triton_lora_{half}", lambda *_, **__: None)
    task = tuner.Task(tuner.MODELS["smallest"][0], 8, (1,), (1,))
    with pytest.raises(ValueError, match="no candidate of Task"):
        tuner.Tuner(math.inf, None).run(task, 0.0)
    assert "are wrong" in capsys.readouterr().out


def test_error_above_the_bound_of_one_element_is_out(tuner):
    point = tuner.Point(tuner.Task(tuner.MODELS["smallest"][0], 8, (5,), (2,)), 5, 2)
    right = point.exact_shrink.value.float()
    assert tuner.count_wrong(right, point.exact_shrink) == 0
    right[1, 4, 7] += 3 * point.exact_shrink.bound[1, 4, 7] + right[1, 4, 7].abs() * 2**-22
    assert tuner.count_wrong(right, point.exact_shrink) == 1


def shrink(parts: int) -> TunedShrink:
    return TunedShrink(parts, ShrinkTiles(16, 16, 16, 4, 1))


def test_choice_is_the_pair_that_loses_least_over_the_adapters(tuner):
    task = tuner.Task((40, (24,)), 8, (8,), (8, 1))
    tiles = ExpandTiles(16, 32, 16, 4, True)
    shrinks = {shrink(1): [9.0, 4.0], shrink(4): [5.0, 5.0], shrink(8): [4.9, 5.0]}
    expands = {(1, tiles): [3.0, 3.0], (4, tiles): [4.0, 3.5], (8, tiles): [9.0, 9.0]}
    choice = tuner.choose(task, shrinks, expands, 0.0)
    assert (choice.shrink.num_parts, choice.shrink_us, choice.expand_us) == (4, [5.0, 5.0], [4.0, 3.5])
    assert choice.default_us == []  # its expand was not measured
    # Where others read v too, fewer parts pay.
    assert tuner.choose(task, shrinks, expands, 2.0).shrink.num_parts == 1


def test_parts_that_gain_nothing_in_the_shrink_are_not_tried_in_the_expand(tuner):
    times = {shrink(2): [5.0, 4.0], shrink(8): [5.0, 3.9], shrink(4): [5.5, 4.0], shrink(16): [4.9, 9.0]}
    assert tuner.useful_parts(times, 0.0) == [2, 8, 16]
    assert tuner.useful_parts(times, 1.0) == [2]


def test_hopeless_candidate_is_measured_no_further(tuner):
    times = {"good": [], "slow": [], "hopeless": []}
    asked = []

    def measure(name: str) -> float:
        asked.append(name)
        return {"good": 1.0, "slow": 2.9, "hopeless": 3.1}[name]

    run = tuner.Tuner(math.inf, None)
    run._time_point(times, measure)
    run._time_point(times, measure)
    assert asked == ["good", "slow", "hopeless", "good", "slow"]
    assert times["hopeless"] == [3.1, math.inf]


def test_time_limit_ends_the_run_with_what_was_written(tuner, tmp_path, capsys):
    assert tuner.main(["--smallest", "--out", str(tmp_path), "--time-limit-s", "0"]) == 0
    assert json.loads((tmp_path / "interpreter.json").read_text())["gpu"] == "interpreter"
    assert "0 of 2 layers" in capsys.readouterr().out


def test_compilation_that_failed_or_never_answers_takes_its_candidate_out(tuner, monkeypatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(tuner, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    task = tuner.Task(tuner.MODELS["smallest"][0], 8, (1,), (1,))
    first, second, lost = list(task.compilations(4))[:3]
    answers = iter([(second, ""), (first, "OutOfResources: too much")])

    def next_answer(timeout: float):
        for answer in answers:
            return answer
        raise tuner.multiprocessing.TimeoutError

    run = tuner.Tuner(math.inf, SimpleNamespace(next=next_answer))
    for wanted in (first, second, lost):
        run._wait_for(wanted)
    assert run._problems == {second: "", first: "OutOfResources: too much", lost: "no answer"}
    assert run._shrink_us(task, None, task.shrinks(4)[0]) == math.inf


def test_rows_of_other_kernels_and_cards_are_carried_over(tuner, tmp_path, monkeypatch):
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    old = {"gpu": "Some Card", "skinny_linear": [{"a": 1}], "lora_shrink": [{"in_features": 9, "tiles": 1}]}
    (packaged / "card.json").write_text(json.dumps(old))
    (packaged / "other.json").write_text(json.dumps({"gpu": "Other Card"}))
    monkeypatch.setattr(tuner, "TUNING_FOLDER", packaged)

    table = tuner.TableFile(tmp_path / "out", "Some Card")
    for tiles, parts in ((2, 4), (3, 8)):
        row = {"in_features": 9, "num_parts": parts, "tiles": tiles, "time_us": {"8": tiles}}
        table.put({"lora_shrink": row, "lora_expand": row})

    assert table.path == tmp_path / "out" / "card.json"
    written = json.loads(table.path.read_text())
    assert written["skinny_linear"] == [{"a": 1}]
    assert [row["tiles"] for row in written["lora_shrink"]] == [3]
    assert [row["num_parts"] for row in written["lora_expand"]] == [4, 8]
    again = tuner.TableFile(tmp_path / "out", "Some Card")  # a later run adds to what this one wrote
    again.put({"lora_shrink": {"in_features": 10, "num_parts": 1, "tiles": 4, "time_us": {}}})
    assert [row["tiles"] for row in json.loads(table.path.read_text())["lora_shrink"]] == [3, 4]

    new = tuner.TableFile(tmp_path / "out", "New Card (2)")
    assert new.path.name == "new_card_2.json"
    new.path.write_text(json.dumps({"gpu": "New Card, 2"}))
    with pytest.raises(ValueError, match=r"is a table of 'New Card, 2', expected one of 'New Card \(2\)'"):
        tuner.TableFile(tmp_path / "out", "New Card (2)")


def test_layers_are_given_by_model_or_widths(tuner):
    assert tuner.shapes_of(["qwen3-8b", "5120:8192,1024", "4096:4096"])[-2:] == [
        (12288, (4096,)),
        (5120, (8192, 1024)),
    ]
    with pytest.raises(ValueError, match="'5120x3' is none of"):
        tuner.shapes_of(["5120x3"])
