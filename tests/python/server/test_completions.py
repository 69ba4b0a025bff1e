from __future__ import annotations

import asyncio
import time

import pytest

from lora_serve.common.errors import InternalError
from lora_serve.common.outputs import CompletionOutput, RequestOutput
from server.fake_engine_client import a_position
from server.http_calls import BASE, call, complete, events, make_app, make_client


def test_completion_gives_text_usage_and_generation():
    body = complete(make_app(), model="sql", prompt="hello").json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "sql"
    assert body["system_fingerprint"] == "sql-g1-00000001"
    assert body["choices"] == [
        {"index": 0, "text": "sql!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_base_model_is_generation_zero():
    assert complete(make_app()).json()["system_fingerprint"] == f"{BASE}-g0"


def test_batched_prompts_run_under_their_own_adapters():
    client = make_client()
    body = complete(
        make_app(client), prompt=["ab", "cd", "ef"], lora_path=["law", None, "sql"], n=2, max_tokens=9
    ).json()
    assert [s.lora_name for s in client.submissions] == ["law", None, "sql"]
    assert [s.prompt for s in client.submissions] == ["ab", "cd", "ef"]
    assert [c["text"] for c in body["choices"]] == ["law!", "law!", "base!", "base!", "sql!", "sql!"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert body["system_fingerprint"] == f"law-g2-00000002,{BASE}-g0,sql-g1-00000001"
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 2 * (4 + 5 + 4)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


@pytest.mark.parametrize("choice", [{"model": "law"}, {"lora_path": "law"}, {"model": f"{BASE}:law"}])
def test_one_adapter_holds_for_every_prompt_of_a_batch(choice):
    client = make_client()
    complete(make_app(client), prompt=["ab", "cd", "ef"], **choice)
    assert [s.lora_name for s in client.submissions] == ["law"] * 3


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab"], ["ab"]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        (["ab", "c"], ["ab", "c"]),
    ],
)
def test_prompts_come_as_text_or_token_ids(prompt, expected):
    client = make_client()
    assert complete(make_app(client), prompt=prompt, max_tokens=4).status_code == 200
    assert [s.prompt for s in client.submissions] == expected


def test_sampling_fields_reach_the_engine():
    client = make_client()
    response = complete(
        make_app(client),
        n=2,
        max_tokens=7,
        min_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=11,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"15": 3, "7": -100},
        seed=42,
        stop=["x", "yz"],
        stop_token_ids=[9, 10],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=4,
    )
    assert response.status_code == 200
    params = client.submissions[0].params
    assert (params.n, params.max_tokens, params.min_tokens, params.seed) == (2, 7, 3, 42)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 11, 0.1)
    assert params.repetition_penalty == 1.5
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.5)
    assert params.logit_bias == {15: 3.0, 7: -100.0}
    assert (params.stop_strings, params.stop_token_ids) == (["x", "yz"], [9, 10])
    assert (params.include_stop_str_in_output, params.ignore_eos, params.skip_special_tokens) == (
        True,
        True,
        False,
    )
    assert (params.logprobs, params.prompt_logprobs) == (4, None)


def test_null_fields_take_their_defaults():
    client = make_client()
    nulls = dict.fromkeys(
        ["n", "max_tokens", "temperature", "stop", "seed", "logit_bias", "user", "suffix", "stream", "echo"]
    )
    assert complete(make_app(client), **nulls).status_code == 200
    params = client.submissions[0].params
    assert (params.n, params.max_tokens, params.temperature, params.seed) == (1, 16, 1.0, None)


@pytest.mark.parametrize("fields", [{}, {"max_tokens": None}])
def test_without_max_tokens_each_prompt_has_its_own_default(fields):
    """None leaves the number to the engine, which knows the room; real numbers are in e2e/test_bad_inputs."""
    client = make_client()
    prompts = ["a", "b" * 111, "c" * 112, "d" * 127]
    body = complete(make_app(client), prompt=prompts, echo=True, **fields).json()
    assert [s.params.max_tokens for s in client.submissions] == [16, 16, None, None]
    assert [choice["text"] for choice in body["choices"]] == [f"{prompt}base!" for prompt in prompts]


