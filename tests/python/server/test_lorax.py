from __future__ import annotations

import json

import pytest

from lora_serve.common.errors import AdapterConflictError, CapacityError, InternalError, QueueTimeoutError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.server.lorax_sampling import lorax_sampling_params
from lora_serve.server.protocol.lorax import LoraxParameters
from server.http_calls import call, make_app, make_client

PATHS = ("/generate", "/generate_stream", "/")


def generate(client=None, path="/generate", stream=None, **parameters):
    body = {"inputs": "hello", "parameters": parameters}
    if path == "/" and stream is not None:
        body["stream"] = stream
    return call(make_app(client), "POST", path, json=body)


def events(response):
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-1] == ""
    assert all(line.startswith("data:{") for line in lines[:-1])
    return [json.loads(line.removeprefix("data:")) for line in lines[:-1]]


def assert_error(response, status, error_type, text):
    assert response.status_code == status
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == error_type
    assert text in body["error"]


# --- Answers ----------------------------------------------------------------------------------------------


def test_whole_answer_has_the_text_alone_unless_details_are_asked_for():
    assert generate(adapter_id="sql").json() == {"generated_text": "sql!"}
    assert generate(path="/", adapter_id="sql").json() == [{"generated_text": "sql!"}]
    assert call(make_app(), "POST", "/generate", json={"inputs": "x"}).json() == {"generated_text": "base!"}


def test_details_have_the_tokens():
    body = generate(
        adapter_id="sql", details=True, decoder_input_details=True, return_k_alternatives=2
    ).json()
    details = body["details"]
    assert details["finish_reason"] == "eos_token"
    assert (details["prompt_tokens"], details["generated_tokens"], details["seed"]) == (5, 4, None)
    assert [(token["id"], token["text"]) for token in details["tokens"]] == [(ord(c), c) for c in "sql!"]
    assert {token["special"] for token in details["tokens"]} == {False}
    assert details["tokens"][0]["alternative_tokens"] == [
        {"id": ord("#"), "text": "#", "logprob": -1.0},
        {"id": ord("$"), "text": "$", "logprob": -2.0},
    ]
    assert [entry["text"] for entry in details["prefill"]] == list("hello")
    assert [entry["logprob"] for entry in details["prefill"]] == [None, -3.0, -3.0, -3.0, -3.0]


@pytest.mark.parametrize(("path", "options"), [("/generate_stream", {}), ("/", {"stream": True})])
def test_stream_ends_with_the_whole_text_and_no_done(path, options):
    chunks = events(generate(path=path, adapter_id="sql", details=True, return_full_text=True, **options))
    assert "".join(chunk["token"]["text"] for chunk in chunks) == "sql!"
    assert [chunk["generated_text"] for chunk in chunks] == [None, None, None, "hellosql!"]
    assert [chunk["details"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["details"] == {
        "finish_reason": "eos_token",
        "prompt_tokens": 5,
        "generated_tokens": 4,
        "seed": None,
    }


@pytest.mark.parametrize("adapter_id", [None, "", "__base_model__"])
def test_base_model_has_several_names(adapter_id):
    assert generate(adapter_id=adapter_id).json() == {"generated_text": "base!"}


def test_truncate_keeps_the_last_tokens():
    client = make_client()
    generate(client, truncate=2)
    assert client.submissions[0].prompt == list(b"lo")


# --- Sampling ---------------------------------------------------------------------------------------------


def params_of(*, is_stream=False, **fields):
    return lorax_sampling_params(LoraxParameters(**fields), is_stream=is_stream)


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.0, "do_sample": True}, 0.0),
        ({"temperature": 0.0, "top_k": 5}, 0.0),
        ({"top_p": 1.0}, 0.0),
        ({"repetition_penalty": 1.5}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5}, 1.0),
    ],
)
def test_tokens_are_sampled_when_a_field_asks_for_it(fields, temperature):
    assert params_of(**fields).temperature == temperature


def test_fields_reach_the_engine_under_its_own_names():
    assert params_of(
        max_new_tokens=7,
        ignore_eos_token=True,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=-0.2,
        seed=11,
        stop=["a", "b"],
    ) == SamplingParams(
        max_tokens=7,
        ignore_eos=True,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=-0.2,
        seed=11,
        stop=["a", "b"],
        include_stop_str_in_output=True,
    )
    assert params_of().max_tokens is None


