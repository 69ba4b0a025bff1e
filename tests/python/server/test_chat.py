from __future__ import annotations

import pytest

from server.http_calls import BASE, chat, events, make_app, make_client


def test_chat_gives_a_message_usage_and_generation():
    body = chat(make_app(), model=f"{BASE}:law").json()
    assert body["object"] == "chat.completion"
    assert body["system_fingerprint"] == "law-g2-00000002"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "law!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert body["usage"]["total_tokens"] == 9


def test_without_a_limit_the_context_is_the_limit():
    client = make_client()
    chat(make_app(client))
    assert client.submissions[0].params.max_tokens is None


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}]
)
def test_both_names_of_the_limit_work(limits):
    client = make_client()
    chat(make_app(client), **limits)
    assert client.submissions[0].params.max_tokens == 3


def test_messages_reach_the_template_as_text():
    client = make_client()
    messages = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "name": "bot", "tool_calls": [], "refusal": None},
        {"role": "user", "content": "d"},
    ]
    chat(make_app(client), messages=messages, chat_template_kwargs={"enable_thinking": False})
    assert client.chat_messages == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "name": "bot"},
        {"role": "user", "content": "d"},
    ]
    assert client.chat_options == {"add_generation_prompt": True, "enable_thinking": False}


def test_generation_prompt_can_be_left_out():
    client = make_client()
    chat(make_app(client), add_generation_prompt=False)
    assert client.chat_options == {"add_generation_prompt": False}


def test_logprobs_have_exactly_the_asked_number_of_top_tokens():
    body = chat(make_app(), logprobs=True, top_logprobs=2, max_tokens=1).json()
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "b",
                "logprob": -3.0,
                "bytes": [98],
                "top_logprobs": [
                    {"token": "#", "logprob": -1.0, "bytes": [35]},
                    {"token": "$", "logprob": -2.0, "bytes": [36]},
                ],
            }
        ],
        "refusal": None,
    }


def test_logprobs_without_top_give_the_sampled_token_alone():
    client = make_client()
    body = chat(make_app(client), logprobs=True, max_tokens=1).json()
    assert client.submissions[0].params.logprobs == 0
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_n_gives_as_many_choices():
    body = chat(make_app(), n=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 15
    assert body["usage"]["prompt_tokens"] == 5


def test_token_ids_are_returned_on_request():
    body = chat(make_app(), return_token_ids=True, max_tokens=2).json()
    assert body["prompt_token_ids"] == [ord(char) for char in "hello"]
    assert body["choices"][0]["token_ids"] == [98, 97]


def test_stream_gives_the_role_once_and_then_the_text():
    chunks = events(chat(make_app(), model="sql", stream=True))
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "s"},
        {"content": "q"},
        {"content": "l"},
        {"content": "!"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"sql-g1-00000001"}


def test_stream_with_usage_and_logprobs():
    options = {"include_usage": True}
    chunks = events(chat(make_app(), stream=True, stream_options=options, logprobs=True, max_tokens=2))
    assert [c["choices"][0]["logprobs"]["content"][0]["token"] for c in chunks[1:-1]] == ["b", "a"]
    assert chunks[0]["usage"] is None
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2


def test_stream_of_several_answers_keeps_them_apart():
    chunks = events(chat(make_app(), stream=True, n=2, return_token_ids=True))
    assert chunks[0]["prompt_token_ids"] == [ord(char) for char in "hello"]
    texts = ["", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["base!", "base!"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": [], "tool_choice": "none"},
        {"tools": None, "parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"functions": None, "audio": None, "prediction": None, "reasoning_effort": None},
    ],
)
def test_fields_that_change_nothing_are_accepted(harmless):
    assert chat(make_app(), **harmless).status_code == 200


def test_lora_path_chooses_the_adapter():
    client = make_client()
    chat(make_app(client), lora_path="sql")
    assert client.submissions[0].lora_name == "sql"


def test_unknown_lora_path_is_404():
    response = chat(make_app(), lora_path="nobody")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "lora_path"
