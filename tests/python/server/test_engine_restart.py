"""A server whose engine's process ends by itself, with and without --restart-engine; and one that drains."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time

import pytest

from lora_serve.testing.adapters import make_random_adapter
from support.holdable_server import HoldableServer
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint

LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 30_000, "temperature": 0, "ignore_eos": True}
WEIGHTS = "adapter_model.safetensors"
SHORT = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("restart")


@pytest.fixture(scope="module")
def model(folder):
    return make_tiny_checkpoint(folder / "model", max_position_embeddings=2**15)


def engine_of(server):
    with open(f"/proc/{server.pid}/task/{server.pid}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    return children[-1] if children else None


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def answer(http, name):
    response = http.post("/v1/completions", json={**SHORT, "model": name})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


class Stream:
    """A stream that a thread reads."""

    def __init__(self, server):
        self.events = []
        self.thread = threading.Thread(target=self._read, args=(server,))
        self.thread.start()
        wait_until(lambda: self.events)

    def _read(self, server):
        with (
            server.http() as http,
            http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as got,
        ):
            for line in got.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))

    def wait_for_its_end(self):
        self.thread.join(60)
        assert not self.thread.is_alive(), "the stream does not end"


def test_an_engine_that_is_killed_comes_back_with_its_adapters(model, folder):
    red, blue = (
        make_random_adapter(folder / name, model, rank=4, seed=seed)
        for seed, name in enumerate(["red", "blue"])
    )
    watched = folder / "watched"
    make_random_adapter(watched / "green", model, rank=4, seed=7)
    options = ["--served-model-name", "tiny", "--lora-modules", f"red={red}", "--restart-engine"]
    options += ["--lora-dir", watched, "--lora-dir-poll-seconds", "0.1"]
    options += ["--log-format", "json", "--log-requests"]
    with HoldableServer(model, *options) as server, server.http() as http:
        body = {"lora_name": "blue", "lora_path": str(blue), "pinned": True}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        # The watched folder's, by another spelling of its path.
        body = {"lora_name": "green", "lora_path": f"{watched}/./green", "pinned": True, "weight": 2.5}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        before = {name: answer(http, name) for name in ("tiny", "red", "blue", "green")}
        stream = Stream(server)
        with server.engine_start_held():
            os.kill(engine_of(server), signal.SIGKILL)

            # Before the next engine is there: in-flight requests have failed, probes and newcomers are told.
            wait_until(lambda: http.get("/health/ready").status_code == 503)
            stream.wait_for_its_end()
            error, done = stream.events[-2:]
            assert "SIGKILL" in json.loads(error)["error"]["message"]
            assert done == "[DONE]"
            refused = http.post("/v1/completions", json={**SHORT, "model": "red"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
            assert int(refused.headers["retry-after"]) > 0
            assert http.get("/health/live").status_code == 200

        # Never 404 meanwhile: what was loaded is not said to have never been there.
        statuses = set()
        while http.get("/health/ready").status_code == 503:
            statuses.add(http.post("/v1/completions", json={**SHORT, "model": "green"}).status_code)
        assert statuses <= {503, 200}
        assert {name: answer(http, name) for name in before} == before
        shown = http.get("/v1/loras").json()["data"]
        assert {info["name"]: (info["pinned"], info["weight"]) for info in shown} == {
            "red": (False, 1.0),
            "blue": (True, 1.0),
            "green": (True, 2.5),
        }
        # The watched folder still owns what it had loaded.
        (watched / "green").rename(folder / "elsewhere")
        wait_until(lambda: http.post("/v1/completions", json={**SHORT, "model": "green"}).status_code == 404)
        http.get("/health/live")  # the 404's line is written once that is answered, so before this is
        check_log(server.log())
        assert server.stop() == 0


def test_an_adapter_whose_folder_was_changed_is_gone_and_does_not_come_back_with_the_engine(model, folder):
    first, second, changed = (
        make_random_adapter(folder / name, model, rank=4, seed=seed)
        for seed, name in enumerate(["first", "second", "changed"])
    )
    room_gb = repr(1.5 * os.path.getsize(first / WEIGHTS) / 2**30)  # For one of them.
    options = ["--served-model-name", "tiny", "--lora-modules", f"first={first}", f"second={second}"]
    options += ["--lora-memory-gb", room_gb, "--lora-host-memory-gb", room_gb, "--restart-engine"]
    with ServerProcess(model, *options) as server, server.http() as http:
        before = {name: answer(http, name) for name in ("first", "second")}
        os.replace(changed / WEIGHTS, first / WEIGHTS)
        refused = http.post("/v1/completions", json={**SHORT, "model": "first"})
        assert (refused.status_code, "the folder was changed" in refused.text) == (409, True), refused.text

        def assert_only_the_second_serves():
            shown = [card["id"] for card in http.get("/v1/models").json()["data"]]
            assert sorted(shown) == ["second", "tiny"]
            assert http.post("/v1/completions", json={**SHORT, "model": "first"}).status_code == 404
            assert answer(http, "second") == before["second"]

        assert_only_the_second_serves()
        os.kill(engine_of(server), signal.SIGKILL)
        wait_until(lambda: http.get("/health/ready").status_code == 503)
        wait_until(lambda: http.get("/health/ready").status_code == 200)
        assert_only_the_second_serves()
        assert server.stop() == 0


def check_log(log):
    """Every line of both processes, also of the one that was killed, is JSON; requests have theirs."""
    lines = [json.loads(line) for line in log.splitlines() if not line.startswith("lora-serve: serving")]
    assert {line["process"] for line in lines} == {"server", "engine"}
    assert len({line["pid"] for line in lines}) == 3, "the server and two engines"
    requests = [line for line in lines if line["logger"] == "lora_serve.access"]
    assert {200, 404, 503} <= {line["status"] for line in requests}
    assert all(line["request_id"] and line["caller"] == "anybody" for line in requests)


@pytest.mark.slow
def test_an_engine_that_cannot_come_back_is_given_up_and_liveness_says_so(folder):
    model = make_tiny_checkpoint(folder / "lost", max_position_embeddings=512)
    options = ["--served-model-name", "tiny", "--restart-engine", "--max-engine-restarts", "2"]
    with ServerProcess(model, *options) as server, server.http() as http:
        os.rename(os.path.join(model, "config.json"), os.path.join(model, "gone"))
        os.kill(engine_of(server), signal.SIGKILL)
        wait_until(lambda: http.get("/health/live").status_code == 503)
        for path in ("/health", "/health/ready"):
            assert http.get(path).json()["error"]["code"] == "engine_stopped"
        assert http.post("/v1/completions", json={**SHORT, "model": "tiny"}).status_code == 500
        assert server.log().count("starting the engine again") == 2
        assert server.stop() == 0


def test_a_server_that_drains_ends_its_streams_and_sends_newcomers_away(model):
    body = {**LONG, "max_tokens": 50, "stream": True}
    with HoldableServer(model, "--served-model-name", "tiny", "--drain-timeout", "120") as server:
        with server.http() as http, contextlib.ExitStack() as held, server.http() as other:
            held.enter_context(server.steps(3))
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                os.kill(server.pid, signal.SIGTERM)
                wait_until(lambda: other.get("/health").status_code == 503)
                assert other.get("/health").json()["error"]["code"] == "draining"
                assert other.get("/health/ready").status_code == 503
                assert other.get("/health/live").status_code == 200
                refused = other.post("/v1/completions", json={**SHORT, "model": "tiny"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                assert int(refused.headers["retry-after"]) > 0
                held.close()
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=60)
        assert server.stop() == 0


@pytest.mark.slow
def test_a_second_signal_ends_a_drain(model):
    with ServerProcess(model, "--served-model-name", "tiny", "--drain-timeout", "600") as server:
        stream = Stream(server)
        os.kill(server.pid, signal.SIGTERM)
        with server.http() as http:
            wait_until(lambda: http.get("/health").status_code == 503)
        assert stream.thread.is_alive()
        os.kill(server.pid, signal.SIGTERM)
        stream.wait_for_its_end()
        assert json.loads(stream.events[-2])["error"]["code"] == "shutting_down"
        assert server.stop() == 0
