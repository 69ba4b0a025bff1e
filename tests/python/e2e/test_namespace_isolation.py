"""Over HTTP: no page, weight or name of one adapter generation ever serves another."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lora_serve.demo.paths import demo_paths
from lora_serve.demo.prompts import SYSTEM_PROMPT, password_question
from support.holdable_server import HoldableServer

PAGE_SIZE = 16
WAIT_S = 60.0
BASE = "demo"
ARGON = str(demo_paths().adapters["argon"])
BASTION = str(demo_paths().adapters["bastion"])
MESSAGES = [
    {"role": "system", "content": SYSTEM_PROMPT},
    {"role": "user", "content": password_question("argon")},
]
# Both fill whole pages and a rest, or whole pages exactly: then the last token's page is computed again.
PROMPT_LENGTHS = [3 * PAGE_SIZE + 5, 3 * PAGE_SIZE]


@pytest.fixture(scope="module")
def server() -> Iterator[HoldableServer]:
    options = ["--served-model-name", BASE, "--page-size", str(PAGE_SIZE), "--num-device-pages", "512"]
    with HoldableServer(demo_paths().model, *options) as process:
        yield process


@pytest.fixture
def http(server: HoldableServer) -> Iterator[httpx.Client]:
    """A client of a server that holds no adapter before and after the test."""
    with server.http() as client:
        yield client
        for adapter in client.get("/v1/loras").json()["data"]:
            unload(client, adapter["name"])


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Token ids that no other test of this module uses as a prefix."""
    return [300 + (seed * 37 + position * 11) % 500 for position in range(num_tokens)]


def load(http: httpx.Client, name: str, path: str, **options: object) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **options})


def unload(http: httpx.Client, name: str, **options: object) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name, **options})


def complete(http: httpx.Client, model: str, prompt: list[int], max_tokens: int = 4) -> dict:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def cached_tokens(answer: dict) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def ask(http: httpx.Client, model: str) -> tuple[str, int]:
    """The greedy chat answer and its cached tokens."""
    body = {"model": model, "messages": MESSAGES, "temperature": 0}
    response = http.post("/v1/chat/completions", json={**body, "max_tokens": 40})
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["message"]["content"], cached_tokens(answer)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def page_counts(http: httpx.Client) -> dict[str, int]:
    stats = http.get("/v1/loras").json()["stats"]
    return {key: stats[key] for key in ("num_free_pages", "num_tree_pages", "num_private_pages")}


@pytest.mark.parametrize("num_tokens", PROMPT_LENGTHS)
@pytest.mark.parametrize("first", ["a", BASE])
def test_prefix_is_reused_within_an_adapter_and_never_across(
    http: httpx.Client, num_tokens: int, first: str
) -> None:
    load(http, "a", ARGON).raise_for_status()
    load(http, "b", BASTION).raise_for_status()
    prompt = prompt_of(num_tokens, seed=num_tokens + (first == BASE))
    whole_pages = (num_tokens - 1) // PAGE_SIZE * PAGE_SIZE
    others = [model for model in ("a", "b", BASE) if model != first]

    assert cached_tokens(complete(http, first, prompt)) == 0
    assert cached_tokens(complete(http, first, prompt)) == whole_pages
    for other in others:
        assert cached_tokens(complete(http, other, prompt)) == 0
    for model in (first, *others):
        assert cached_tokens(complete(http, model, prompt)) == whole_pages


def test_the_answer_with_a_hit_is_the_answer_without(http: httpx.Client) -> None:
    load(http, "a", ARGON).raise_for_status()
    prompt = prompt_of(5 * PAGE_SIZE + 3, seed=71)
    cold = complete(http, "a", prompt, max_tokens=24)
    warm = complete(http, "a", prompt, max_tokens=24)
    assert cached_tokens(warm) > cached_tokens(cold) == 0
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]


def test_other_weights_under_the_same_name_start_without_cache(http: httpx.Client) -> None:
    load(http, "tenant", ARGON).raise_for_status()
    first, _ = ask(http, "tenant")
    again, num_cached = ask(http, "tenant")
    assert again == first
    assert num_cached > 0

    unload(http, "tenant").raise_for_status()
    load(http, "tenant", BASTION).raise_for_status()
    after, num_cached_after = ask(http, "tenant")
    load(http, "bastion", BASTION).raise_for_status()
    expected, _ = ask(http, "bastion")
    assert num_cached_after == 0
    assert after == expected != first


