"""Limits on requests at once, their ids, and what is answered where nobody has caught an error."""

from __future__ import annotations

import asyncio
import logging
import resource

import httpx
import pytest

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server.api_keys import KeyEntry
from lora_serve.server.current_request import current_request_id
from lora_serve.server.limits import RESERVED_FILES, ServerLimits, make_room
from server.http_calls import BASE, call, make_app, make_client
from support.waiting import until

BODY = {"model": BASE, "prompt": "hi"}


def run(app, script):
    async def main():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return await script(http)

    return asyncio.run(asyncio.wait_for(main(), 60))


def post(http, key="one"):
    return http.post("/v1/completions", json=BODY, headers={"Authorization": f"Bearer {key}"})


def held_app(limits, **keys):
    """An application whose answers wait until `release` is set."""
    client = make_client()
    release = asyncio.Event()
    real_submit = client.submit
    client.num_waiting = 0

    async def submit(*arguments, **options):
        client.num_waiting += 1
        await release.wait()
        return await real_submit(*arguments, **options)

    client.submit = submit
    app = make_app(client, limits=limits, **(keys or {"api_keys": ("one", "two")}))
    return app, client, release


def test_requests_beyond_the_limit_of_a_key_are_refused_and_those_of_others_are_not():
    app, client, release = held_app(ServerLimits(max_concurrent_requests_per_key=2))

    async def script(http):
        held = [asyncio.create_task(post(http)) for _ in range(2)]
        await until(lambda: client.num_waiting == 2)
        refused = await post(http)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        listing = await http.get("/v1/models", headers={"Authorization": "Bearer one"})
        assert listing.status_code == 200, "only requests for tokens count"
        held.append(asyncio.create_task(post(http, "two")))
        await until(lambda: client.num_waiting == 3)
        release.set()
        assert [response.status_code for response in await asyncio.gather(*held)] == [200] * 3
        assert (await post(http)).status_code == 200, "places of requests that have ended are free"

    run(app, script)


def test_requests_beyond_the_limit_of_all_keys_are_refused():
    app, client, release = held_app(ServerLimits(max_concurrent_requests=1))

    async def script(http):
        held = asyncio.create_task(post(http))
        await until(lambda: client.num_waiting == 1)
        assert (await post(http, "two")).status_code == 429
        held.cancel()  # Its client goes away.
        await asyncio.gather(held, return_exceptions=True)
        release.set()
        assert (await post(http, "two")).status_code == 200

    run(app, script)


def test_two_keys_of_one_name_share_a_limit():
    entries = [KeyEntry(name="acme", key=key, adapters=["sql"]) for key in ("one", "two")]
    limits = ServerLimits(max_concurrent_requests_per_key=1)
    app, client, release = held_app(limits, key_entries=tuple(entries))

    async def script(http):
        held = asyncio.create_task(post(http, "one"))
        await until(lambda: client.num_waiting == 1)
        refused = await post(http, "two")
        release.set()
        assert (refused.status_code, (await held).status_code) == (429, 200)
        assert "this API key has 1 requests at once" in refused.text, "a tenant may know its own limit"

    run(app, script)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_concurrent_requests": -1}, "--max-concurrent-requests is -1"),
        ({"max_connections": -1}, "--max-connections is -1"),
        ({"header_timeout_s": 0.0}, "--header-timeout is 0"),
        ({"body_timeout_s": float("nan")}, "--body-timeout is nan"),
    ],
)
def test_limits_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ServerLimits(**fields)


def test_room_for_connections_stays_within_the_limit_on_open_files(monkeypatch):
    limits = [(1024, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _which, limit: limits.append(limit))
    room = make_room(0)
    assert room.max_connections + room.backlog + RESERVED_FILES <= 1024
    with pytest.raises(InvalidArgumentError, match=r"--max-connections is 1000 but .* 1024"):
        make_room(1000)
    limits.append((1024, 1 << 20))
    assert make_room(20_000).max_connections == 20_000
    assert limits[-1][0] >= 20_000


# --- Ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/health"])
def test_a_clients_id_is_echoed(path):
    response = call(make_app(), "GET", path, headers={"X-Request-Id": "trace-1:a.b/c"})
    assert response.headers["x-request-id"] == "trace-1:a.b/c"


@pytest.mark.parametrize("shown", [None, "", "a b", "x" * 129, "a\tb", b"\xff", "<script>"])
def test_an_id_that_is_none_is_replaced(shown):
    headers = {} if shown is None else {"X-Request-Id": shown}
    first, second = (
        call(make_app(), "GET", "/version", headers=headers).headers["x-request-id"] for _ in range(2)
    )
    assert len(first) == 32
    assert first != second


def test_refusals_have_an_id_too():
    response = call(make_app(api_keys=("key",)), "GET", "/v1/models", headers={"X-Request-Id": "abc"})
    assert (response.status_code, response.headers["x-request-id"]) == (401, "abc")


def test_the_id_is_there_wherever_the_request_is_served():
    client = make_client()
    seen = []

    async def submit(*_arguments, **_options):
        seen.append(current_request_id())
        raise InvalidArgumentError("no")

    client.submit = submit
    call(make_app(client), "POST", "/v1/completions", json=BODY, headers={"X-Request-Id": "abc"})
    assert seen == ["abc"]
    assert current_request_id() is None


def test_an_error_that_nobody_expects_is_answered_without_its_text(caplog):
    client = make_client()

    async def submit(*_arguments, **_options):
        raise RuntimeError("a secret of the server")

    client.submit = submit
    headers = {"X-Request-Id": "abc"}
    with caplog.at_level(logging.ERROR):
        response = call(make_app(client), "POST", "/v1/completions", json=BODY, headers=headers)
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "abc"
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "a secret of the server" in caplog.text
