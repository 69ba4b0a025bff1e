from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import msgspec
import pytest

from lora_serve.common.errors import (
    AdapterConflictError,
    AdapterSourceError,
    CapacityError,
    InvalidArgumentError,
)
from lora_serve.server.autoload import MAX_LOADS, AdapterAutoloader
from lora_serve.server.settings import AutoloadSettings
from server.fake_engine_client import FakeEngineClient, adapter_info
from server.http_calls import BASE, call, chat, complete, make_app, make_client
from support.waiting import until

ANYWHERE = AutoloadSettings(max_adapters=2, allow_local=True, allow_hub=True)


class SlowLoads(FakeEngineClient):
    """Loads last until `may_end` is set."""

    def __post_init__(self):
        super().__post_init__()
        self.may_end = asyncio.Event()

    async def load_lora_adapter(self, name, path, **options):
        self.operations.append(("begin", name))
        await self.may_end.wait()
        return await super().load_lora_adapter(name, path, **options)


def paths_of(client, kind):
    return [operation[1] for operation in client.operations if operation[0] == kind]


def set_requests(client, name, number):
    client.adapters[name] = msgspec.structs.replace(client.adapters[name], num_running_requests=number)


async def post(app, path, body):
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        return await http.post(path, json=body)


def generate(app, **parameters):
    return call(app, "POST", "/generate", json={"inputs": "hello", "parameters": parameters})


def test_without_the_option_a_path_is_404_and_says_which_option():
    client = make_client()
    response = complete(make_app(client), lora_path="/adapters/new")
    assert response.status_code == 404
    assert "--lora-autoload" in response.json()["error"]["message"]
    assert generate(make_app(client), adapter_id="/adapters/new").status_code == 404
    assert client.operations == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda app, path: complete(app, lora_path=path),
        lambda app, path: complete(app, model=f"{BASE}:{path}"),
        lambda app, path: chat(app, lora_path=path),
        lambda app, path: generate(app, adapter_id=path),
    ],
)
@pytest.mark.parametrize("path", ["/adapters/new", "org/new@main", "hf://org/new", "s3://bucket/new"])
def test_path_is_loaded_on_first_use_only(ask, path):
    client = make_client()
    app = make_app(client, autoload=ANYWHERE)
    for _ in range(2):
        assert ask(app, path).status_code == 200
    assert client.operations == [("load", path, path, False, False, 1.0)]
    assert [submission.lora_name for submission in client.submissions] == [path, path]


def test_each_prompt_of_a_batch_gets_its_own_path():
    client = make_client()
    names = ["a/b", None, "sql", "a/c", "a/b"]
    app = make_app(client, autoload=ANYWHERE)
    response = complete(app, prompt=["x"] * 5, lora_path=names, max_tokens=9)
    assert [choice["text"] for choice in response.json()["choices"]] == [f"{n or 'base'}!" for n in names]
    assert sorted(paths_of(client, "load")) == ["a/b", "a/c"]


@pytest.mark.parametrize("name", ["nobody", "org/a\nb", "o/" + "a" * 300])
def test_what_cannot_be_a_path_is_not_loaded(name):
    client = make_client()
    assert complete(make_app(client, autoload=ANYWHERE), lora_path=name).status_code == 404
    assert client.operations == []


def test_model_alone_and_the_base_models_own_name_load_nothing():
    client = make_client()
    app = make_app(client, autoload=ANYWHERE)
    assert complete(app, model="org/name").status_code == 404
    app = make_app(client, autoload=ANYWHERE)
    app.state.context.autoloader._served_model_name = "org/base"
    assert complete(app, lora_path="org/base").status_code == 404
    assert client.operations == []


@pytest.mark.parametrize(
    ("allowed", "paths"),
    [
        (AutoloadSettings(), ["hf://org/a", "s3://b/a"]),
        (AutoloadSettings(allow_hub=True), ["hf://org/a", "s3://b/a", "org/a"]),
        (
            AutoloadSettings(allow_local=True),
            ["hf://org/a", "s3://b/a", "org/a", "/a", "../a", "~/a", "a/b/c"],
        ),
    ],
)
def test_only_where_local_paths_are_allowed_are_they_tried(allowed, paths):
    client = make_client()
    app = make_app(client, autoload=allowed)
    for path in ["hf://org/a", "s3://b/a", "org/a", "/a", "../a", "~/a", "a/b/c"]:
        assert complete(app, lora_path=path).status_code == (200 if path in paths else 404)
    assert paths_of(client, "load") == paths