def test_unseeded_sampling_has_a_seed_of_its_own_each_time():
    seeds = {params_of(do_sample=True).seed for _ in range(4)}
    assert len(seeds) == 4
    assert None not in seeds
    assert params_of().seed is None


# --- Errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"typical_p": 0.5}, "typical sampling"),
        ({"watermark": True}, "watermarks"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1.0]}}, "not merged"),
        ({"api_token": "hf_x"}, "HF_TOKEN"),
        ({"response_format": {"type": "json_object"}}, "structured output"),
        ({"apply_chat_template": True}, "taken as they are"),
        ({"adapter_source": "pbase"}, "source"),
        ({"adapter_source": "disk"}, "adapter_source"),
        ({"grammar": "x"}, "unknown fields"),
        ({"temperature": -1.0}, "parameters.temperature is -1.0"),
        ({"temperature": "hot"}, "must be a number"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 1.5}, "parameters.top_p is 1.5"),
        ({"top_k": 0}, "parameters.top_k is 0"),
        ({"seed": 2**63}, "parameters.seed"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens is 0"),
        ({"truncate": 0}, "parameters.truncate is 0"),
        ({"stop": [""]}, "stop"),
        ({"best_of": 2}, "needs sampling"),
        ({"best_of": 2, "do_sample": True, "temperature": 0.0}, "needs sampling"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "cannot have a seed"),
        ({"best_of": 1000, "do_sample": True}, "best_of"),
        ({"return_k_alternatives": 21, "details": True}, "return_k_alternatives"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_honoured_is_422(path, fields, text):
    client = make_client()
    assert_error(generate(client, path, **fields), 422, "validation", text)
    assert client.submissions == []


def test_fields_that_contradict_the_endpoint_are_422():
    assert_error(generate(return_k_alternatives=2), 422, "validation", "needs details")
    stream = "/generate_stream"
    assert_error(generate(path=stream, decoder_input_details=True), 422, "validation", "decoder_input")
    assert_error(generate(path=stream, best_of=2, do_sample=True), 422, "validation", "in a stream")
    for path, flag in (("/generate", True), (stream, False)):
        response = call(make_app(), "POST", path, json={"inputs": "x", "stream": flag})
        assert_error(response, 422, "validation", "stream is")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"inputs": ""}', b"{}", b'{"inputs": "a", "model": "b"}'])
def test_bad_body_is_422(content):
    response = call(make_app(), "POST", "/generate", content=content)
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"


def test_body_that_is_too_large_is_413():
    response = call(make_app(max_body_bytes=10), "POST", "/generate", json={"inputs": "x" * 20})
    assert_error(response, 413, "validation", "more than 10 bytes")


def test_prompt_that_does_not_fit_is_422():
    body = {"inputs": "x" * 200}
    assert_error(call(make_app(), "POST", "/generate", json=body), 422, "validation", "max_model_len")


@pytest.mark.parametrize("path", PATHS)
def test_unknown_adapter_is_404_before_a_stream_begins(path):
    response = generate(path=path, stream=True, adapter_id="nobody")
    assert_error(response, 404, "adapter_not_found", "adapter_id 'nobody' is not a loaded adapter")


@pytest.mark.parametrize(
    ("error", "status", "error_type", "text"),
    [
        (CapacityError("full", 3), 429, "overloaded", "full"),
        (QueueTimeoutError("waited"), 503, "overloaded", "waited"),
        (AdapterConflictError("changed"), 409, "generation", "changed"),
        (InternalError("the engine has stopped"), 500, "generation", "the engine has stopped"),
        (RuntimeError("secret"), 500, "generation", "the reason is in its log"),
    ],
)
def test_failures_of_the_engine_keep_their_status(error, status, error_type, text):
    client = make_client()

    async def submit(*arguments, **options):
        raise error

    client.submit = submit
    response = generate(client)
    assert_error(response, status, error_type, text)
    assert response.headers.get("Retry-After") == ("3" if status == 429 else None)


def test_failure_in_mid_stream_is_the_last_event():
    client = make_client(first_stream_fails_with=InternalError("the engine has stopped"))
    chunks = events(generate(client, "/generate_stream"))
    assert chunks[0]["token"]["text"] == "b"
    assert chunks[1:] == [{"error": "the engine has stopped", "error_type": "generation"}]
