"""The tables of docs/openai_compatibility.md against the server: every row, by what its example does."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from lora_serve.server.protocol.adapters import LoadAdapterRequest, UnloadAdapterRequest
from lora_serve.server.protocol.chat import ChatCompletionRequest
from lora_serve.server.protocol.completion import CompletionRequest
from lora_serve.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from server.http_calls import BASE, call, make_app, make_client

PAGE = Path(__file__).parents[3] / "docs" / "openai_compatibility.md"
STATUSES = {"supported", "no effect", "400", "–"}
BODIES = {
    "completions": ("/v1/completions", {"model": BASE, "prompt": "hello"}, CompletionRequest),
    "chat": (
        "/v1/chat/completions",
        {"model": BASE, "messages": [{"role": "user", "content": "hello"}]},
        ChatCompletionRequest,
    ),
}
# It shows everything that a field can change: reasoning, content, two calls.
ANSWER = '<think>hm</think>a<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "f"}</tool_call>'


def rows_of(heading):
    """The cells of each row of the table under a heading."""
    section = PAGE.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def field_rows():
    for name, completions, chat, example, companions, _ in rows_of("Request fields"):
        field = re.match("`(.*?)`", name)[1]
        beside = json.loads(companions.strip("`") or "{}")
        for endpoint, status in (("completions", completions), ("chat", chat)):
            assert status in STATUSES, (field, status)
            yield pytest.param(
                endpoint, field, status, json.loads(example.strip("`")), beside, id=f"{endpoint}-{name}"
            )


FIELDS = list(field_rows())
OTHER_ROWS = rows_of("Fields of other endpoints")
OTHER_BODIES = {
    "`/v1/load_lora_adapter`": (
        "/v1/load_lora_adapter",
        {"lora_name": "sql", "lora_path": "/adapters/sql"},
        LoadAdapterRequest,
    ),
    "`/v1/unload_lora_adapter`": ("/v1/unload_lora_adapter", {"lora_name": "sql"}, UnloadAdapterRequest),
    "`/tokenize` prompt": ("/tokenize", {"prompt": "hello"}, TokenizeRequest),
    "`/tokenize` messages": (
        "/tokenize",
        {"messages": [{"role": "assistant", "content": "hello"}]},
        TokenizeRequest,
    ),
    "`/detokenize`": ("/detokenize", {"tokens": [104]}, DetokenizeRequest),
}


def send_elsewhere(endpoint, body):
    """The answer, and all that it and the engine were given."""
    client = make_client()
    answer = call(make_app(client), "POST", OTHER_BODIES[endpoint][0], json=body)
    return answer, (answer.text, client.operations, client.chat_messages, client.chat_options, client.encoded)


@functools.cache
def baseline(endpoint, beside):
    """What `send` gives for the fields beside the example alone."""
    return send(endpoint, json.loads(beside))


def send(endpoint, fields):
    """The answer, and all that it and the engine were given; made-up ids left out."""
    path, body, _ = BODIES[endpoint]
    client = make_client()
    if endpoint == "chat":
        client.answer_text = ANSWER
    app = make_app(client, reasoning_parser="qwen3")
    response = call(app, "POST", path, json={**body, **fields})
    seen = [
        (
            *(one.prompt, one.params, one.lora_name, one.queueing, one.isolation_domain),
            *(client.chat_messages, client.chat_options),
        )
        for one in client.submissions
    ]
    text = re.sub(r'[0-9a-f]{32}|call_[0-9a-f]{24}|"created":\d+', "", response.text)
    return response, (seen, text)


@pytest.mark.parametrize(("endpoint", "field", "status", "example", "beside"), FIELDS)
def test_field_does_what_the_table_says(endpoint, field, status, example, beside):
    response, effect = send(endpoint, {**({} if status == "–" else beside), field: example})
    if status in ("400", "–"):
        namesakes = [row.values for row in FIELDS if row.values[:2] == (endpoint, field)]
        if status == "–" and len(namesakes) > 1:
            return  # Of the other endpoint's row; this one has its own.
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"].split(".")[0] == field
        return
    assert response.status_code == 200, response.text
    default_response, default = baseline(endpoint, json.dumps(beside))
    assert default_response.status_code == 200, default_response.text
    assert (effect != default) == (status == "supported"), (effect, default)


@pytest.mark.parametrize(
    ("endpoint", "field", "status", "example"),
    [(row[0], row[1].strip("`"), row[2], json.loads(row[3].strip("`"))) for row in OTHER_ROWS],
    ids=[f"{row[0]} {row[1]}" for row in OTHER_ROWS],
)
def test_field_of_another_endpoint_does_what_the_table_says(endpoint, field, status, example):
    body = OTHER_BODIES[endpoint][1]
    answer, effect = send_elsewhere(endpoint, {**body, field: example})
    if status == "400":
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == field
        return
    assert status in STATUSES
    assert answer.status_code == 200, answer.text
    assert (effect != send_elsewhere(endpoint, body)[1]) == (status == "supported")


def test_table_has_every_field_of_the_other_endpoints():
    for model in {model for _, _, model in OTHER_BODIES.values()}:
        endpoints = [name for name, entry in OTHER_BODIES.items() if entry[2] is model]
        listed = {row[1].strip("`") for row in OTHER_ROWS if row[0] in endpoints}
        assert listed == set(model.model_fields), endpoints


@pytest.mark.parametrize("endpoint", BODIES)
def test_table_has_every_field_of_the_server(endpoint):
    fields = {field.alias or name for name, field in BODIES[endpoint][2].model_fields.items()}
    listed = {row.values[1] for row in FIELDS if row.values[0] == endpoint and row.values[2] != "–"}
    assert fields - listed == set()
    assert all(row.values[2] == "400" for row in FIELDS if row.values[1] in listed - fields)


def test_table_has_every_endpoint_of_the_server():
    app = make_app(tokenizer_info=True)
    served = {f"{method} {route.path}" for route in routes_of(app.routes) for method in route.methods}
    listed = {row[0].strip("`") for row in rows_of("Endpoints") if row[1] == "supported"}
    assert served | {"GET /openapi.json"} == listed


def routes_of(routes):
    """All routes, those of included routers too."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from routes_of(router.routes)


@pytest.mark.parametrize(
    "endpoint", [row[0].strip("`") for row in rows_of("Endpoints") if row[1] != "supported"]
)
def test_endpoint_that_is_not_applicable_is_404(endpoint):
    method, path = re.sub(r"\{.*?\}", "1", endpoint).split(" ")
    response = call(make_app(), method, path, json={})
    assert response.status_code == 404
    assert response.json()["error"]["message"].startswith(f"there is no endpoint {path}")


def test_every_row_has_a_known_status():
    assert {row[1] for row in rows_of("Endpoints")} == {"supported", "not applicable"}