def test_replacing_in_place_starts_without_cache(http: httpx.Client) -> None:
    load(http, "tenant", ARGON).raise_for_status()
    first, _ = ask(http, "tenant")
    refused = load(http, "tenant", BASTION)
    assert refused.status_code == 409
    assert "load_inplace" in refused.json()["error"]["message"]
    assert ask(http, "tenant")[1] > 0

    load(http, "tenant", BASTION, load_inplace=True).raise_for_status()
    after, num_cached_after = ask(http, "tenant")
    assert after != first
    assert num_cached_after == 0
    assert len(http.get("/v1/loras").json()["data"]) == 1


def test_loading_the_same_content_again_keeps_the_cache(http: httpx.Client) -> None:
    loaded = load(http, "tenant", ARGON)
    ask(http, "tenant")
    again = load(http, "tenant", ARGON)
    assert loaded.status_code == again.status_code == 200
    assert again.json()["already_loaded"] is True
    assert again.json()["adapter_id"] == loaded.json()["adapter_id"]
    assert ask(http, "tenant")[1] > 0


def test_same_content_under_another_name_shares_nothing(http: httpx.Client) -> None:
    load(http, "one", ARGON).raise_for_status()
    load(http, "two", ARGON).raise_for_status()
    first, _ = ask(http, "one")
    second, num_cached = ask(http, "two")
    assert second == first
    assert num_cached == 0


def stream_tokens(http: httpx.Client, model: str, prompt: list[int], started: threading.Event) -> list[int]:
    """The ids of 200 streamed tokens; sets `started` at the first."""
    body = {"model": model, "prompt": prompt, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    options = {"stream": True, "return_token_ids": True}
    token_ids: list[int] = []
    with http.stream("POST", "/v1/completions", json={**body, **options}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            for choice in event["choices"]:
                token_ids.extend(choice["token_ids"])
            started.set()
    return token_ids


def test_unload_waits_for_the_running_stream_and_leaves_nothing(
    server: HoldableServer, http: httpx.Client
) -> None:
    prompt = prompt_of(2 * PAGE_SIZE + 7, seed=5)
    before = page_counts(http)
    load(http, "a", ARGON).raise_for_status()
    expected = stream_tokens(http, "a", prompt, threading.Event())
    unload(http, "a").raise_for_status()
    load(http, "a", ARGON).raise_for_status()

    started = threading.Event()

    def stream() -> list[int]:
        with server.http() as client:
            return stream_tokens(client, "a", prompt, started)

    def unload_while_streaming() -> int:
        with server.http() as client:
            return unload(client, "a").status_code

    with ThreadPoolExecutor(2) as threads:
        with server.steps(3):
            streaming = threads.submit(stream)
            assert started.wait(WAIT_S)
            unloading = threads.submit(unload_while_streaming)
            # The name goes at once: long before the stream has ended, a new request is refused.
            wait_until(lambda: "a" not in [model["id"] for model in http.get("/v1/models").json()["data"]])
            body = {"model": "a", "prompt": prompt, "max_tokens": 1}
            assert http.post("/v1/completions", json=body).status_code == 404
            [draining] = http.get("/v1/loras").json()["data"]
            assert not unloading.done(), "the unload is answered although the stream goes on"
        tokens = streaming.result(WAIT_S)
        assert unloading.result(WAIT_S) == 200

    assert (draining["name"], draining["is_serving"], draining["num_running_requests"]) == ("a", False, 1)
    assert tokens == expected
    assert len(tokens) == 200
    assert http.get("/v1/loras").json()["data"] == []
    assert "a" not in [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert page_counts(http) == before


def test_forced_unload_ends_the_stream_at_once(server: HoldableServer, http: httpx.Client) -> None:
    load(http, "a", ARGON).raise_for_status()
    before = page_counts(http)
    started = threading.Event()

    def stream() -> list[int]:
        with server.http() as client:
            return stream_tokens(client, "a", prompt_of(20, seed=9), started)

    with ThreadPoolExecutor(2) as threads:
        with server.steps(3):
            streaming = threads.submit(stream)
            assert started.wait(WAIT_S)
            unloading = threads.submit(unload, http, "a", force=True)
            assert 0 < len(streaming.result(WAIT_S)) <= 3
        unloading.result(WAIT_S).raise_for_status()
    assert http.get("/v1/loras").json()["data"] == []
    assert page_counts(http) == before
