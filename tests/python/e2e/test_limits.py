"""A server with limits under more load than it takes: refusals that say when to come back, nothing lost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_serve.testing.adapters import make_random_adapter
from support.holdable_server import HoldableServer
from support.tiny_checkpoint import make_tiny_checkpoint

NUM_CLIENTS = 12
MAX_QUEUED = 3
WAIT_S = 60.0
LONG = {"prompt": "Once upon a time", "max_tokens": 100, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    model = make_tiny_checkpoint(folder / "model")
    modules = [
        f"{name}={make_random_adapter(folder / name, model, rank=4, seed=seed)}"
        for seed, name in enumerate("abc")
    ]
    with HoldableServer(
        model,
        *("--served-model-name", "tiny", "--max-model-len", 192, "--num-device-pages", 64),
        *("--max-num-seqs", 1, "--max-queued-requests", MAX_QUEUED, "--max-loras", 2),
        *("--lora-memory-gb", 110_000 / 2**30),  # Two of them.
        *("--lora-modules", *modules),
    ) as server:
        yield server


@pytest.fixture
def http(server):
    with server.http() as http:
        yield http


def stats(http):
    return http.get("/v1/loras").json()["stats"]


def stats_when(http, condition):
    """The server's counts as soon as they are as a condition wants them."""
    deadline = time.monotonic() + WAIT_S
    while not condition(now := stats(http)):
        assert time.monotonic() < deadline, f"it did not happen in time: {now}"
        time.sleep(0.01)
    return now


def until_idle(http):
    return stats_when(http, lambda now: now["num_running_requests"] + now["num_waiting_requests"] == 0)


def test_each_request_is_answered_or_refused_with_a_time_to_come_back(server, http):
    before = until_idle(http)
    bodies = [
        {**LONG, "model": ["tiny", "a", "b", "c"][i % 4], "stream": i % 3 == 0} for i in range(NUM_CLIENTS)
    ]
    num_refused = NUM_CLIENTS - MAX_QUEUED
    total = before["total_rejected_requests"] + num_refused
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        with server.steps(0):
            asked = [pool.submit(http.post, "/v1/completions", json=body) for body in bodies]
            stats_when(http, lambda now: now["total_rejected_requests"] == total)
        answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(refused) == num_refused
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert "max_queued_requests is 3" in answer.json()["error"]["message"]
    for answer in answers:
        if answer.status_code == 200:
            assert '"finish_reason":"length"' in answer.text
    after = until_idle(http)
    assert after["total_rejected_requests"] - before["total_rejected_requests"] == len(refused)
    assert after["total_finished_requests"] - before["total_finished_requests"] == NUM_CLIENTS - len(refused)
    assert after["num_private_pages"] == 0


def test_answers_that_never_fit_are_refused_without_a_time(http):
    until_idle(http)
    answer = http.post("/v1/completions", json={**LONG, "model": "tiny", "n": 4})
    assert answer.status_code == 429
    assert "retry-after" not in answer.headers
    assert "--max-queued-requests 4" in answer.json()["error"]["message"]
    assert stats(http)["num_waiting_requests"] == 0


def test_request_that_waits_too_long_is_503_and_the_one_before_it_is_answered(server, http):
    total = until_idle(http)["total_steps"] + 3
    with ThreadPoolExecutor(2) as pool:
        with server.steps(3):
            one = pool.submit(http.post, "/v1/completions", json={**LONG, "model": "a"})
            stats_when(http, lambda now: now["num_running_requests"] == 1 and now["total_steps"] >= total)
            body = {**LONG, "model": "b", "queue_timeout": 0.01}
            two = pool.submit(http.post, "/v1/completions", json=body)
            stats_when(http, lambda now: now["num_waiting_requests"] == 1)
            time.sleep(0.02)  # Longer than it may wait.
        long, late = one.result(), two.result()
    assert long.status_code == 200
    assert late.status_code == 503
    assert int(late.headers["retry-after"]) >= 1
    assert "queue_timeout of 0.01 seconds" in late.json()["error"]["message"]
    assert until_idle(http)["total_expired_requests"] >= 1


def test_adapters_come_and_go_and_are_shown(http):
    until_idle(http)
    for name in ("a", "b", "c", "a"):
        assert http.post("/v1/completions", json={**LONG, "model": name, "max_tokens": 4}).status_code == 200
    body = http.get("/v1/loras").json()
    shown = {entry["name"]: entry for entry in body["data"]}
    assert sum(entry["tier"] == "device" for entry in shown.values()) == 2
    assert body["tiers"]["device"]["num_adapters"] == 2
    for entry in shown.values():
        assert entry["total_loads"] >= 1
        assert entry["total_queue_us"] > 0
        assert (entry["pinned"], entry["is_closed"], entry["load_failed"]) == (False, False, False)
    assert body["stats"]["num_adapter_bytes"] == 2 * shown["a"]["num_bytes"]
    assert body["stats"]["total_adapter_evictions"] >= 1


def test_pin_beyond_the_memory_is_refused_with_numbers(http, server):
    paths = {entry["name"]: entry["path"] for entry in http.get("/v1/loras").json()["data"]}

    def load(name, pinned):
        body = {"lora_name": name, "lora_path": paths[name], "pinned": pinned}
        return http.post("/v1/load_lora_adapter", json=body)

    assert load("a", True).status_code == 200
    refused = load("b", True)
    assert refused.status_code == 429
    assert "retry-after" not in refused.headers
    assert "adapter 'b' is refused" in refused.json()["error"]["message"]
    assert load("a", False).status_code == 200
