"""Adapters from a watched folder and from the hub's cache, through a real server and its engine process."""

from __future__ import annotations

import shutil
import time

import pytest

from lora.source_setup import COMMIT, make_hub_cache
from lora_serve.testing.adapters import make_random_adapter
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("sources") / "model")


def answer(http, name):
    body = {"model": name, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    return http.post("/v1/completions", json=body)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing has changed for a minute"
        time.sleep(0.02)


def test_watched_folder_is_served_as_it_changes(model, tmp_path):
    watched = tmp_path / "watched"
    make_random_adapter(watched / "sql", model, seed=1)
    options = ["--lora-dir", watched, "--lora-dir-poll-seconds", "0.05", "--lora-allowed-roots", watched]
    with ServerProcess(model, *options) as server, server.http() as http:
        first = answer(http, "sql").json()

        make_random_adapter(tmp_path / "new", model, seed=2)
        (tmp_path / "new").rename(watched / "chat")
        wait_until(lambda: answer(http, "chat").status_code == 200)

        make_random_adapter(watched / "sql", model, seed=2)
        wait_until(lambda: answer(http, "sql").json()["system_fingerprint"] != first["system_fingerprint"])
        chat, sql = answer(http, "chat").json(), answer(http, "sql").json()
        assert sql["choices"][0]["text"] == chat["choices"][0]["text"]

        shutil.rmtree(watched / "sql")
        wait_until(lambda: answer(http, "sql").status_code == 404)
        assert answer(http, "chat").status_code == 200

        (watched / "out").symlink_to(make_random_adapter(tmp_path / "outside", model))
        wait_until(lambda: "outside the allowed roots" in server.log())
        assert answer(http, "out").status_code == 404


def test_adapter_of_the_hub_is_served_and_its_cache_cannot_be_named(model, tmp_path):
    adapter = make_random_adapter(tmp_path / "adapter", model)
    snapshot = make_hub_cache(tmp_path / "cache", "org/sql", adapter)
    (tmp_path / "root").mkdir()
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    options = ["--lora-allow-hub", "--lora-allowed-roots", tmp_path / "root"]
    with (
        ServerProcess(model, "--lora-modules", "a=org/sql", *options, environment=environment) as server,
        server.http() as http,
    ):

        def load(name, path):
            return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

        assert load("b", f"hf://org/sql@{COMMIT}").status_code == 200
        texts = {answer(http, name).json()["choices"][0]["text"] for name in ("a", "b")}
        assert len(texts) == 1
        cards = {card["id"]: card["root"] for card in http.get("/v1/models").json()["data"]}
        assert cards["a"] == cards["b"] == str(snapshot)

        for path in (str(snapshot), str(adapter)):
            refused = load("c", path)
            assert refused.status_code == 400
            assert "outside the allowed roots" in refused.json()["error"]["message"]
        missing = load("c", "org/other")
        assert missing.status_code == 400
        assert "not in the local cache" in missing.json()["error"]["message"]
