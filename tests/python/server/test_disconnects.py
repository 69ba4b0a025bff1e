"""Clients that go away, seen from the ASGI interface."""

from __future__ import annotations

import asyncio
import json

import pytest

from server.http_calls import BASE, make_app, make_client
from support.waiting import until


class Connection:
    """An HTTP connection that goes away on command."""

    def __init__(self, path: str, body: dict[str, object]) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict[str, object]] = []
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "scheme": "http",
            "server": ("server", 80),
            "client": ("client", 1),
            "root_path": "",
        }
        self._body = [json.dumps(body).encode()]

    async def receive(self):
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)


COMPLETION = ("/v1/completions", {"model": "sql", "prompt": ["a", "b"], "n": 2})
CHAT = ("/v1/chat/completions", {"model": "sql", "messages": [{"role": "user", "content": "a"}]})
LORAX = ("/", {"inputs": "a", "parameters": {"adapter_id": "sql"}})


def leave(path, body, client, when):
    """Serve one request, whose client goes away as soon as `when(connection)` is true."""

    async def main():
        connection = Connection(path, body)
        serving = asyncio.ensure_future(
            make_app(client)(connection.scope, connection.receive, connection.send)
        )
        await until(lambda: when(connection))
        connection.gone.set()
        await asyncio.wait_for(serving, 60)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert others == set()
        return connection

    return asyncio.run(main())


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT, LORAX])
def test_leaving_in_mid_stream_aborts_every_prompt(path, body):
    client = make_client(num_tokens_before_hold=2)
    connection = leave(path, {**body, "stream": True}, client, lambda c: len(c.sent) >= 3)
    assert client.aborted == [s.stream.request_id for s in client.submissions]
    assert client.aborted
    assert connection.sent[0]["status"] == 200
    assert all(message.get("more_body", True) for message in connection.sent)


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT, LORAX])
def test_leaving_before_a_whole_answer_aborts_every_prompt(path, body):
    client = make_client(num_tokens_before_hold=2)
    leave(path, body, client, lambda c: len(client.submissions) == len(body.get("prompt", "1")))
    assert client.aborted == [s.stream.request_id for s in client.submissions]


def test_leaving_while_one_prompt_is_not_yet_accepted_aborts_the_others():
    client = make_client(num_tokens_before_hold=0)
    submit = client.submit

    async def slow_for_b(prompt, *arguments, **options):
        if prompt == [ord("b")]:
            await asyncio.sleep(3600)
        return await submit(prompt, *arguments, **options)

    client.submit = slow_for_b
    leave(*COMPLETION, client, lambda c: len(client.submissions) == 1)
    assert client.aborted == ["r0"]


def test_leaving_before_the_first_event_is_sent_aborts_every_prompt():
    client = make_client()

    class SlowReader(Connection):
        async def send(self, message):
            self.sent.append(message)
            await asyncio.sleep(3600)

    async def main():
        path, body = COMPLETION
        connection = SlowReader(path, {**body, "stream": True})
        serving = asyncio.ensure_future(
            make_app(client)(connection.scope, connection.receive, connection.send)
        )
        await until(lambda: len(connection.sent) == 1)
        connection.gone.set()
        await asyncio.wait_for(serving, 60)

    asyncio.run(main())
    assert client.aborted == ["r0", "r1"]


def test_leaving_before_the_body_is_complete_is_quiet():
    client = make_client()

    async def main():
        connection = Connection(*COMPLETION)
        connection._body.clear()
        connection.gone.set()
        await make_app(client)(connection.scope, connection.receive, connection.send)

    asyncio.run(main())
    assert client.submissions == []


def test_a_stream_that_ends_aborts_nothing():
    client = make_client()
    connection = leave(
        "/v1/completions",
        {"model": BASE, "prompt": "a", "stream": True},
        client,
        lambda c: c.sent and not c.sent[-1].get("more_body", True),
    )
    assert client.aborted == []
    assert connection.sent[-2]["body"] == b"data: [DONE]\n\n"
