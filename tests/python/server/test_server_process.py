"""A real server whose clients go away, whose engine dies, and which is told to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time

import pytest

from lora_serve.testing.adapters import make_random_adapter
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint

WAIT_S = 60.0
MAX_TOKENS = 30_000
LONG = {"prompt": "hello", "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
COUNTS = ("num_waiting_requests", "num_running_requests", "num_private_pages")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    model = make_tiny_checkpoint(folder / "model", max_position_embeddings=2**15)
    adapter = make_random_adapter(folder / "red", model, rank=4)
    return [model, "--served-model-name", "tiny", "--lora-modules", f"red={adapter}"]


@pytest.fixture(scope="module")
def server(arguments):
    with ServerProcess(*arguments, "--drain-timeout", "120") as server:
        yield server


@pytest.fixture
def http(server):
    with server.http() as http:
        yield http


def wait_until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def maps_of(pid):
    with open(f"/proc/{pid}/maps") as file:
        return file.read()


def activity(http):
    """Requests and private pages of the engine and of the adapter 'red'."""
    body = http.get("/v1/loras").json()
    [red] = body["data"]
    return [body["stats"][key] for key in COUNTS] + [red[key] for key in COUNTS]


def num_steps(http):
    return http.get("/v1/loras").json()["stats"]["total_steps"]


def wait_until_dropped(http, first_step):
    """Until nothing is left of a request of MAX_TOKENS, which has not run to its end."""
    wait_until(lambda: activity(http) == [0] * 6)
    assert num_steps(http) - first_step < MAX_TOKENS / 2


def open_request(server, path, body):
    """Send a request over a raw connection and leave the answer unread."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    )
    return connection


def engine_of(server):
    with open(f"/proc/{server.pid}/task/{server.pid}/children") as file:
        [engine_pid] = [int(pid) for pid in file.read().split()]
    return engine_pid


def test_only_the_engine_has_torch(server, http):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert "libtorch" in maps_of(engine_of(server))
    assert "libtorch" not in maps_of(server.pid)


@pytest.mark.parametrize("resets", [False, True])
def test_leaving_in_mid_stream_frees_requests_and_pages(server, http, resets):
    body = {**LONG, "model": "red", "prompt": ["hello", "there"], "n": 2, "stream": True}
    first_step = num_steps(http)
    with open_request(server, "/v1/completions", body) as connection:
        received = b""
        while received.count(b"data: ") < 5:
            received += connection.recv(4096)
        wait_until(lambda: activity(http)[1] == activity(http)[4] == 4)
        if resets:  # RST instead of FIN, as a killed client's kernel or a cut connection may send
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_until_dropped(http, first_step)


def test_leaving_before_a_whole_answer_frees_requests_and_pages(server, http):
    body = {"model": "red", "messages": [{"role": "user", "content": "hi"}], "max_tokens": MAX_TOKENS}
    body["ignore_eos"] = True
    first_step = num_steps(http)
    with open_request(server, "/v1/chat/completions", body):
        wait_until(lambda: activity(http)[1] == 1)
    wait_until_dropped(http, first_step)


def test_an_adapter_whose_client_left_can_be_unloaded(server, http):
    with open_request(server, "/v1/completions", {**LONG, "model": "red", "stream": True}) as connection:
        connection.recv(4096)
    path = http.get("/v1/models").json()["data"][1]["root"]
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "red"}).status_code == 200
    assert http.get("/v1/loras").json()["data"] == []
    body = {"lora_name": "red", "lora_path": path}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200


def test_forced_unload_ends_a_stream_with_abort(server, http):
    path = http.get("/v1/models").json()["data"][1]["root"]
    body = {**LONG, "model": "red", "stream": True}
    reasons = []
    with http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            if not reasons:
                unload = {"lora_name": "red", "force": True}
                with server.http() as other:
                    assert other.post("/v1/unload_lora_adapter", json=unload).status_code == 200
            reasons.append(json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"])
    assert reasons[-1] == "abort"
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "red", "lora_path": path}).status_code == 200


def test_a_signal_lets_answers_end_and_then_ends_both_processes(server, http):
    """Runs after the tests that use the same server."""
    engine_pid = engine_of(server)
    body = {**LONG, "model": "tiny", "max_tokens": 400, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = []
        for line in response.iter_lines():
            if not lines:
                os.kill(server.pid, signal.SIGINT)
            lines.append(line)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert json.loads(lines[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.stop(signal.SIGTERM) == 0
    assert not os.path.exists(f"/proc/{engine_pid}")


def test_death_of_the_engine_is_told_and_the_server_ends_well(arguments):
    with ServerProcess(*arguments) as server, server.http() as http:
        engine_pid = engine_of(server)
        answers = []

        def ask():
            with server.http() as other:
                answers.append(other.post("/v1/completions", json={**LONG, "model": "tiny"}))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: activity(http)[1] == 1)
        os.kill(engine_pid, signal.SIGKILL)
        wait_until(lambda: http.get("/health").status_code == 503)
        assert "SIGKILL" in http.get("/health").json()["error"]["message"]
        asking.join(WAIT_S)
        [in_flight] = answers
        late = http.post("/v1/completions", json={**LONG, "model": "tiny"})
        for answer in (in_flight, late):
            assert answer.status_code == 500
            assert "SIGKILL" in answer.json()["error"]["message"]
        assert server.stop(signal.SIGINT) == 0


def test_a_signal_ends_what_takes_too_long_with_an_error_that_says_so(arguments):
    body = {**LONG, "model": "red"}
    answers = {}
    with ServerProcess(*arguments) as server:

        def post(name, path, body):
            with server.http() as http:
                answers[name] = http.post(path, json=body)

        def start(name, path, body):
            asking.append(threading.Thread(target=post, args=(name, path, body)))
            asking[-1].start()

        asking = []
        start("whole", "/v1/completions", body)
        start("stream", "/v1/completions", {**body, "stream": True})
        start("batch", "/v1/completions", {**body, "prompt": ["a", "b"], "stream": True})
        with server.http() as http:
            wait_until(lambda: activity(http)[1] == 4)
            start("unload", "/v1/unload_lora_adapter", {"lora_name": "red"})
            wait_until(lambda: len(http.get("/v1/models").json()["data"]) == 1)
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as upload:
            upload.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
            os.kill(server.pid, signal.SIGTERM)
            for thread in asking:
                thread.join(WAIT_S)
            answers["upload"] = upload.recv(4096)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        log = server.log()
        assert server.stop() == 0
    assert "Traceback" not in log, log
    for name in ("whole", "unload"):
        assert answers[name].status_code == 503
        assert answers[name].json()["error"]["code"] == "shutting_down"
        assert "the server is shutting down" in answers[name].json()["error"]["message"]
    for name in ("stream", "batch"):
        error, done = answers[name].text.split("\n\n")[-3:-1]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
    assert answers["upload"].startswith(b"HTTP/1.1 503 ")