def test_max_tokens_that_is_sent_reaches_the_engine_whether_it_fits_or_not():
    client = make_client()
    complete(make_app(client), prompt="a" * 127, max_tokens=16)
    assert client.submissions[0].params.max_tokens == 16


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "u"},
        {"metadata": {"a": "b"}},
        {"store": False},
        {"priority": 0},
        {"best_of": 1},
        {"n": 2, "best_of": 2},
        {"suffix": ""},
        {"service_tier": "auto"},
    ],
)
def test_fields_that_change_nothing_are_accepted(harmless):
    assert complete(make_app(), **harmless).status_code == 200


def test_logprobs_hold_the_sampled_token_besides_the_top():
    body = complete(make_app(), logprobs=1, max_tokens=2).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["b", "a"],
        "token_logprobs": [-3.0, -3.0],
        "top_logprobs": [{"#": -1.0, "b": -3.0}, {"#": -1.0, "a": -3.0}],
        "text_offset": [0, 1],
    }


def test_logprobs_zero_gives_the_sampled_token_alone():
    logprobs = complete(make_app(), logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"b": -3.0}]


def test_echo_with_logprobs_starts_with_the_prompt():
    client = make_client()
    choice = complete(make_app(client), prompt="hi", echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    assert client.submissions[0].params.prompt_logprobs == 1
    assert choice["text"] == "hib"
    assert choice["logprobs"] == {
        "tokens": ["h", "i", "b"],
        "token_logprobs": [None, -3.0, -3.0],
        "top_logprobs": [None, {"#": -1.0, "i": -3.0}, {"#": -1.0, "b": -3.0}],
        "text_offset": [0, 1, 2],
    }


def test_echo_of_token_ids_gives_their_text():
    choices = complete(make_app(), prompt=[[104, 105], [106]], echo=True, max_tokens=1).json()["choices"]
    assert [choice["text"] for choice in choices] == ["hib", "jb"]


def test_echo_without_new_tokens_gives_only_the_prompt():
    client = make_client()
    body = complete(make_app(client), prompt="hi", echo=True, max_tokens=0, logprobs=0).json()
    assert client.submissions[0].params.max_tokens == 1
    [choice] = body["choices"]
    assert choice["text"] == "hi"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["h", "i"]
    assert body["usage"]["completion_tokens"] == 0


def test_token_ids_are_returned_on_request():
    [choice] = complete(make_app(), prompt="hi", max_tokens=2, return_token_ids=True).json()["choices"]
    assert choice["prompt_token_ids"] == [104, 105]
    assert choice["token_ids"] == [98, 97]


def test_text_without_special_tokens_is_tokenised_by_the_server():
    client = make_client()
    body = complete(make_app(client), prompt="hi", add_special_tokens=False, echo=True, max_tokens=1).json()
    assert client.submissions[0].prompt == [104, 105]
    assert body["choices"][0]["text"] == "hib"


def test_stream_pieces_join_to_the_whole_text():
    chunks = events(complete(make_app(), model="law", stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["l", "a", "w", "!"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"law-g2-00000002"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_stream_of_batched_prompts_keeps_choices_and_generations_apart():
    chunks = events(complete(make_app(), prompt=["ab", "cd"], lora_path=["law", "sql"], n=2, stream=True))
    texts = dict.fromkeys(range(4), "")
    names = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        names[choice["index"]] = chunk["system_fingerprint"]
    assert texts == {0: "law!", 1: "law!", 2: "sql!", 3: "sql!"}
    assert [names[index][:6] for index in range(4)] == ["law-g2", "law-g2", "sql-g1", "sql-g1"]


def test_stream_with_usage_ends_with_a_chunk_without_choices():
    chunks = events(complete(make_app(), stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 5
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_stream_with_continuous_usage_counts_up():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(complete(make_app(), stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]


def test_stream_echo_comes_first_in_every_choice():
    chunks = events(complete(make_app(), prompt="hi", echo=True, logprobs=0, n=2, max_tokens=2, stream=True))
    first = [next(c["choices"][0] for c in chunks if c["choices"][0]["index"] == i) for i in range(2)]
    assert [choice["text"] for choice in first] == ["hib", "hib"]
    assert [choice["logprobs"]["tokens"] for choice in first] == [["h", "i", "b"]] * 2
    assert chunks[-1]["choices"][0]["logprobs"]["text_offset"] == [3]


def test_stream_echo_waits_for_the_logprobs_of_the_prompt():
    """The engine may be ahead with the second answer; the prompt's log probabilities come with the first."""
    client = make_client()

    def second_answer_first(stream, params, lora_name):
        for index in (1, 0):
            answer = CompletionOutput(
                index=index, text="x", token_ids=[120], logprobs=[a_position(120)], finish_reason="length"
            )
            prompt_logprobs = [None, a_position(105)] if index == 0 else None
            ids = stream.prompt_token_ids
            stream.put(RequestOutput("r0", "hi", ids, prompt_logprobs, [answer], finished=index == 0))

    client._answer = second_answer_first
    chunks = events(complete(make_app(client), prompt="hi", echo=True, logprobs=1, n=2, stream=True))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [1, 0]
    assert [chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks] == [["h", "i", "x"]] * 2


def test_unknown_adapter_is_404_before_a_stream_starts():
    response = complete(make_app(), model="nobody", stream=True)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'nobody'" in error["message"]
    assert "/v1/models" in error["message"]


def test_one_unknown_adapter_of_a_batch_aborts_the_others():
    client = make_client()
    response = complete(make_app(client), prompt=["a", "b"], lora_path=["sql", "nobody"])
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "lora_path"
    assert client.aborted == ["r0"]


def test_one_unknown_adapter_of_a_batch_does_not_wait_for_the_others():
    client = make_client()
    submit = client.submit

    async def slow_under_sql(prompt, *arguments, lora_name, **options):
        if lora_name == "sql":
            await asyncio.sleep(60)
        return await submit(prompt, *arguments, lora_name=lora_name, **options)

    client.submit = slow_under_sql
    start = time.monotonic()
    response = complete(make_app(client), prompt=["a", "b"], lora_path=["sql", "nobody"])
    assert response.status_code == 404
    assert time.monotonic() - start < 30


def test_failure_in_mid_stream_becomes_an_event():
    client = make_client(first_stream_fails_with=InternalError("the engine has stopped"))
    chunks = events(complete(make_app(client), stream=True))
    assert chunks[0]["choices"][0]["text"] == "b"
    assert chunks[1]["error"]["message"] == "the engine has stopped"


def test_failure_of_one_prompt_in_mid_stream_ends_the_stream_and_aborts_the_rest():
    client = make_client(
        first_stream_fails_with=InternalError("the engine has stopped"), num_tokens_before_hold=1
    )
    chunks = events(complete(make_app(client), prompt=["a", "b"], stream=True))
    assert chunks[-1]["error"]["message"] == "the engine has stopped"
    assert client.aborted == ["r1"]


def test_failure_of_one_prompt_fails_the_whole_and_aborts_the_rest():
    client = make_client(
        first_stream_fails_with=InternalError("the engine has stopped"), num_tokens_before_hold=1
    )
    response = complete(make_app(client), prompt=["a", "b"])
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the engine has stopped"
    assert client.aborted == ["r1"]


def test_unexpected_error_is_answered_without_its_text():
    client = make_client()
    client.tokenizer = None
    response = complete(make_app(client), echo=True, prompt=[97])
    assert response.status_code == 500
    assert "NoneType" not in response.text
    assert response.json()["error"]["code"] == "internal_error"


def test_wrong_method_and_unknown_path_have_the_same_shape():
    wrong = call(make_app(), "GET", "/v1/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert "POST" in wrong.json()["error"]["message"]
    unknown = call(make_app(), "POST", "/v1/nothing")
    assert unknown.status_code == 404
    assert "/v1/nothing" in unknown.json()["error"]["message"]


def test_model_of_another_base_is_404_and_says_which_base_is_here():
    client = make_client()
    response = complete(make_app(client), model="llama:sql")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert f"send '{BASE}:sql'" in response.json()["error"]["message"]
    assert "send" not in complete(make_app(client), model=f"{BASE}:nobody").json()["error"]["message"]
