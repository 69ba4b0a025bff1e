"""/tokenize, /detokenize and /tokenizer_info over the fake tokenizer, in which every character is a token."""

from __future__ import annotations

import pytest

from lora_serve.server.api_keys import KeyEntry
from server.fake_engine_client import TEMPLATE
from server.http_calls import BASE, call, make_app, make_client

TOOL = {"type": "function", "function": {"name": "f"}}
MESSAGES = [{"role": "user", "content": "hi"}]


def tokenize(client=None, **body):
    return call(make_app(client), "POST", "/tokenize", json=body)


def test_tokens_of_a_prompt():
    assert tokenize(prompt="hi", model=f"{BASE}:sql", return_token_strs=True).json() == {
        "count": 2,
        "max_model_len": 128,
        "tokens": [104, 105],
        "token_strs": ["h", "i"],
    }
    assert tokenize(prompt="hi").json()["token_strs"] is None


def test_tokens_of_a_conversation_are_those_of_a_chat_completion():
    client = make_client()
    answer = tokenize(client, messages=MESSAGES, tools=[TOOL], chat_template_kwargs={"a": 1})
    assert answer.json()["tokens"] == [104, 105]
    assert client.chat_options == {"add_generation_prompt": True, "tools": [TOOL], "a": 1}


def test_text_of_tokens():
    answer = call(make_app(), "POST", "/detokenize", json={"model": "sql", "tokens": [104, 105]})
    assert answer.json() == {"prompt": "hi"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, 400, "tools"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens"),
        (
            "/tokenize",
            {"messages": MESSAGES, "chat_template_kwargs": {"tools": []}},
            400,
            "chat_template_kwargs",
        ),
        ("/tokenize", {"prompt": "a", "temperature": 1}, 400, "temperature"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/detokenize", {"tokens": [256]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1] * 129}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
    ],
)
def test_what_is_wrong_is_refused_by_name(path, body, status, param):
    answer = call(make_app(), "POST", path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_tools_that_the_template_does_not_show_are_refused():
    client = make_client()
    client.tokenizer.chat_template = "{{ messages }}"
    assert tokenize(client, messages=MESSAGES, tools=[TOOL]).status_code == 400


def test_tokenizer_info_is_there_where_it_is_asked_for_and_for_every_key():
    tenant = KeyEntry(name="acme", key="key-of-acme", adapters=["sql"])
    app = make_app(tokenizer_info=True, key_entries=(tenant,))
    headers = {"Authorization": "Bearer key-of-acme"}

    answer = call(app, "GET", "/tokenizer_info", headers=headers)

    assert answer.status_code == 200
    assert answer.json() == {"eos_token": "\0", "chat_template": TEMPLATE}
    assert call(app, "GET", "/tokenizer_info").status_code == 401
    assert "/tokenizer_info" in call(app, "GET", "/openapi.json", headers=headers).json()["paths"]
    without = call(make_app(), "GET", "/tokenizer_info")
    assert without.status_code == 404
    assert without.json()["error"]["message"].startswith("there is no endpoint /tokenizer_info")
