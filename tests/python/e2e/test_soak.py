"""The soak test of scripts/ at its smallest size, and that it finds what it is there for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lora_serve.engine.engine_core import EngineCore

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import soak_cuda
from soak.answers import AnswerSample
from soak.memory import BOUNDS, MemoryRecord, find_growth

MIB = 2**20
QUICK = ["--smallest", "--seconds", "1"]


def run_soak(capsys, *arguments) -> tuple[int, dict]:
    status = soak_cuda.main([*QUICK, *arguments])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(autouse=True)
def interpreter_as_it_was(monkeypatch):
    monkeypatch.setattr(soak_cuda, "settle_interpreter", lambda: None)  # For a process of its own only.


def test_a_short_soak_finds_nothing_and_has_tried_everything(capsys, tmp_path):
    record = tmp_path / "record.jsonl"

    status, summary = run_soak(capsys, "--record", str(record))

    assert summary["problems"] == []
    assert status == 0
    assert summary["checked"]["num_adapters"] > 0
    assert summary["checked"]["num_tokens"] > 20
    assert all(summary["changes"].values())
    assert {"host_rss", "live_requests", "num_free_pages"} <= set(
        json.loads(record.read_text().split("\n")[0])
    )


def test_a_wrong_answer_is_found(capsys, monkeypatch):
    check = AnswerSample.check

    def spoil_and_check(self, *arguments):
        self.kept[0].answer[-1] ^= 1
        return check(self, *arguments)

    monkeypatch.setattr(AnswerSample, "check", spoil_and_check)

    status, summary = run_soak(capsys)

    assert status == 1
    assert len(summary["problems"]) == 1
    assert "is not the model's" in summary["problems"][0]


def test_a_request_that_nobody_aborted_is_found(capsys, monkeypatch):
    step = EngineCore.step

    def step_and_abort(self):
        if self.num_steps == 50:
            for request_id in self._requests.ids:
                self.abort(request_id)
        return step(self)

    monkeypatch.setattr(EngineCore, "step", step_and_abort)

    status, summary = run_soak(capsys)

    assert status == 1
    assert any("was aborted, by nobody" in problem for problem in summary["problems"])


def test_an_engine_that_stops_is_found(capsys, monkeypatch):
    step = EngineCore.step

    def step_or_stop(self):
        if self.num_steps == 50:
            self._stop("the test said so")
        return step(self)

    monkeypatch.setattr(EngineCore, "step", step_or_stop)

    status, summary = run_soak(capsys)

    assert status == 1
    assert any("the test said so" in problem for problem in summary["problems"])


class TestGrowth:
    def record_of(self, values) -> MemoryRecord:
        record = MemoryRecord("cpu")
        record.samples = [{"at_s": float(at), "host_rss": value} for at, value in enumerate(values)]
        return record

    def test_what_happens_in_the_warm_up_does_not_count(self):
        record = self.record_of([0, 2000 * MIB, 3000 * MIB, *[3000 * MIB] * 20])

        assert find_growth(record.growth(warm_up_s=2.5)) == []
        assert len(find_growth(record.growth(warm_up_s=0))) == 2

    def test_a_slow_rise_is_found_though_the_spread_is_small(self):
        noise = [40 * MIB * (index % 3) for index in range(100)]
        grows = [value + 2 * MIB * index for index, value in enumerate(noise)]

        assert find_growth(self.record_of(noise).growth(0)) == []
        (problem,) = find_growth(self.record_of(grows).growth(0))
        assert problem.startswith("host_rss: rise")

    def test_one_peak_is_found_though_nothing_rises(self):
        values = [500 * MIB, *[1000 * MIB] * 50, 500 * MIB]

        (problem,) = find_growth(self.record_of(values).growth(0))

        assert problem == f"host_rss: spread {500 * MIB}, at most {BOUNDS['host_rss'][1]:.0f}"

    def test_too_few_samples_are_a_problem_and_not_a_pass(self):
        assert find_growth(self.record_of([1, 1]).growth(0)) != []
