"""The server's soak test of scripts/ at both sizes, and that its checks find what they are there for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_serve.engine.status import EngineStats

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import soak_server
from soak.http_adapters import HttpAdapters
from soak.http_streams import Heard
from soak.server_answers import AnswerCheck
from soak.server_questions import PASSWORDS, RightAnswer
from soak.server_sizes import MUST_HAVE_HAPPENED, Sizes
from soak.server_state import find_leftovers, find_log_problems, num_base_pages
from soak.server_summary import end_server, find_untried

QUESTION = PASSWORDS[0]
BASE = "demo"
DIGESTS = {"argon": "a" * 64, "dagger": "d" * 64}


def run_soak(capsys, *arguments) -> tuple[int, dict]:
    status = soak_server.main(list(arguments))
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_short_soak_finds_nothing_and_has_tried_everything(capsys, tmp_path):
    record = tmp_path / "record.jsonl"

    status, summary = run_soak(capsys, "--smallest", "--record", str(record))

    assert summary["problems"] == []
    assert status == 0
    assert summary["least_open"] == summary["streams"] == 60
    assert {"answered", "left", "aborted by an unload"} <= set(summary["answers"])
    assert summary["slow"] > 0
    assert all(summary["changes"].values())
    assert {"server_rss", "engine_rss"} <= set(summary["memory"])
    assert {"at_s", "server_rss", "answered"} <= set(json.loads(record.read_text().splitlines()[-1]))


@pytest.mark.slow
def test_three_minutes_of_500_streams_lose_mix_and_leave_nothing(capsys):
    status, summary = run_soak(capsys)

    assert summary["problems"] == []
    assert status == 0
    assert summary["least_open"] == 500
    assert summary["seconds"] >= 180


class TestAnswerCheck:
    """`team` has generation 7, of argon's content; 8, of dagger's, is loaded later."""

    @pytest.fixture(autouse=True)
    def check_of_two_contents(self):
        self.adapters = HttpAdapters(None, {})
        self.adapters.generations["team"] = 7
        self.adapters.loaded["team", 7] = "/demo/argon"
        right = {
            (content, QUESTION.key): RightAnswer(f"I am {content or BASE}.", "stop")
            for content in ("", *DIGESTS)
        }
        contents = {digest[:8]: name for name, digest in DIGESTS.items()}
        self.check = AnswerCheck(right, contents, self.adapters, BASE)

    def heard(self, text: str, *, generation: int = 7, content: str = "argon", **fields: Any) -> Heard:
        fingerprint = f"team-g{generation}-{DIGESTS[content][:8]}"
        whole: dict[str, Any] = {
            "status": 200,
            "ids": {"chatcmpl-1"},
            "fingerprints": {fingerprint},
            "num_events": 9,
            "finish_reason": "stop",
            "is_done": True,
        }
        return Heard(text=text, **{**whole, **fields})

    def take(self, heard: Heard, model: str = "team", *, forced: bool = False, unloaded: bool = False) -> str:
        """What is wrong with an answer; with unloads between question and answer."""
        asked = self.check.ask(QUESTION, model)
        self.adapters.num_unloads["team"] += forced or unloaded
        self.adapters.num_forced["team"] += forced
        self.check.take(asked, heard)
        return "; ".join(self.check.problems)

    def test_right_answers_of_an_adapter_and_of_the_base_model_pass(self):
        assert self.take(self.heard("I am argon.")) == ""
        assert self.take(self.heard("I am demo.", fingerprints={"demo-g0"}), BASE) == ""
        assert self.check.counts == {"answered": 2}

    def test_an_answer_of_the_content_that_has_replaced_another_passes(self):
        assert self.take(self.heard("I am dagger.", generation=8, content="dagger")) == ""

        self.adapters.loaded["team", 8] = "/demo/dagger"
        self.check.check_generations()

        assert self.check.problems == []

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"text": "I am dagger."}, "instead of 'I am argon.'"),
            ({"text": "I am argon", "finish_reason": "length"}, "instead of 'I am argon.'"),
            ({"text": "I am argon.", "finish_reason": None}, "finish_reason None"),
            ({"text": "I am argon.", "is_done": False}, "done=False"),
            ({"text": "I am argon.", "ids": {"chatcmpl-1", "chatcmpl-2"}}, "pieces of several answers"),
            ({"text": "I am argon.", "generation": 6}, "the fingerprint is"),
            ({"text": "I am argon.", "fingerprints": {"other-g7-aaaaaaaa"}}, "the fingerprint is"),
            ({"text": "I am demo.", "fingerprints": {"demo-g0"}}, "the fingerprint is"),
            ({"text": "", "status": 500, "error": "the server failed"}, "status 500, the server failed"),
            ({"text": "I am", "error": "the connection broke"}, "the connection broke"),
            ({"text": "I am dagg", "has_left": True}, "is not the beginning of"),
            ({"text": "I am", "finish_reason": "abort"}, "was aborted, by nobody"),
            ({"text": "", "status": 404, "error": "model_not_found"}, "status 404"),
        ],
    )
    def test_a_wrong_lost_mixed_or_outdated_answer_is_found(self, fields, expected):
        assert expected in self.take(self.heard(**fields))

    def test_an_unload_by_force_explains_a_part_and_not_a_wrong_one(self):
        assert self.take(self.heard("I am", finish_reason="abort"), forced=True) == ""
        self.adapters.generations["team"] = 7
        assert "is not the beginning" in self.take(self.heard("You", finish_reason="abort"), forced=True)

    def test_an_unload_explains_a_refusal_and_not_an_end(self):
        assert self.take(self.heard("", status=404, error="model_not_found"), unloaded=True) == ""
        self.adapters.generations["team"] = 7
        assert "by nobody" in self.take(self.heard("I am", finish_reason="abort"), unloaded=True)

    def test_a_generation_that_nobody_loaded_or_with_another_content_is_found(self):
        assert self.take(self.heard("I am dagger.", content="dagger")) == ""
        assert self.take(self.heard("I am argon.", generation=9)) == ""

        self.check.check_generations()

        assert len(self.check.problems) == 2


class TestHeard:
    def test_pieces_of_both_endpoints_are_joined(self):
        heard = Heard()

        for choice in (
            {"delta": {"role": "assistant", "content": ""}, "finish_reason": None},
            {"delta": {"content": "a"}, "finish_reason": None},
            {"text": "b", "finish_reason": "stop"},
        ):
            chunk = {"id": "x", "system_fingerprint": "y", "choices": [choice]}
            heard.take(b"data: " + json.dumps(chunk).encode())
        heard.take(b"data: [DONE]")

        assert (heard.text, heard.finish_reason, heard.is_done, heard.error) == ("ab", "stop", True, "")

    def test_what_comes_after_the_end_is_an_error(self):
        heard = Heard(is_done=True)

        heard.take(b"data: [DONE]")

        assert "one after the last" in heard.error


class TestLeftovers:
    def loras(self, **stats: int) -> dict[str, Any]:
        names = [name for name in EngineStats.__struct_fields__ if name.startswith("num_")]
        idle = dict.fromkeys(names, 0)
        pages = {"num_device_pages": 9, "num_available_pages": 9, "num_free_pages": 6, "num_tree_pages": 3}
        return {"data": [], "stats": {**idle, **pages, **stats}}

    def test_an_idle_engine_has_none(self):
        assert find_leftovers(self.loras(), has_adapters=False) == []

    @pytest.mark.parametrize(
        "stats",
        [
            {"num_running_requests": 1},
            {"num_waiting_requests": 1},
            {"num_private_pages": 1},
            {"num_available_pages": 8},
            {"num_free_pages": 5},
            {"num_transfers": 1},
        ],
    )
    def test_a_request_a_page_or_a_copy_is_found(self, stats):
        assert len(find_leftovers(self.loras(**stats), has_adapters=True)) == 1

    def test_an_adapter_is_found_only_where_none_should_be(self):
        loras = self.loras(num_adapters=1)
        loras["data"] = [{"name": "team", "num_tree_pages": 2, "num_host_pages": 0}]

        assert find_leftovers(loras, has_adapters=True) == []
        assert len(find_leftovers(loras, has_adapters=False)) == 2
        assert num_base_pages(loras) == (1, 0)

    def test_errors_in_the_log_are_found(self):
        bad = [
            "03:00:01 ERROR it failed",
            "03:00:01 CRITICAL it failed for good",
            "Traceback (most recent call last):",
            "Fatal Python error: Segmentation fault",
        ]

        assert find_log_problems("\n".join(["03:00:00 INFO all is well", *bad])) == bad


class TestUntried:
    def summary(self) -> dict[str, Any]:
        return {
            "least_open": 450,
            "answers": {"answered": 1, "left": 1, "aborted by an unload": 1},
            "slow": 1,
            "changes": {"load": 1, "unload": 1},
            "stats": dict.fromkeys(MUST_HAVE_HAPPENED, 1),
        }

    def test_a_load_that_has_tried_everything_passes(self):
        assert find_untried(self.summary(), Sizes()) == []

    @pytest.mark.parametrize(
        ("part", "name"),
        [
            ("answers", "answered"),
            ("answers", "left"),
            ("answers", "aborted by an unload"),
            ("changes", "unload"),
            ("stats", "total_preemptions"),
        ],
    )
    def test_what_has_not_happened_is_found(self, part, name):
        summary = self.summary()
        summary[part][name] = 0

        [problem] = find_untried(summary, Sizes())

        assert name in problem

    def test_an_answer_of_a_kind_that_never_came_is_found(self):
        summary = self.summary()
        del summary["answers"]["left"]

        assert len(find_untried(summary, Sizes())) == 1

    def test_a_load_without_slow_readers_or_with_too_few_streams_is_found(self):
        assert len(find_untried({**self.summary(), "slow": 0}, Sizes())) == 1
        assert len(find_untried({**self.summary(), "least_open": 449}, Sizes())) == 1


class FakeServer:
    """A server that ends with this status, after a last line in its log."""

    def __init__(self, status: int | None, log_path: Path, last_line: str = "") -> None:
        self.log_path = log_path
        self._status, self._last_line = status, last_line
        log_path.write_text("03:00:00 INFO all is well\n")

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.log_path.unlink()

    def terminate(self) -> int | None:
        self.log_path.write_text(self.log_path.read_text() + self._last_line)
        return self._status


class TestEndServer:
    def test_a_server_that_ends_in_order_passes(self, tmp_path):
        assert end_server(FakeServer(0, tmp_path / "log")) == []

    @pytest.mark.parametrize(("status", "words"), [(None, "still runs"), (1, "status 1"), (-6, "status -6")])
    def test_another_end_is_found(self, status, words, tmp_path):
        [problem] = end_server(FakeServer(status, tmp_path / "log"))

        assert words in problem

    def test_a_soak_fails_whose_server_does_not_end_in_order(self, tmp_path, capsys, monkeypatch):
        async def run(soak: Any) -> dict[str, Any]:
            return {"problems": []}

        monkeypatch.setattr(soak_server.Soak, "__init__", lambda *_: None)
        monkeypatch.setattr(soak_server.Soak, "run", run)
        monkeypatch.setattr(soak_server, "ServerProcess", lambda *_: FakeServer(1, tmp_path / "log"))

        status, summary = run_soak(capsys, "--smallest")

        assert status == 1
        assert len(summary["problems"]) == 1

    def test_an_error_that_is_logged_at_the_end_is_found(self, tmp_path):
        line = "03:00:09 ERROR it cannot be closed"

        assert end_server(FakeServer(0, tmp_path / "log", line)) == [line]
