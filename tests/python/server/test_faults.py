"""What clients, disks and threads do wrong, and what a real server makes of it; see this folder's README."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import time
from pathlib import Path

import pytest

import support.faults
from lora_serve.testing.adapters import make_random_adapter
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint

MAX_CONNECTIONS = 40
WAIT_S = 60.0
COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def model(folder):
    return make_tiny_checkpoint(folder / "model", max_position_embeddings=512)


@pytest.fixture(scope="module")
def server(model, folder):
    faults = str(Path(support.faults.__path__[0]))
    paths = os.pathsep.join([faults, *(path for path in os.sys.path if path)])
    options = ["--served-model-name", "tiny", "--header-timeout", "1", "--body-timeout", "1"]
    options += ["--max-connections", str(MAX_CONNECTIONS), "--max-body-bytes", str(1 << 20)]
    environment = {"LORA_SERVE_TEST_FAULT": str(folder / "fault"), "PYTHONPATH": paths}
    with ServerProcess(model, *options, environment=environment) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_broken_afterwards(server):
    yield
    with server.http() as http:
        assert http.get("/health").status_code == 200
        assert http.post("/v1/completions", json=COMPLETION).status_code == 200


@contextlib.contextmanager
def fault(folder, kind):
    path = folder / "fault"
    path.write_text(kind)
    try:
        yield
    finally:
        path.unlink()


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)


def read_to_end(connection):
    """Everything up to the other side's close, however it closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def head(length, path="/v1/completions"):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


# --- Adapters that cannot be read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        ("exception", 500, "planted in the loader's thread"),
        ("ENOSPC", 400, "No space left on device"),
        ("EIO", 400, "Input/output error"),
    ],
)
def test_a_load_that_fails_in_its_thread_is_answered_and_can_be_repeated(
    server, folder, model, kind, status, message
):
    path = make_random_adapter(folder / kind, model, rank=4)
    body = {"lora_name": kind, "lora_path": str(path)}
    with server.http() as http:
        with fault(folder, kind):
            refused = http.post("/v1/load_lora_adapter", json=body)
        assert (refused.status_code, message in refused.text) == (status, True), refused.text
        assert "Traceback" not in refused.text
        assert http.post("/v1/completions", json={**COMPLETION, "model": kind}).status_code == 404
        assert http.get("/v1/loras").json()["data"] == []
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert http.post("/v1/completions", json={**COMPLETION, "model": kind}).status_code == 200
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": kind}).status_code == 200


# --- Requests that never end --------------------------------------------------------------------------------


def test_half_a_body_is_answered_with_408_and_closed(server):
    with connect(server) as connection:
        connection.sendall(head(100) + b'{"model": "tiny", ')
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


def test_a_body_that_trickles_is_cut_off_all_the_same(server):
    begin_s = time.monotonic()
    with connect(server) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(head(10_000))
        while time.monotonic() - begin_s < WAIT_S:
            connection.sendall(b" ")
            time.sleep(0.1)
    assert time.monotonic() - begin_s < WAIT_S / 2


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(server):
    for _ in range(20):
        with connect(server) as connection:
            connection.sendall(head(100) + b"{")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET / HTTP/1.1\r\nHost: x\r\nX: "])
def test_a_connection_without_whole_headers_is_closed(server, sent):
    with connect(server) as connection:
        connection.sendall(sent)
        assert read_to_end(connection) == b""


def test_the_next_request_of_a_kept_connection_must_come_whole_too(server):
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /hea")
        assert b"HTTP" not in read_to_end(connection), "half a request was answered"


def test_a_request_that_takes_longer_than_both_time_outs_is_answered(server):
    body = {**COMPLETION, "max_tokens": 400, "ignore_eos": True, "n": 8, "prompt": ["a", "b"]}
    with server.http() as http:
        begin_s = time.monotonic()
        while time.monotonic() - begin_s < 1.5:
            assert http.post("/v1/completions", json=body).status_code == 200


# --- Too much -----------------------------------------------------------------------------------------------


def test_a_body_of_100_mb_is_refused_and_its_end_not_waited_for(server):
    with connect(server) as connection:
        connection.sendall(head(100_000_000))
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(bytes(1_000_000))
        answer = read_to_end(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413 ")
    assert server_rss_mib(server) < 2000


def test_a_client_that_sends_its_100_mb_before_it_reads_gets_413(server):
    with server.http() as http:
        response = http.post("/v1/completions", content=bytes(100_000_000))
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


def server_rss_mib(server):
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def leave_open(server, num_connections):
    """Open connections that say nothing, and ask on another one after each tenth of them."""
    with contextlib.ExitStack() as left_open:
        for index in range(num_connections):
            left_open.enter_context(connect(server))
            if index % (num_connections // 10) == 0:
                with server.http() as http:
                    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
        with server.http() as http:
            assert http.get("/health").status_code == 200
            return len(os.listdir(f"/proc/{server.pid}/fd"))


def test_connections_that_are_opened_and_left_do_not_keep_others_out(server):
    before = len(os.listdir(f"/proc/{server.pid}/fd"))
    assert leave_open(server, 10 * MAX_CONNECTIONS) <= before + MAX_CONNECTIONS + 5


@pytest.mark.slow
def test_ten_thousand_connections_that_are_left_do_not_keep_others_out(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 12_000:
        pytest.skip(f"this machine allows {hard} open files, 12,000 are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 12_000), hard))
    leave_open(server, 10_000)


def test_busy_connections_are_not_closed_for_newcomers(server):
    body = json.dumps({**COMPLETION, "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    with contextlib.ExitStack() as opened:
        busy = []
        for _ in range(8):  # Each asks at once: the time for its headers is short.
            busy.append(opened.enter_context(connect(server)))
            busy[-1].sendall(head(len(body)) + body)
        for connection in busy:
            assert connection.recv(12) == b"HTTP/1.1 200"
        for _ in range(3 * MAX_CONNECTIONS):
            opened.enter_context(connect(server))
        for connection in busy:
            received = b""
            while b"[DONE]" not in received:
                chunk = connection.recv(65536)
                assert chunk, "a stream was cut off"
                received += chunk


# --- Nonsense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        head(15) + b'{"model": "\xff\xfe"}',
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-\xff: 1\r\n\r\n",
        b"\x00\x01\x02\x03\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 1_000_000 + b"\r\n\r\n",
    ],
)
def test_malformed_bytes_are_answered_with_400(server, sent):
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert b"Traceback" not in answer


@pytest.mark.parametrize("path", ["/%ff%fe", "/v1/models/%ff", "/%00"])
def test_paths_that_are_no_text_are_answered_with_404(server, path):
    with connect(server) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert read_to_end(connection).startswith(b"HTTP/1.1 404 ")