@pytest.mark.parametrize(
    ("source", "path", "status"),
    [
        ("hub", "org/a", 200),
        ("hub", "/a", 404),
        ("local", "/a", 200),
        ("local", "org/a", 404),
        ("s3", "s3://b/a", 200),
        ("s3", "/a", 404),
    ],
)
def test_adapter_source_must_be_what_the_id_means(source, path, status):
    app = make_app(autoload=ANYWHERE)
    assert generate(app, adapter_id=path, adapter_source=source).status_code == status
    assert generate(app, adapter_id="sql", adapter_source=source).status_code == 200


def test_paths_that_lead_nowhere_have_one_answer():
    bodies = []
    for reason in ("/x is outside the allowed roots", "/x does not exist", "/x/y is a file"):
        client = make_client()
        client.load_error = AdapterSourceError(reason)
        response = complete(make_app(client, autoload=ANYWHERE), lora_path="/x")
        assert response.status_code == 404
        bodies.append(response.json())
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0]["error"]["param"] == "lora_path"
    assert "outside" not in bodies[0]["error"]["message"]


@pytest.mark.parametrize(
    ("error", "statuses"),
    [
        (InvalidArgumentError("rank 128 is above 64"), (400, 422)),
        (AdapterConflictError("cancelled"), (409, 409)),
        (CapacityError("no room"), (429, 429)),
    ],
)
def test_adapter_that_is_there_and_refused_says_why(error, statuses):
    client = make_client()
    client.load_error = error
    app = make_app(client, autoload=ANYWHERE)
    response = complete(app, model=f"{BASE}:a/b")
    assert (response.status_code, response.json()["error"]["message"]) == (statuses[0], str(error))
    response = generate(app, adapter_id="a/b")
    assert (response.status_code, response.json()["error"]) == (statuses[1], str(error))


def test_concurrent_first_uses_share_one_load():
    async def main():
        client = SlowLoads()
        app = make_app(client, autoload=ANYWHERE)
        body = {"model": BASE, "prompt": "x", "lora_path": "a/b"}
        requests = [asyncio.create_task(post(app, "/v1/completions", body)) for _ in range(5)]
        await until(lambda: client.operations == [("begin", "a/b")])
        requests[0].cancel()  # Whoever was first may go; the load goes on for the others.
        await asyncio.sleep(0.01)
        client.may_end.set()
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert [answer.status_code for answer in answers[1:]] == [200] * 4
        assert client.operations == [("begin", "a/b"), ("load", "a/b", "a/b", False, False, 1.0)]

    asyncio.run(main())


def test_queue_timeout_counts_while_the_adapter_is_loaded_and_the_load_goes_on():
    async def main():
        client = SlowLoads()
        app = make_app(client, autoload=ANYWHERE)
        body = {"model": BASE, "prompt": "x", "lora_path": "a/b"}
        late = await post(app, "/v1/completions", {**body, "queue_timeout": 0.01})
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "queue_timeout"
        assert late.headers["Retry-After"] == "1"
        client.may_end.set()
        assert (await post(app, "/v1/completions", body)).status_code == 200
        assert paths_of(client, "begin") == ["a/b"]

    asyncio.run(main())


def test_least_recently_used_makes_way_and_operators_adapters_stay():
    client = make_client()
    app = make_app(client, autoload=ANYWHERE)
    for path in ("a/1", "a/2", "a/1", "a/3"):
        assert complete(app, lora_path=path).status_code == 200
    assert paths_of(client, "unload") == ["a/2"]
    assert set(client.adapters) == {"sql", "law", "a/1", "a/3"}
    assert complete(app, lora_path="a/2").status_code == 200
    assert paths_of(client, "unload") == ["a/2", "a/1"]


def test_adapter_that_requests_use_stays_and_without_a_place_it_is_429():
    client = make_client()
    app = make_app(client, autoload=ANYWHERE)
    for path in ("a/1", "a/2"):
        complete(app, lora_path=path)
    set_requests(client, "a/1", 1)
    assert complete(app, lora_path="a/3").status_code == 200
    assert paths_of(client, "unload") == ["a/2"]
    set_requests(client, "a/3", 1)
    full = complete(app, lora_path="a/4")
    assert full.status_code == 429
    assert "--lora-autoload-max" in full.json()["error"]["message"]
    assert int(full.headers["Retry-After"]) >= 1
    assert generate(app, adapter_id="a/4").json()["error_type"] == "overloaded"
    assert set(client.adapters) == {"sql", "law", "a/1", "a/3"}


