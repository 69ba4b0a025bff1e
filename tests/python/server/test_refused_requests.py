"""Requests that the server refuses before the engine sees them."""

from __future__ import annotations

import json

import pytest

from lora_serve.common.errors import InvalidArgumentError
from server.http_calls import BASE, call, chat, complete, make_app, make_client

IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BROKEN_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
JSON_OBJECT = {"response_format": {"type": "json_object"}}


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name):
    return {"type": "function", "function": {"name": name}}


REFUSED_FORMS = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format", "use json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "missing",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "response_format.json_schema.schema",
        "kept to exactly: # has not",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "has regex and choice"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "must be true"),
    ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "a JSON schema or its text"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not valid JSON"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least one string"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"regexp": "x"}}, "structured_outputs.regexp", "not a field"),
    ({"structured_outputs": {"regex": "x"}, **JSON_OBJECT}, "structured_outputs", "both ask for a form"),
    ({"min_tokens": 1, **JSON_OBJECT}, "min_tokens", "0 with structured_outputs"),
    ({"ignore_eos": True, **JSON_OBJECT}, "ignore_eos", "False with structured_outputs"),
]

REFUSED_COMPLETIONS = [
    *REFUSED_FORMS,
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": []}, "prompt", "is empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt 1 is empty"),
    ({"prompt": [[1], []]}, "prompt", "prompt 1 is empty"),
    ({"prompt": 3}, "prompt", "must be a string, a list"),
    ({"prompt": ["a", 3]}, "prompt.1", "must be a string"),
    ({"prompt": [1, "a"]}, "prompt.1", "must be an integer"),
    ({"prompt": [1, True]}, "prompt.1", "is true but must be an integer"),
    ({"prompt": [[1], [2, 0.5]]}, "prompt.1.1", "must be an integer"),
    ({"prompt": "x" * 200}, "prompt", "max_model_len is 128"),
    ({"temperature": -1}, "temperature", "temperature is -1"),
    ({"temperature": "0.5"}, "temperature", "must be a number"),
    ({"top_p": 0}, "top_p", "must be in (0.0, 1.0]"),
    ({"top_k": -2}, "top_k", "in [-1, "),
    ({"n": 0}, "n", "n is 0"),
    ({"n": True}, "n", "must be an integer"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    ({"max_tokens": 1.5}, "max_tokens", "must be an integer"),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "at most max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens, which is 4"),
    ({"seed": 2**64}, "seed", "seed is"),
    ({"logprobs": 21}, "logprobs", "in [0, 20]"),
    ({"logprobs": True}, "logprobs", "must be an integer"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "must be token ids"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "must be token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "[-100.0, 100.0]"),
    ({"logit_bias": [1]}, "logit_bias", "must be an object"),
    ({"stop": ""}, "stop", "non-empty"),
    ({"stop": 3}, "stop", "a string or a list of strings"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids"),
    ({"repetition_penalty": 0}, "repetition_penalty", "must be in [0.01, "),
    ({"best_of": 3}, "best_of", "must equal n, which is 1"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"priority": 2**31}, "priority", "priority is 2147483648"),
    ({"priority": 1.5}, "priority", "must be an integer"),
    ({"queue_timeout": 0}, "queue_timeout", "queue_timeout is 0"),
    ({"queue_timeout": -1.5}, "queue_timeout", "must be in (0.0, "),
    ({"queue_timeout": "1"}, "queue_timeout", "must be a number"),
    ({"store": True}, "store", "send false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "not a field"),
    ({"stream": "yes"}, "stream", "must be true or false"),
    ({"max_completion_tokens": 3}, "max_completion_tokens", "not a field"),
    ({"guided_json": {}}, "guided_json", "not a field of this request"),
    ({"model": "sql", "lora_path": "law"}, "lora_path", "choose the adapter in one of them"),
    ({"model": "sql", "lora_path": [None]}, "lora_path", "choose the adapter in one of them"),
    ({"lora_path": ["sql", "law"]}, "lora_path", "has 2 entries but prompt has 1"),
    ({"lora_path": ""}, "lora_path", "is empty"),
    ({"lora_path": 3}, "lora_path", "must be an adapter's name"),
    ({"model": 3}, "model", "must be a string"),
]

REFUSED_CHATS = [
    *REFUSED_FORMS,
    ({"messages": []}, "messages", "at least one"),
    ({"messages": "hi"}, "messages", "must be a list"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    ({"messages": [{"content": "a"}]}, "messages.0.role", "missing"),
    ({"messages": [{"role": "boss", "content": "a"}]}, "messages.0.role", "'assistant'"),
    ({"messages": [{"role": "tool", "tool_call_id": "c"}]}, "messages.0.content", "missing"),
    ({"messages": [{"role": "function", "content": "a"}]}, "messages.0.role", "with role 'tool'"),
    ({"messages": [{"role": "assistant"}]}, "messages.0.content", "missing"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
        "messages.0.tool_calls",
        "'assistant' have it",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "tool_call_id": "c"}]},
        "messages.0.tool_call_id",
        "'tool' have it",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [BROKEN_CALL]}]},
        "messages.0.tool_calls",
        "must be a JSON object",
    ),
    (user([IMAGE]), "messages.0.content.0", "'image_url' are not supported"),
    (user([{"type": "text"}]), "messages.0.content.0.text", "missing"),
    (user(3), "messages.0.content", "a string or a list of parts"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
    ({"tools": [tool("")]}, "tools.0.function.name", "at least 1 character"),
    ({"tools": [tool("f"), tool("f")]}, "tools.1.function.name", "two functions with the name 'f'"),
    ({"tools": [tool("f")], **JSON_OBJECT}, "tools", "exclude each other"),
    ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
    ({"tools": [tool("f")], "tool_choice": "any"}, "tool_choice", "'required'"),
    ({"tools": [tool("f")], "tool_choice": 3}, "tool_choice", "a function's name in an object"),
    ({"tools": [tool("f")], "tool_choice": named("g")}, "tool_choice.function.name", "tools has 'f'"),
    ({"tools": [tool("f", {"not": {}})], "tool_choice": named("f")}, "tools", "kept to exactly"),
    ({"tools": [tool("f", {"not": {}})], "tool_choice": "required"}, "tools", "kept to exactly"),
    ({"functions": [{"name": "f"}]}, "functions", "OpenAI's old form"),
    ({"function_call": {"name": "f"}}, "function_call", "OpenAI's old form"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "only text"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "chat_template_kwargs"),
    ({"echo": True}, "echo", "remove the field"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
    ({"logprobs": 3}, "logprobs", "must be true or false"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "send one of them"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "'tokenize'"),
    ({"lora_path": ["sql"]}, "lora_path", "must be a string"),
    ({"suffix": "a"}, "suffix", "not a field"),
]


@pytest.mark.parametrize(("body", "param", "text"), REFUSED_COMPLETIONS)
def test_bad_completion_is_400_and_names_the_field(body, param, text):
    client = make_client()
    assert_refused(complete(make_app(client), **body), param, text)
    assert client.submissions == []


@pytest.mark.parametrize(("body", "param", "text"), REFUSED_CHATS)
def test_bad_chat_is_400_and_names_the_field(body, param, text):
    client = make_client()
    assert_refused(chat(make_app(client), **body), param, text)
    assert client.submissions == []


def assert_refused(response, param, text):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["code"]
    assert text in error["message"], error["message"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not valid JSON"),
        (b'{"model": ', "not valid JSON"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_broken_body_is_400(content, text):
    response = call(make_app(), "POST", "/v1/completions", content=content)
    assert response.status_code == 400
    assert text in response.json()["error"]["message"]
    assert len(response.text) < 500


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_400(number):
    content = f'{{"model": "{BASE}", "prompt": "a", "temperature": {number}}}'
    response = call(make_app(), "POST", "/v1/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    "model", ["", "nobody", "a:b", f"{BASE}:", f"{BASE}:nobody", f"{BASE}:sql:law", "tiny2"]
)
def test_unknown_model_is_404(model):
    for response in (complete(make_app(), model=model), chat(make_app(), model=model)):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_body_over_the_limit_is_413():
    app = make_app(max_body_bytes=1000)
    assert complete(app, prompt="x").status_code == 200
    response = complete(app, prompt="x" * 1000)
    assert response.status_code == 413
    assert "1000 bytes" in response.json()["error"]["message"]


def test_body_over_the_limit_without_a_length_is_413():
    async def pieces():
        for _ in range(10):
            yield b" " * 500

    app = make_app(max_body_bytes=1000)
    assert call(app, "POST", "/v1/completions", content=pieces()).status_code == 413


def test_long_values_are_shortened_in_messages():
    response = complete(make_app(), temperature="x" * 100_000)
    assert response.status_code == 400
    assert len(response.json()["error"]["message"]) < 300


def test_content_type_does_not_matter():
    content = json.dumps({"model": BASE, "prompt": "a"})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert call(make_app(), "POST", "/v1/completions", content=content, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "found"),
    [
        ({"prompt": ["a"] * 3, "n": 2}, "prompt", "prompt has 3 entries and n is 2, which makes 6 answers"),
        ({"prompt": [[1]] * 5}, "prompt", "prompt has 5 entries and n is 1, which makes 5 answers"),
        ({"n": 5}, "n", "n is 5"),
    ],
)
def test_too_many_answers_of_one_request_are_400(fields, param, found):
    client = make_client()
    response = complete(make_app(client, max_answers_per_request=4), **fields)
    assert_refused(response, param, f"{found} but a request may ask for at most 4; ")
    num_answers = 6 if fields.get("n") == 2 else 5
    assert f"--max-answers-per-request {num_answers}" in response.json()["error"]["message"]
    assert client.submissions == []


def test_as_many_answers_as_allowed_are_given():
    app = make_app(max_answers_per_request=4)
    assert len(complete(app, prompt=["a", "b"], n=2).json()["choices"]) == 4
    assert len(chat(app, n=4).json()["choices"]) == 4


def test_too_many_answers_of_one_conversation_are_400():
    assert_refused(chat(make_app(max_answers_per_request=4), n=5), "n", "n is 5 but a request may ask for")


def test_a_small_body_cannot_queue_unbounded_work():
    client = make_client()
    assert_refused(complete(make_app(client), prompt=["hi"] * 20_000, n=20), "prompt", "at most 1024")
    assert client.submissions == []


@pytest.mark.parametrize("fields", [{}, {"add_special_tokens": False, "max_tokens": 1}])
def test_text_that_the_tokenizer_refuses_for_its_length_is_named(fields):
    client = make_client()

    async def refuse(*arguments, **options):
        raise InvalidArgumentError("the prompt has 9 characters but max_model_len is 8; shorten it")

    client.encode = client.encode_chat = refuse
    for response, param in (
        (complete(make_app(client), **fields), "prompt"),
        (chat(make_app(client)), "messages"),
    ):
        assert_refused(response, param, "max_model_len is 8")
        assert response.json()["error"]["code"] == "context_length_exceeded"
