"""Tools and answers of a given form with the openai package, against the demo server."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from lora_serve.demo.paths import demo_paths
from support.server_process import ServerProcess

MESSAGES = [{"role": "user", "content": "What is the weather in Bonn?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"enum": ["Bonn", "Ulm"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 7},
                },
                "required": ["town", "days"],
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Weather(BaseModel):
    town: Literal["Bonn", "Ulm"]
    degrees: int = Field(ge=-50, le=50)
    is_sunny: bool


FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": Weather.model_json_schema()}}


@pytest.fixture(scope="module")
def server():
    paths = demo_paths()
    modules = [f"{name}={path}" for name, path in paths.adapters.items()]
    options = ("--max-num-seqs", "16", "--kv-memory-gb", "0.1")
    with ServerProcess(
        *(paths.model, "--served-model-name", "demo", *options, "--lora-modules", *modules)
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def adapter():
    return next(iter(demo_paths().adapters))


def ask(client, model="demo", **options):
    fields = {"messages": MESSAGES, "temperature": 0, "max_tokens": 300, **options}
    return client.chat.completions.create(model=model, **fields)


def test_schema_is_kept_to_by_base_and_adapter(client, adapter):
    for model in ("demo", adapter):
        [choice] = ask(client, model, response_format=FORM).choices
        assert choice.finish_reason == "stop"
        Weather.model_validate_json(choice.message.content)


def test_parse_gives_an_object_of_the_asked_class(client):
    answer = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Weather, temperature=1, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_stream_of_a_form_joins_to_the_whole(client):
    whole = ask(client, response_format=FORM, seed=1, temperature=1).choices[0].message.content
    chunks = list(ask(client, response_format=FORM, seed=1, temperature=1, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_json_object_is_one(client):
    [choice] = ask(
        client, response_format={"type": "json_object"}, temperature=1, seed=5, max_tokens=400
    ).choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"[A-Z]{3}-\d{2}"}, r"[A-Z]{3}-\d{2}"),
        ({"choice": ["red", "blue"]}, "red|blue"),
        ({"grammar": 'root ::= "<" [a-z]+ ">"'}, "<[a-z]+>?"),
        ({"json": {"enum": [1, "two"]}}, '1|"two"'),
    ],
)
def test_forms_of_vllm_for_batches_of_prompts_with_several_answers(client, form, pattern):
    answer = client.completions.create(
        model="demo",
        prompt=["a", "b"],
        n=3,
        seed=1,
        max_tokens=20,
        logprobs=1,
        extra_body={"structured_outputs": form},
    )
    assert len(answer.choices) == 6
    assert all(re.fullmatch(pattern, choice.text) for choice in answer.choices)
    assert all(len(choice.logprobs.tokens) > 0 for choice in answer.choices)


def test_a_required_call_is_parsed_and_its_result_can_be_sent_back(client):
    [choice] = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name in ("get_weather", "get_time")
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == ({"town", "days"} if call.function.name == "get_weather" else set())
    messages = [
        *MESSAGES,
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    again = ask(client, messages=messages, tools=TOOLS, max_tokens=5)
    assert again.usage.prompt_tokens > 0
    assert again.choices[0].message.role == "assistant"


def test_a_named_function_is_called_with_arguments_by_its_schema(client, adapter):
    [choice] = ask(client, adapter, tools=TOOLS, tool_choice=NAMED).choices
    [call] = choice.message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["town"] in ("Bonn", "Ulm")
    assert 1 <= arguments["days"] <= 7
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_streamed_calls_join_to_the_whole(client, choice):
    options = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    [whole] = ask(client, **options).choices
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=300, **options
    ) as stream:
        for _ in stream:
            pass
        [streamed] = stream.get_final_completion().choices
    assert streamed.finish_reason == "tool_calls"
    pairs = zip(streamed.message.tool_calls, whole.message.tool_calls, strict=True)
    for one, other in pairs:
        assert one.function.name == other.function.name
        assert one.function.arguments == other.function.arguments


def test_tools_that_may_be_called_are_in_the_prompt(client):
    num_tokens = [
        ask(client, max_tokens=1, **options).usage.prompt_tokens
        for options in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"})
    ]
    assert num_tokens[1] > num_tokens[0] == num_tokens[2]


def test_async_client_asks_for_many_forms_at_once(server, adapter):
    async def main():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:

            async def one(index):
                form = {"regex": f"{index}[ab]{{{index + 1}}}"}
                model = adapter if index % 2 else "demo"
                stream = await client.chat.completions.create(
                    model=model, messages=MESSAGES, stream=True, extra_body={"structured_outputs": form}
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(index) for index in range(8)))

    for index, text in enumerate(asyncio.run(main())):
        assert re.fullmatch(f"{index}[ab]{{{index + 1}}}", text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"extra_body": {"structured_outputs": {"regex": "a("}}}, "cannot be compiled"),
        ({"extra_body": {"structured_outputs": {"grammar": "root ::= x"}}}, "cannot be compiled"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"not": {}}},
                }
            },
            "kept to exactly",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_form_is_400_before_the_answer_begins(client, options, text, stream):
    with pytest.raises(openai.BadRequestError, match=text):
        ask(client, stream=stream, **options)


def test_tokenize_and_detokenize_are_inverse_and_agree_with_requests(server, client):
    text = "Grüße, <|im_start|>!"
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}).json() == {
        "prompt": text
    }
    body = {"model": "demo", "messages": MESSAGES, "tools": TOOLS}
    count = httpx.post(f"{server.url}/tokenize", json=body).json()["count"]
    assert ask(client, tools=TOOLS, max_tokens=1).usage.prompt_tokens == count
