"""Bad inputs over real HTTP: each is a 4xx that says what to do, and none leaves a trace in the server."""

from __future__ import annotations

import json
import time

import pytest

from lora_serve.testing.adapters import make_random_adapter
from lora_serve.testing.bad_adapters import BAD_ADAPTERS, corrupt_rank_too_high
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint

MAX_MODEL_LEN = 192
GOOD = {"prompt": "The quick brown fox jumps over the lazy dog", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`roots` is where adapters may be read from; every bad adapter lies there under its name."""
    folder = tmp_path_factory.mktemp("bad-inputs")
    model = make_tiny_checkpoint(folder / "model")
    roots = folder / "roots"
    for name, seed in (("good", 1), ("other", 2)):
        make_random_adapter(roots / name, model, rank=4, seed=seed)
    for name, bad in BAD_ADAPTERS.items():
        bad.corrupt(make_random_adapter(roots / name, model, rank=4))
    corrupt_rank_too_high(make_random_adapter(roots / "rank_17", model, rank=4), rank=17)
    make_random_adapter(folder / "outside", model, rank=4)
    (roots / "link").symlink_to(folder / "outside")
    (roots / "empty").mkdir()
    (roots / "file").write_text("no folder")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with ServerProcess(
        folder / "model",
        *("--served-model-name", "tiny", "--max-model-len", MAX_MODEL_LEN, "--num-device-pages", 64),
        *("--max-lora-rank", 16, "--lora-allowed-roots", folder / "roots"),
        *("--lora-modules", f"good={folder / 'roots' / 'good'}"),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with server.http() as http:
        yield http


def good_answers(http):
    answers = [http.post("/v1/completions", json={**GOOD, "model": model}) for model in ("tiny", "good")]
    assert [answer.status_code for answer in answers] == [200, 200]
    return [answer.json()["choices"][0]["text"] for answer in answers]


def counts(http):
    """Adapters with their pages and requests, and the engine's pages and requests; not what only grows, nor
    the loop's times.

    Once nothing runs: what was aborted in a step that runs is freed when the step has ended.
    """
    for _ in range(6000):
        body = http.get("/v1/loras").json()
        entries = [*body["data"], body["stats"]]
        if not any(entry["num_running_requests"] + entry["num_waiting_requests"] for entry in entries):
            break
        time.sleep(0.01)
    changing = ("total_", "loop_", "last_used_s")
    return [{key: n for key, n in entry.items() if not key.startswith(changing)} for entry in entries]


@pytest.fixture(scope="module")
def untouched(http):
    """The good answers and the counts before any bad input, with the good prompts already cached.

    So is the good half of the batch that has a bad one: it may run for some steps before it is aborted.
    """
    good_answers(http)
    http.post("/v1/completions", json={"model": "good", "prompt": "a", "temperature": 0})
    return good_answers(http), counts(http)


def completion(**fields):
    return "/v1/completions", {"model": "tiny", "prompt": "hi", **fields}


def chat(**fields):
    messages = [{"role": "user", "content": "hi"}]
    return "/v1/chat/completions", {"model": "tiny", "messages": messages, **fields}


def load(path, **fields):
    return "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": f"{{roots}}/{path}", **fields}


def unload(name):
    return "/v1/unload_lora_adapter", {"lora_name": name}


LONG = "x" * (MAX_MODEL_LEN + 1)
BAD_INPUTS = {
    # What runs.
    "unknown model": (completion(model="gpt-5"), 404, "GET /v1/models"),
    "unknown model in chat": (chat(model="gpt-5"), 404, "GET /v1/models"),
    "unknown adapter of the base": (completion(model="tiny:nobody"), 404, "/v1/load_lora_adapter"),
    "adapter of another base": (completion(model="other:good"), 404, "'other:good'"),
    "unknown lora_path": (completion(lora_path="nobody"), 404, "/v1/load_lora_adapter"),
    "one unknown adapter in a batch": (
        completion(prompt=["a", "b"], lora_path=["good", "no"], temperature=0),
        404,
        "'no'",
    ),
    "two adapters for one prompt": (completion(model="good", lora_path="other"), 400, "in one of them"),
    "too few adapters": (completion(prompt=["a", "b"], lora_path=["good"]), 400, "for each prompt"),
    "a stream of an unknown model": (completion(model="gpt-5", stream=True), 404, "GET /v1/models"),
    "no model": (("/v1/completions", {"prompt": "hi"}), 400, "model is missing"),
    # Prompts.
    "no prompt": (("/v1/completions", {"model": "tiny"}), 400, "prompt is missing"),
    "empty prompt": (completion(prompt=""), 400, "prompt is empty"),
    "empty prompt in a batch": (completion(prompt=["a", ""]), 400, "prompt 1 is empty"),
    "no token ids": (completion(prompt=[[]]), 400, "prompt 0 is empty"),
    "prompt longer than the model": (completion(prompt=LONG), 400, "max_model_len is 192"),
    "one prompt of a batch too long": (completion(prompt=["a", LONG]), 400, "max_model_len is 192"),
    "conversation longer than the model": (
        chat(messages=[{"role": "user", "content": LONG}]),
        400,
        "max_model",
    ),
    "token id outside the vocabulary": (completion(prompt=[1, 99999]), 400, "99999"),
    "negative token id": (completion(prompt=[-1]), 400, "-1"),
    "no messages": (chat(messages=[]), 400, "at least one"),
    "message without content": (chat(messages=[{"role": "user"}]), 400, "messages.0.content"),
    "refused by the chat template": (
        chat(messages=[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]),
        400,
        "the system message must come first",
    ),
    "an image": (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "'image_url'"),
    # Sampling.
    "too many answers of a batch": (completion(prompt=["hi"] * 20_000, n=20), 400, "at most 1024"),
    "negative temperature": (completion(temperature=-0.1), 400, "temperature is -0.1"),
    "temperature as text": (completion(temperature="hot"), 400, "must be a number"),
    "top_p above one": (completion(top_p=1.5), 400, "top_p is 1.5"),
    "top_k below minus one": (completion(top_k=-2), 400, "top_k is -2"),
    "min_p above one": (chat(min_p=2), 400, "min_p is 2"),
    "no answers": (completion(n=0), 400, "n is 0"),
    "too many answers": (chat(n=1000), 400, "n is 1000"),
    "no tokens": (completion(max_tokens=0), 400, "at least 1"),
    "no room for the default": (completion(prompt="x" * MAX_MODEL_LEN), 400, "shorten the prompt to 191"),
    "no room for min_tokens": (completion(prompt="x" * 187, min_tokens=6), 400, "min_tokens is 6"),
    "the default, sent, does not fit": (completion(prompt="x" * 180, max_tokens=16), 400, "at most 12"),
    "more tokens than fit": (completion(max_tokens=MAX_MODEL_LEN), 400, "at most 190"),
    "min above max": (completion(min_tokens=9, max_tokens=8), 400, "at most max_tokens"),
    "min_tokens that do not fit": (chat(min_tokens=MAX_MODEL_LEN), 400, "min_tokens is 192"),
    "too many logprobs": (completion(logprobs=1000), 400, "logprobs is 1000"),
    "top_logprobs alone": (chat(top_logprobs=2), 400, "needs logprobs"),
    "bias of a word": (completion(logit_bias={"cat": 1}), 400, "token ids"),
    "bias outside the vocabulary": (completion(logit_bias={"99999": 1}), 400, "99999"),
    "bias too large": (completion(logit_bias={"1": 1000}), 400, "logit_bias[1]"),
    "stop token outside the vocabulary": (completion(stop_token_ids=[99999]), 400, "99999"),
    "empty stop string": (chat(stop=[""]), 400, "non-empty"),
    "zero repetition penalty": (completion(repetition_penalty=0), 400, "repetition_penalty is 0"),
    "seed too large": (completion(seed=2**70), 400, "seed is"),
    # What is not supported, and what does not exist.
    "tools": (chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "does not show tools"),
    "structured output": (chat(response_format={"type": "json_object"}), 400, "no end-of-sequence token"),
    "best_of": (completion(best_of=4), 400, "best_of is 4"),
    "suffix": (completion(suffix="end"), 400, "suffix"),
    "priority beyond 32 bits": (completion(priority=-(2**31) - 1), 400, "priority is -2147483649"),
    "queue_timeout of nothing": (chat(queue_timeout=0), 400, "queue_timeout is 0"),
    "weight of nothing": (load("other", weight=0), 400, "weight is 0"),
    "unknown field": (completion(temprature=0), 400, "temprature is not a field"),
    "unknown endpoint": (("/v1/embeddings", {}), 404, "no endpoint /v1/embeddings"),
    # Adapters.
    "missing folder": (load("nothing"), 400, "nothing"),
    "empty folder": (load("empty"), 400, "adapter_config.json"),
    "file instead of a folder": (load("file"), 400, "file"),
    "path outside the roots": (load("../outside"), 400, "--lora-allowed-roots"),
    "link out of the roots": (load("link"), 400, "--lora-allowed-roots"),
    "path of the system": (load("", lora_path="/etc"), 400, "--lora-allowed-roots"),
    "name in use with other content": (load("other", lora_name="good"), 409, "load_inplace"),
    "name of the base": (load("other", lora_name="tiny"), 400, "another name"),
    "name with a colon": (load("other", lora_name="a:b"), 400, "no colon"),
    "empty name": (load("other", lora_name=""), 400, "is empty"),
    "load without a path": (("/v1/load_lora_adapter", {"lora_name": "x"}), 400, "lora_path is missing"),
    "unknown field of a load": (load("other", lora_int_id=3), 400, "lora_int_id"),
    "rank just above the limit": (load("rank_17"), 400, "start with --max-lora-rank 17"),
    "bad content in place": (load("nan", lora_name="good", load_inplace=True), 400, "NaN"),
    "unload of an unknown adapter": (unload("nobody"), 404, "nobody"),
    "unload of the base": (unload("tiny"), 404, "tiny"),
    **{f"adapter: {name}": (load(name), 400, bad.message_has[-1]) for name, bad in BAD_ADAPTERS.items()},
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_and_leaves_no_trace(name, http, folder, untouched):
    (path, body), status, text = BAD_INPUTS[name]
    content = json.dumps(body).replace("{roots}", str(folder / "roots"))
    response = http.post(path, content=content)
    assert_refused(response, status, text)
    assert counts(http) == untouched[1]


BROKEN_BODIES = {
    "nothing": (b"", 400, "not valid JSON"),
    "half an object": (b'{"model": "tiny", "prompt": "a', 400, "not valid JSON"),
    "not UTF-8": (b'{"model": "tiny", "prompt": "\xc3("}', 400, "UTF-8"),
    "half a surrogate pair": (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "not valid JSON"),
    "a list": (b'["tiny"]', 400, "must be a JSON object"),
    "a number that is none": (b'{"model": "tiny", "prompt": "a", "top_p": NaN}', 400, "top_p"),
    "deep nesting": (b'{"model": "tiny", "prompt": ' + b"[" * 100_000, 400, "not valid JSON"),
    "33 MiB": (b" " * (33 * 2**20), 413, "shorter prompts"),
}


@pytest.mark.parametrize("name", BROKEN_BODIES)
def test_broken_body_is_refused_and_leaves_no_trace(name, http, untouched):
    content, status, text = BROKEN_BODIES[name]
    assert_refused(http.post("/v1/completions", content=content), status, text)
    assert counts(http) == untouched[1]


def test_wrong_method_is_refused(http):
    response = http.get("/v1/completions")
    assert_refused(response, 405, "use POST")


def test_good_requests_are_answered_as_before(http, untouched):
    """Runs after the tables: hundreds of refusals have changed neither answers nor counts."""
    assert (good_answers(http), counts(http)) == untouched
    roots_adapter = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in roots_adapter] == ["tiny", "good"]


@pytest.mark.parametrize(("num_prompt_tokens", "num_tokens"), [(191, 1), (180, 12), (176, 16), (175, 16)])
@pytest.mark.parametrize("max_tokens", [{}, {"max_tokens": None}])
def test_without_max_tokens_an_answer_takes_the_room_that_is_left(
    num_prompt_tokens, num_tokens, max_tokens, http
):
    body = {"model": "tiny", "prompt": "x" * num_prompt_tokens, "temperature": 0, **max_tokens}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == num_tokens
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def assert_refused(response, status, text):
    assert response.status_code == status, response.text
    body = response.json()
    error = body.pop("error")
    # SGLang's fields of a load or unload that failed; nothing else stands beside an error.
    changes_adapters = response.request.url.path.endswith("load_lora_adapter")
    assert body == ({"success": False, "error_message": error["message"]} if changes_adapters else {})
    assert set(error) == {"message", "type", "param", "code"}
    assert text in error["message"], error["message"]
    assert "Traceback" not in response.text
    assert len(error["message"]) < 5000
