from __future__ import annotations

import random

import pytest

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server.parsing.reasoning import (
    ReasoningSplitter,
    ReasoningStart,
    check_reasoning_tokens,
    find_start,
)
from server.fake_engine_client import FakeTokenizer

MAY_OPEN, OPEN, CLOSED = ReasoningStart.MAY_OPEN, ReasoningStart.OPEN, ReasoningStart.CLOSED
CASES = [
    (MAY_OPEN, "<think>\nwhy\n</think>\n\nbecause\n", "why", "because\n"),
    (MAY_OPEN, "\n<think>a < b </thin</think>c", "a < b </thin", "c"),
    (MAY_OPEN, "  because", "", "  because"),
    (MAY_OPEN, "<thin", "", "<thin"),
    (MAY_OPEN, "<think>cut off ", "cut off", ""),
    (MAY_OPEN, "", "", ""),
    (OPEN, "\nwhy\n\nso\n</think>\n\nbecause </think>", "why\n\nso", "because </think>"),
    (OPEN, "cut off </th", "cut off </th", ""),
    (CLOSED, "<think>is a word</think>", "", "<think>is a word</think>"),
]


@pytest.mark.parametrize(("start", "text", "reasoning", "content"), CASES)
def test_reasoning_is_split_off_in_pieces_of_any_length(start, text, reasoning, content):
    for seed in range(20):
        rng = random.Random(seed)
        splitter, found, position = ReasoningSplitter(start), ["", ""], 0
        while position < len(text):
            length = len(text) if seed == 0 else rng.randint(1, 4)
            split = splitter.feed(text[position : position + length])
            position += length
            found[0] += split.reasoning
            found[1] += split.content
        split = splitter.flush()
        assert found[0] + split.reasoning == reasoning, seed
        assert found[1] + split.content == content, seed


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("hello", MAY_OPEN),
        ("hello\x01", OPEN),
        ("hello\x01\n", OPEN),
        ("hello\x01\n\n\x02\n\n", CLOSED),
        ("\x01past\x02 answer, then a question", MAY_OPEN),
        ("\x01past\x02 answer, then\x01", OPEN),
    ],
)
def test_the_prompt_tells_how_the_answer_begins(prompt, start):
    """In the fake tokenizer character 1 opens and character 2 closes."""
    assert find_start([ord(char) for char in prompt], FakeTokenizer()) is start


def test_a_model_without_the_words_as_tokens_is_refused(monkeypatch):
    check_reasoning_tokens("qwen3", FakeTokenizer())
    monkeypatch.setattr(FakeTokenizer, "token_id", lambda self, text: None)
    with pytest.raises(InvalidArgumentError, match="no token <think>"):
        check_reasoning_tokens("qwen3", FakeTokenizer())
