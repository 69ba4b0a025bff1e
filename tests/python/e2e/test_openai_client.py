"""The openai package and curl against a real server that asks for a key."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess

import openai
import pytest

from lora_serve.testing.adapters import make_random_adapter
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint

KEY = "sk-of-the-test"
PROMPT = "Whatever is worth doing at all is worth doing well, and so on."
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openai")
    model = make_tiny_checkpoint(folder / "model")
    modules = [
        f"{name}={make_random_adapter(folder / name, model, rank=4, seed=seed)}"
        for seed, name in enumerate(("red", "blue"))
    ]
    with ServerProcess(
        *(model, "--served-model-name", "tiny", "--api-key", "another-key", "--lora-modules", *modules),
        environment={"LORA_SERVE_API_KEY": KEY},
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def completion_text(client, model, **options):
    answer = client.completions.create(model=model, prompt=PROMPT, **{**GREEDY, **options})
    return answer.choices[0].text


def test_models_are_the_base_and_its_adapters(client):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["tiny", "red", "blue"]
    assert cards["tiny"].parent is None
    assert cards["red"].parent == "tiny"
    assert cards["red"].root.endswith("/red")


def test_completion_of_each_model_differs_and_repeats(client):
    texts = {model: completion_text(client, model) for model in ("tiny", "red", "blue")}
    assert len(set(texts.values())) == 3
    assert completion_text(client, "tiny:red") == texts["red"]
    assert completion_text(client, "tiny", extra_body={"lora_path": "blue"}) == texts["blue"]


def test_completion_has_usage_with_cached_tokens_and_its_generation(client):
    prompt = "cached " + PROMPT
    for num_cached_tokens in (0, len(prompt) // 16 * 16):
        answer = client.completions.create(model="red", prompt=prompt, **GREEDY)
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == 12
        assert answer.usage.prompt_tokens_details.cached_tokens == num_cached_tokens
        assert answer.system_fingerprint.startswith("red-g1-")


def test_completion_batch_has_one_adapter_a_prompt(client):
    names = ["red", None, "blue", "red"]
    answer = client.completions.create(
        model="tiny", prompt=[PROMPT] * 4, extra_body={"lora_path": names}, **GREEDY
    )
    expected = [completion_text(client, name or "tiny") for name in names]
    assert [choice.text for choice in answer.choices] == expected


def test_completion_takes_token_ids(client):
    asked = client.completions.create(
        model="red", prompt=PROMPT, extra_body={"return_token_ids": True}, **GREEDY
    )
    token_ids = asked.choices[0].prompt_token_ids
    assert len(token_ids) == len(PROMPT)
    answer = client.completions.create(model="red", prompt=[token_ids, token_ids], **GREEDY)
    assert [choice.text for choice in answer.choices] == [asked.choices[0].text] * 2


def test_completion_stream_joins_to_the_whole_text(client):
    chunks = list(
        client.completions.create(
            model="blue", prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == completion_text(client, "blue")
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_completion_logprobs_of_prompt_and_answer(client):
    answer = client.completions.create(
        model="red", prompt=PROMPT, echo=True, logprobs=2, temperature=0, max_tokens=3
    )
    [choice] = answer.choices
    logprobs = choice.logprobs
    num_tokens = len(PROMPT) + 3
    assert choice.text.startswith(PROMPT)
    assert "".join(logprobs.tokens[: len(PROMPT)]) == PROMPT
    assert [len(entries) for entries in (logprobs.tokens, logprobs.token_logprobs)] == [num_tokens] * 2
    assert logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    for token, logprob, top in list(
        zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    )[len(PROMPT) :]:
        assert max(top.values()) == logprob == top[token]  # greedy
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_echo_without_new_tokens_scores_the_prompt(client):
    """What evaluation harnesses ask for."""
    answer = client.completions.create(
        model="red", prompt=PROMPT, echo=True, logprobs=1, temperature=0, max_tokens=0
    )
    assert answer.choices[0].text == PROMPT
    assert len(answer.choices[0].logprobs.tokens) == len(PROMPT)
    assert answer.usage.completion_tokens == 0


def test_text_offsets_of_a_stream_are_those_of_the_whole(client):
    text = completion_text(client, "red", max_tokens=24)
    options = {"model": "red", "prompt": PROMPT, "logprobs": 0, "temperature": 0, "max_tokens": 24}
    # Beginnings of these stop strings come, and are held back; the last one ends the answer.
    options["stop"] = [text[2:4] + "##", text[6:9] + "##", text[12:16]]
    [whole] = client.completions.create(**options).choices
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert "".join(chunk.text for chunk in chunks) == whole.text == text[:12]
    assert [o for chunk in chunks for o in chunk.logprobs.text_offset] == whole.logprobs.text_offset
    assert whole.logprobs.text_offset[0] == 0


def test_tokens_without_text_do_not_move_text_offsets(client):
    [special_id] = client.completions.create(
        model="tiny", prompt="<|endoftext|>", max_tokens=1, extra_body={"return_token_ids": True}
    ).choices[0].prompt_token_ids  # fmt: skip
    options = {"model": "tiny", "prompt": "Z", "logit_bias": {str(special_id): 100}, "logprobs": 0}
    options.update(temperature=0, max_tokens=3)
    for skip, text, offsets in ((True, "", [0, 0, 0]), (False, "<|endoftext|>" * 3, [0, 13, 26])):
        answer = client.completions.create(**options, extra_body={"skip_special_tokens": skip})
        assert answer.choices[0].text == text
        assert answer.choices[0].logprobs.text_offset == offsets


def test_chat_gives_a_message(client):
    answer = client.chat.completions.create(model="red", messages=MESSAGES, **GREEDY)
    [choice] = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert answer.usage.completion_tokens == 12
    assert answer.model == "red"


def test_chat_stream_joins_to_the_whole_message(client):
    whole = client.chat.completions.create(model="blue", messages=MESSAGES, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            model="blue", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_chat_logprobs_are_those_of_the_sampled_tokens(client):
    answer = client.chat.completions.create(
        model="red", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_chat_n_answers_are_seeded_each(client):
    options = {"model": "red", "messages": MESSAGES, "n": 2, "seed": 5, "max_tokens": 12}
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert texts[0] != texts[1]
    assert texts == [choice.message.content for choice in second.choices]


def test_completion_n_streams_both_answers(client):
    options = {"model": "red", "prompt": PROMPT, "n": 2, "seed": 5, "max_tokens": 12}
    whole = client.completions.create(**options)
    texts = ["", ""]
    for chunk in client.completions.create(stream=True, **options):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]


def test_stop_string_ends_the_answer(client):
    text = completion_text(client, "red")
    stop = text[3:5]
    answer = client.completions.create(model="red", prompt=PROMPT, stop=[stop], **GREEDY)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_bias_forces_a_token(client):
    token_id = client.completions.create(
        model="tiny", prompt="Z", temperature=0, max_tokens=1, extra_body={"return_token_ids": True}
    ).choices[0].prompt_token_ids[0]  # fmt: skip
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, logit_bias={str(token_id): 100}, temperature=0, max_tokens=3
    )
    assert answer.choices[0].text == "ZZZ"


def test_async_client_runs_many_models_at_once(server, client):
    models = ["tiny", "red", "blue"] * 4

    async def main():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60
        ) as http:

            async def streamed(model):
                stream = await http.completions.create(model=model, prompt=PROMPT, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(model):
                answer = await http.completions.create(model=model, prompt=PROMPT, **GREEDY)
                return answer.choices[0].text

            calls = [(streamed, whole)[i % 2](model) for i, model in enumerate(models)]
            return await asyncio.gather(*calls)

    texts = asyncio.run(main())
    expected = {model: completion_text(client, model) for model in set(models)}
    assert texts == [expected[model] for model in models]


def test_errors_are_the_exceptions_of_the_package(client, server):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt="a")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=MESSAGES, stream=True)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="red", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="red", messages=MESSAGES, reasoning_effort="low")
    assert "use chat_template_kwargs" in str(unsupported.value)
    with pytest.raises(openai.BadRequestError) as endless:
        client.chat.completions.create(
            model="red", messages=MESSAGES, response_format={"type": "json_object"}
        )
    assert "names no end-of-sequence token" in str(endless.value)
    assert endless.value.param == "structured_outputs"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_an_answer_a_stream_and_an_error(server, client):
    def curl(body, *options):
        command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60", *options]
        command += ["-H", f"Authorization: Bearer {KEY}", "-d", json.dumps(body)]
        command += [f"{server.url}/v1/completions"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    body = {"model": "red", "prompt": PROMPT, **GREEDY}
    expected = completion_text(client, "red")
    assert json.loads(curl(body))["choices"][0]["text"] == expected
    lines = curl({**body, "stream": True}, "--no-buffer").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    error = curl({**body, "model": "nobody"}, "-w", "\n%{http_code}")
    assert error.endswith("\n404")


def test_without_the_key_only_health_answers(server):
    with server.http() as http:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/v1/loras")):
            assert http.request(method, path, json={}).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Bearer another-key"}).status_code == 200
        assert http.get("/health").status_code == 200
