"""The verdict on two rounds of answers, and the lines that the demo prints."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from lora_serve.demo.paths import demo_paths
from lora_serve.demo.prompts import BASE_MODEL, PROJECTS, expected_answer
from lora_serve.demo.report import curl_lines, find_mistakes, format_table
from lora_serve.demo.rounds import Answer


def _round(num_cached_tokens: int, num_prompt_tokens: int = 100) -> list[Answer]:
    return [
        Answer(model, project, expected_answer(model, project), num_prompt_tokens, num_cached_tokens, 12.4)
        for model in (BASE_MODEL, *PROJECTS)
        for project in PROJECTS
    ]


def test_find_mistakes_is_empty_when_all_is_right() -> None:
    assert find_mistakes(_round(0), _round(96), page_size=16) == []


@pytest.mark.parametrize("round_number", [0, 1])
@pytest.mark.parametrize(
    ("index", "text"), [(0, "The password of project argon is blue-falcon-42."), (7, "")]
)
def test_find_mistakes_names_a_wrong_answer_of_either_round(round_number: int, index: int, text: str) -> None:
    rounds = [_round(0), _round(96)]
    rounds[round_number][index] = replace(rounds[round_number][index], text=text)

    mistakes = find_mistakes(*rounds, page_size=16)

    answer = rounds[round_number][index]
    assert mistakes == [f"{answer.model}, asked for {answer.project}, answered {text!r}"]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_cached_tokens", "is_enough"),
    [(100, 96, True), (100, 95, False), (96, 80, True), (97, 80, False), (97, 96, True), (16, 0, True)],
)
def test_find_mistakes_expects_the_whole_pages_before_the_last_token(
    num_prompt_tokens: int, num_cached_tokens: int, is_enough: bool
) -> None:
    first, second = _round(0, num_prompt_tokens), _round(num_cached_tokens, num_prompt_tokens)

    mistakes = find_mistakes(first, second, page_size=16)

    assert (mistakes == []) is is_enough


def test_format_table_marks_the_line_of_a_mistake() -> None:
    second = _round(96)
    second[5] = replace(second[5], num_cached_tokens=0)

    lines = format_table(_round(0), second, page_size=16).splitlines()

    assert len(lines) == 2 + 20
    assert [line.split()[-1] for line in lines[2:]] == ["NO" if row == 5 else "yes" for row in range(20)]


def test_curl_lines_are_shell_words_with_json_bodies() -> None:
    lines = curl_lines("http://127.0.0.1:8000", demo_paths())

    commands = [shlex.split(line) for line in lines if not line.startswith("#")]

    bodies = [json.loads(words[words.index("-d") + 1]) for words in commands if "-d" in words]
    assert all(words[0] == "curl" for words in commands)
    assert any(body.get("stream") for body in bodies)
    assert {"lora_name": "argon", "lora_path": str(demo_paths().adapters["argon"])} in bodies