def test_adapter_whose_request_is_not_yet_known_to_the_engine_stays():
    async def main():
        client = make_client()
        autoloader = AdapterAutoloader(client, replace(ANYWHERE, max_adapters=1), BASE)
        with autoloader.using("a/1"):
            await autoloader.load("a/1")
            with pytest.raises(CapacityError):
                await autoloader.load("a/2")
        assert list(client.adapters) == ["sql", "law", "a/1"]
        await autoloader.load("a/2")
        assert list(client.adapters) == ["sql", "law", "a/2"]

    asyncio.run(main())


def test_path_that_leads_nowhere_costs_nobody_an_adapter():
    client = make_client()
    app = make_app(client, autoload=ANYWHERE)
    for path in ("a/1", "a/2"):
        complete(app, lora_path=path)
    client.load_error = AdapterSourceError("nothing there")
    for path in ("b/1", "b/2"):
        assert complete(app, lora_path=path).status_code == 404
    assert paths_of(client, "unload") == []


def test_many_loads_at_once_leave_no_more_than_may_stay():
    async def main():
        client = SlowLoads()
        autoloader = AdapterAutoloader(client, ANYWHERE, BASE)
        loads = [asyncio.create_task(autoloader.load(f"a/{i}")) for i in range(7)]
        await until(lambda: len(paths_of(client, "begin")) >= MAX_LOADS)
        await asyncio.sleep(0.02)  # No more begin.
        assert len(paths_of(client, "begin")) == MAX_LOADS
        client.may_end.set()
        await asyncio.gather(*loads)
        assert len(client.adapters) == 2
        assert len(paths_of(client, "load")) == 7

    asyncio.run(main())


@pytest.mark.parametrize("is_during_the_load", [False, True])
def test_adapter_that_an_operator_loads_too_is_the_operators(is_during_the_load):
    async def main():
        client = SlowLoads()
        autoloader = AdapterAutoloader(client, replace(ANYWHERE, max_adapters=1), BASE)
        loading = asyncio.create_task(autoloader.load("a/1"))
        await until(lambda: paths_of(client, "begin") == ["a/1"])
        if is_during_the_load:
            autoloader.disown("a/1")  # The engine lets the operator's load join this one, and answers both.
        client.may_end.set()
        await loading
        if not is_during_the_load:
            autoloader.disown("a/1")
        await autoloader.load("a/2")
        assert set(client.adapters) == {"a/1", "a/2"}
        await autoloader.load("a/3")
        assert set(client.adapters) == {"a/1", "a/3"}

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/loras"])
def test_operators_loads_are_noticed_in_every_dialect(path):
    client = make_client()
    app = make_app(client, autoload=replace(ANYWHERE, max_adapters=1))
    complete(app, lora_path="a/1")
    body = {"lora_name": "a/1"}
    body.update({"source": {"uri": "a/1"}} if path == "/v1/loras" else {"lora_path": "a/1"})
    assert call(app, "POST", path, json=body).status_code == 200
    complete(app, lora_path="a/2")
    assert paths_of(client, "unload") == []


def test_generation_that_somebody_has_replaced_is_not_unloaded_even_while_it_is_used():
    client = make_client()
    app = make_app(client, autoload=replace(ANYWHERE, max_adapters=1))
    complete(app, lora_path="a/1")
    client.adapters["a/1"] = adapter_info("a/1", 77)
    set_requests(client, "a/1", 1)
    assert complete(app, lora_path="a/2").status_code == 200
    assert paths_of(client, "unload") == []


def test_adapter_that_an_operator_has_unloaded_is_loaded_again():
    client = make_client()
    app = make_app(client, autoload=replace(ANYWHERE, max_adapters=1))
    complete(app, lora_path="a/1")
    assert call(app, "POST", "/v1/unload_lora_adapter", json={"lora_name": "a/1"}).status_code == 200
    for path in ("a/1", "a/2"):
        assert complete(app, lora_path=path).status_code == 200
    assert paths_of(client, "load") == ["a/1", "a/1", "a/2"]
    assert paths_of(client, "unload") == ["a/1", "a/1"]
