"""LangChain's ChatOpenAI, unchanged, gets the answers of the adapter that its `model` names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_serve.demo.prompts import BASE_MODEL, chat_messages, expected_answer

SCRIPT = Path(__file__).with_name("langchain_calls.py")


@pytest.mark.parametrize("name", [BASE_MODEL, "argon"])
def test_whole_and_streamed_answers_are_the_models_own(demo_server, run_client, name: str) -> None:
    printed = run_client(SCRIPT, demo_server.url, name, json.dumps(chat_messages("argon")))

    answer = json.loads(printed)
    expected = expected_answer(name, "argon")
    assert answer["whole"] == answer["async"] == "".join(answer["pieces"]) == expected
    assert answer["batch"] == [expected] * 3
    assert len(answer["pieces"]) > 3
    assert (answer["finish_reason"], answer["model"]) == ("stop", name)
    for field in ("input_tokens", "output_tokens", "total_tokens"):
        assert answer["usage"][field] == answer["streamed_usage"][field] > 0
