"""The metrics of a real server, with a real engine, which dies."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from engine.kv_event_router import Router
from lora_serve.testing.adapters import make_random_adapter
from server.metric_samples import Samples
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    model = make_tiny_checkpoint(folder / "model")
    adapter = make_random_adapter(folder / "red", model, rank=4)
    events = {
        "enable_kv_cache_events": True,
        "endpoint": f"ipc://{folder}/events",
        "replay_endpoint": f"ipc://{folder}/replay",
    }
    arguments = ["--kv-events-config", json.dumps(events)]
    arguments += ["--served-model-name", "tiny", "--lora-modules", f"red={adapter}", "--page-size", "4"]
    with ServerProcess(model, *arguments) as server:
        server.events = events
        yield server


def scrape(http):
    return Samples.parse(http.get("/metrics").raise_for_status().text)


def test_a_router_hears_of_an_adapters_pages(server):
    router = Router(server.events["endpoint"], server.events["replay_endpoint"])
    with server.http() as http:
        body = {"model": "red", "prompt": [7] * 8, "max_tokens": 1, "temperature": 0}
        http.post("/v1/completions", json=body).raise_for_status()
        deadline = time.monotonic() + 60
        while len(router.pages["GPU"]) < 2:
            assert time.monotonic() < deadline
            router.catch_up()
    router.close()
    assert {event.lora_name for event in router.pages["GPU"].values()} == {"red"}
    assert [token for event in router.events[1:] for token in event.token_ids] == [7] * 8


def test_metrics_follow_requests_and_outlive_the_engine(server):
    with server.http() as http:
        before = scrape(http)
        assert before.one("vllm:lora_adapter_loaded", adapter_name="red", rank="4", level="device") == 1
        body = {"model": "red", "prompt": [5] * 9, "max_tokens": 7, "temperature": 0, "ignore_eos": True}
        for _ in range(2):
            http.post("/v1/completions", json=body).raise_for_status()
        time.sleep(0.6)  # What the engine said before is shown for half a second.
        after = scrape(http)
        for name, count in (
            ("vllm:generation_tokens_total", 14),
            ("vllm:prompt_tokens_total", 18),
            ("vllm:prefix_cache_queries_total", 18),
            ("vllm:prefix_cache_hits_total", 8),  # Two whole pages.
            ("vllm:request_queue_time_seconds_count", 2),
        ):
            assert after.one(name) - before.one(name) == count
        assert after.one("vllm:kv_cache_usage_perc") == 0  # What is cached can go.
        assert after.one("lora_serve:kv_pages", tier="device", state="cached") > 0
        assert after.one("lora_serve:adapter_generation_tokens_total", adapter_name="red") >= 14
        assert after.one("lora_serve:steps_total") >= 14
        assert after.one("lora_serve:kv_event_batches_total") >= 3
        assert after.one("lora_serve:kv_event_batches_dropped_total") == 0
        with open(f"/proc/{server.pid}/task/{server.pid}/children") as file:
            [engine_pid] = [int(pid) for pid in file.read().split()]
        os.kill(engine_pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while http.get("/health").status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        dead = scrape(http)
        assert dead.one("lora_serve:engine_up") == 0
        for name in ("vllm:generation_tokens_total", "vllm:prefix_cache_hits_total"):
            assert dead.one(name) == after.one(name)
        assert dead.all("vllm:num_requests_running") == []
