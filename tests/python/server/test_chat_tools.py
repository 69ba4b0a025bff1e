"""Tools, tool choices and reasoning of chat completions, with an engine that answers given texts."""

from __future__ import annotations

import json

import pytest

from lora_serve.common.structured_outputs import ReasoningTokens
from server.http_calls import chat, events, make_app, make_client

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a town",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"town": "Bonn"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


def ask(text, *, template=None, settings=None, **body):
    client = make_client()
    client.answer_text = text
    if template is not None:
        client.tokenizer.chat_template = template
    return client, chat(make_app(client, **(settings or {})), **body)


def message_of(response):
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice["message"], choice["finish_reason"]


def calls_of(message):
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["type"] == "function" for call in calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def joined(chunks, index=0):
    """The message that a stream's deltas of one choice make, and its finish reason."""
    message, reason = {"content": "", "reasoning_content": "", "tool_calls": []}, None
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        delta = choice["delta"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for piece in delta.get("tool_calls", []):
            if piece["index"] == len(message["tool_calls"]):
                assert piece["id"]
                assert piece["function"]["name"]
                message["tool_calls"].append({**piece, "function": dict(piece["function"])})
            else:
                assert "id" not in piece
                call = message["tool_calls"][piece["index"]]
                call["function"]["arguments"] += piece["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return message, reason


def test_calls_of_the_answer_are_given_apart_from_its_text():
    client, response = ask(CALLS, tools=TOOLS)
    message, reason = message_of(response)
    assert message["content"] == "Let me see."
    assert calls_of(message) == [("weather", {"town": "Bonn"}), ("now", {})]
    assert reason == "tool_calls"
    assert client.submissions[0].params.structured_outputs.structural_tag is not None


def test_without_strict_functions_the_answer_is_free():
    client, _ = ask(CALLS, tools=TOOLS[1:])
    assert client.submissions[0].params.structured_outputs is None


def test_a_strict_schema_that_would_not_be_kept_to_is_refused():
    function = {"name": "f", "parameters": {"not": {}}, "strict": True}
    _, response = ask("a", tools=[{"type": "function", "function": function}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    _, response = ask("a", tools=[{"type": "function", "function": {**function, "strict": False}}])
    assert response.status_code == 200


def test_template_is_shown_the_tools():
    client, _ = ask("a", tools=TOOLS)
    [weather, now] = client.chat_options["tools"]
    assert weather["function"] == {k: v for k, v in TOOLS[0]["function"].items() if k != "strict"}
    assert now == TOOLS[1]


def test_tools_are_left_out_with_tool_choice_none():
    client, response = ask(CALLS, tools=TOOLS, tool_choice="none")
    message, reason = message_of(response)
    assert (message["content"], reason) == (CALLS, "stop")
    assert "tools" not in client.chat_options


def test_answer_without_calls_is_content_and_ends_as_ever():
    _, response = ask("no call", tools=TOOLS)
    message, reason = message_of(response)
    assert message == {"role": "assistant", "content": "no call", "refusal": None}
    assert reason == "stop"


def test_content_is_null_where_there_are_only_calls():
    _, response = ask(CALLS.removeprefix("Let me see."), tools=TOOLS)
    assert message_of(response)[0]["content"] is None


@pytest.mark.parametrize("n", [1, 2])
def test_stream_of_calls_joins_to_the_whole(n):
    _, response = ask(CALLS, tools=TOOLS, stream=True, n=n)
    chunks = events(response)
    for index in range(n):
        message, reason = joined(chunks, index)
        assert message["content"] == "Let me see."
        assert calls_of(message) == [("weather", {"town": "Bonn"}), ("now", {})]
        assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_there_is_one(stream):
    _, response = ask(CALLS, tools=TOOLS, parallel_tool_calls=False, stream=stream)
    message = joined(events(response))[0] if stream else message_of(response)[0]
    assert calls_of(message) == [("weather", {"town": "Bonn"})]


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_gets_the_whole_answer_as_arguments(stream):
    text = '{"town": "Bonn"}'
    choice = {"type": "function", "function": {"name": "weather"}}
    client, response = ask(text, tools=TOOLS, tool_choice=choice, stream=stream)
    message, reason = joined(events(response)) if stream else message_of(response)
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == [text]
    assert reason == "tool_calls"
    assert client.submissions[0].params.structured_outputs.json == TOOLS[0]["function"]["parameters"]


def test_arguments_of_a_named_function_stream_as_they_come():
    choice = {"type": "function", "function": {"name": "weather"}}
    _, response = ask('{"town": "Bonn"}', tools=TOOLS, tool_choice=choice, stream=True)
    pieces = [c for chunk in events(response) for c in chunk["choices"] if c["delta"].get("tool_calls")]
    assert len(pieces) > 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_a_list_of_calls_by_schema(stream):
    text = '[{"name": "now", "parameters": {}}, {"name": "weather", "parameters": {"town": "Bonn"}}]'
    client, response = ask(text, tools=TOOLS, tool_choice="required", stream=stream)
    message, reason = joined(events(response)) if stream else message_of(response)
    assert calls_of(message) == [("now", {}), ("weather", {"town": "Bonn"})]
    assert reason == "tool_calls"
    schema = client.submissions[0].params.structured_outputs.json
    assert schema["minItems"] == 1
    assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["weather", "now"]


def test_a_forced_call_that_is_cut_off_ends_by_length():
    choice = {"type": "function", "function": {"name": "weather"}}
    _, response = ask('{"town": "Bonn"}', tools=TOOLS, tool_choice=choice, max_tokens=5)
    message, reason = message_of(response)
    assert message["tool_calls"][0]["function"]["arguments"] == '{"tow'
    assert reason == "length"


@pytest.mark.parametrize(
    ("template", "text", "choice"),
    [
        ("{{ messages }}", "does not show tools", "required"),
        ("{{ tools }} {{ messages }}", "--tool-call-parser", "auto"),
    ],
)
def test_tools_that_would_be_ignored_are_refused(template, text, choice):
    _, response = ask("a", template=template, tools=TOOLS, tool_choice=choice)
    assert response.status_code == 400
    assert text in response.json()["error"]["message"]


def test_named_parser_is_used_whatever_the_template_shows():
    text = '{"name": "now", "parameters": {}}'
    _, response = ask(text, settings={"tool_call_parser": "llama3_json"}, tools=TOOLS)
    assert calls_of(message_of(response)[0]) == [("now", {})]


def test_calls_and_their_results_reach_the_template():
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "CET"}'}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    client, response = ask("a", messages=messages, tools=TOOLS)
    assert response.status_code == 200
    assert client.chat_messages == [
        messages[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "now", "arguments": {"zone": "CET"}}}],
            "reasoning_content": "hm",
        },
        messages[2],
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_given_apart_before_content_and_calls(stream):
    settings = {"reasoning_parser": "qwen3"}
    _, response = ask(f"<think>\nhm\n</think>\n\n{CALLS}", settings=settings, tools=TOOLS, stream=stream)
    message, reason = joined(events(response)) if stream else message_of(response)
    assert (message["reasoning_content"], message["content"]) == ("hm", "Let me see.")
    assert len(message["tool_calls"]) == 2
    assert reason == "tool_calls"


def test_reasoning_is_content_without_the_option():
    _, response = ask("<think>\nhm\n</think>\n\nyes")
    assert message_of(response)[0]["content"] == "<think>\nhm\n</think>\n\nyes"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_can_be_left_out(stream):
    settings = {"reasoning_parser": "qwen3"}
    _, response = ask("<think>hm</think>yes", settings=settings, include_reasoning=False, stream=stream)
    message = joined(events(response))[0] if stream else message_of(response)[0]
    assert message["content"] == "yes"
    assert not message.get("reasoning_content")


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("hello", ReasoningTokens(start_token_id=1, end_token_id=2)),
        ("hello\x01", ReasoningTokens(start_token_id=1, end_token_id=2, is_open=True)),
        ("hello\x01\n\n\x02\n\n", None),
    ],
)
def test_the_form_holds_for_what_follows_the_reasoning(prompt, tokens):
    client, _ = ask(
        "{}",
        settings={"reasoning_parser": "qwen3"},
        messages=[{"role": "user", "content": prompt}],
        response_format={"type": "json_object"},
    )
    assert client.submissions[0].params.structured_outputs.reasoning == tokens


def test_the_last_message_can_be_continued():
    client, _ = ask("a", continue_final_message=True)
    assert client.chat_options == {"add_generation_prompt": False, "continue_final_message": True}
