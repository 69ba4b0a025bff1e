"""When an engine is started again, and what becomes of its adapters; without processes."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import cast

import pytest

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.engine.engine_client import AsyncEngineClient, LoadedAdapter
from lora_serve.engine.messages import LoadAdapterResult
from lora_serve.server.engine_supervisor import EngineSupervisor, RestartSettings
from lora_serve.server.lifecycle import Lifecycle, Phase
from server.http_calls import call, make_app, make_client
from support.waiting import until


def adapter(name, digest="d0", **fields):
    return LoadedAdapter(name, f"/adapters/{name}", False, 1.0, digest, 1)


class FakeEngine:
    """An engine that ends when told, and restarts as `outcomes` say: True, or an error."""

    def __init__(self, lifecycle, outcomes, loaded=()):
        self.lifecycle = lifecycle
        self.outcomes = list(outcomes)
        self.loaded_adapters = list(loaded)
        self.broken = {}
        self.has_failed = asyncio.Event()
        self.is_healthy = True
        self.calls = []
        self.forgotten = []
        self.reload_error = None

    def die(self):
        self.is_healthy = False
        self.has_failed.set()

    async def wait_for_failure(self):
        await self.has_failed.wait()

    async def restart(self):
        assert self.lifecycle.phase is Phase.RESTARTING
        self.calls.append("restart")
        self.loaded_adapters.clear()
        outcome = self.outcomes.pop(0)
        if outcome is not True:
            raise outcome
        self.has_failed.clear()
        self.is_healthy = True

    async def load_lora_adapter(self, name, path, *, pinned, weight):
        assert self.lifecycle.phase is Phase.RESTARTING, (
            "requests were let in before their adapters were there"
        )
        self.calls.append(name)
        if name in self.broken:
            error, dies = self.broken.pop(name)
            if dies:
                self.die()
            raise error
        return LoadAdapterResult(name=name, adapter_id=1, content_digest="d0", already_loaded=False)


def supervise(outcomes, script, loaded=(), **settings):
    """Run `script(engine, lifecycle)` beside a supervisor."""

    async def run():
        lifecycle = Lifecycle()
        engine = FakeEngine(lifecycle, outcomes, loaded)

        async def forget():
            assert lifecycle.phase is Phase.RESTARTING
            engine.forgotten.append(list(engine.calls))

        async def reload():
            engine.calls.append("reload")
            if engine.reload_error is not None:
                raise engine.reload_error

        restarts = RestartSettings(**{"max_restarts": 3, "first_pause_s": 0.0, **settings})
        supervisor = EngineSupervisor(
            cast(AsyncEngineClient, engine),
            lifecycle,
            restarts,
            # As of a path loaded on first use: nobody remembers whose it was once that is forgotten.
            is_ours=lambda adapter: adapter.name != "watched" or bool(engine.forgotten),
            forget=forget,
            reload=reload,
        )
        supervisor.start()
        await script(engine, lifecycle)
        await supervisor.close()
        await supervisor.close()
        return engine, lifecycle

    return asyncio.run(asyncio.wait_for(run(), 60))


async def die_and_come_back(engine, lifecycle):
    engine.die()
    await until(lambda: engine.calls[-1:] == ["reload"] and lifecycle.phase is Phase.SERVING)


async def die_for_good(engine, lifecycle):
    engine.die()
    await until(lambda: lifecycle.has_given_up)


def test_adapters_are_loaded_again_before_requests_are_let_in():
    loaded = [adapter("red"), adapter("watched"), adapter("blue")]
    engine, lifecycle = supervise([True], die_and_come_back, loaded)
    assert engine.calls == ["restart", "red", "blue", "reload"]
    assert lifecycle.why_not_serving() is None


def test_what_others_had_loaded_is_forgotten_before_the_new_engine_starts_and_never_taken_for_ours():
    loaded = [adapter("red"), adapter("watched")]
    engine, _ = supervise([InternalError("no memory"), True], die_and_come_back, loaded)
    assert engine.calls == ["restart", "restart", "red", "reload"]
    assert engine.forgotten == [[], ["restart"]]


def test_a_failed_start_is_tried_again_up_to_the_limit():
    failures = [InternalError("no memory"), OSError("no process"), InternalError("no memory")]
    engine, lifecycle = supervise(failures, die_for_good)
    assert engine.calls == ["restart"] * 3
    assert lifecycle.phase is Phase.SERVING, "the engine's own failure answers from now on"


def test_without_restarts_it_is_given_up_at_once():
    engine, _ = supervise([], die_for_good, max_restarts=0)
    assert engine.calls == []


def test_an_engine_that_has_served_for_long_has_all_its_tries_again():
    async def script(engine, lifecycle):
        for _ in range(4):
            engine.calls.clear()
            await die_and_come_back(engine, lifecycle)

    engine, lifecycle = supervise([True] * 4, script, max_restarts=1, reset_s=0.0)
    assert not lifecycle.has_given_up
    assert not engine.outcomes


def test_an_engine_that_ends_again_at_once_is_given_up():
    async def script(engine, lifecycle):
        await die_and_come_back(engine, lifecycle)
        await die_for_good(engine, lifecycle)

    engine, _ = supervise([True, True], script, max_restarts=1)
    assert engine.outcomes == [True]


def test_an_adapter_that_cannot_be_loaded_again_is_named_and_the_others_are_loaded(caplog):
    async def script(engine, lifecycle):
        engine.broken["red"] = (InvalidArgumentError("its folder is gone"), False)
        await die_and_come_back(engine, lifecycle)

    with caplog.at_level(logging.WARNING):
        engine, _ = supervise([True], script, [adapter("red"), adapter("blue", digest="other")])
    assert engine.calls == ["restart", "red", "blue", "reload"]
    assert "adapter 'red' is lost" in caplog.text
    assert "adapter 'blue' has another content" in caplog.text


@pytest.mark.parametrize("error", [InternalError("no folder"), OSError("no folder")])
@pytest.mark.parametrize("what", ["load", "reload"])
def test_an_engine_that_is_healthy_serves_even_if_something_beside_it_fails(what, error, caplog):
    async def script(engine, lifecycle):
        if what == "load":
            engine.broken["red"] = (error, False)
        else:
            engine.reload_error = error
        await die_and_come_back(engine, lifecycle)

    engine, lifecycle = supervise([True], script, [adapter("red"), adapter("blue")])
    assert engine.calls == ["restart", "red", "blue", "reload"]
    assert lifecycle.why_not_serving() is None
    assert "no folder" in caplog.text


def test_an_engine_that_ends_while_adapters_are_loaded_again_forgets_none_of_them():
    async def script(engine, lifecycle):
        engine.broken["red"] = (InternalError("it has ended"), True)
        engine.die()
        await until(lambda: "red" in engine.calls)
        await until(lambda: engine.calls[-1] == "reload")

    engine, _ = supervise([True, True], script, [adapter("red"), adapter("blue")])
    assert engine.calls == ["restart", "red", "restart", "red", "blue", "reload"]


def test_a_drain_is_not_ended_by_a_restart():
    lifecycle = Lifecycle()
    lifecycle.begin_restart()
    lifecycle.begin_drain()
    lifecycle.end_restart()
    assert lifecycle.why_not_serving().code == "draining"


BODIES_OF_THE_OLD_ENGINE = [
    ("/v1/completions", {"model": "sql", "prompt": "hi"}),
    ("/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "lora_path": ["sql", None], "stream": True}),
    ("/v1/chat/completions", {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}),
    ("/generate", {"inputs": "hi", "parameters": {"adapter_id": "sql"}}),
    ("/tokenize", {"model": "sql", "prompt": "hi"}),
    ("/v1/unload_lora_adapter", {"lora_name": "sql"}),
]


@pytest.mark.parametrize("is_draining", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "ends_in"),
    [
        *((*request, "body") for request in BODIES_OF_THE_OLD_ENGINE),
        *((*request, "submit") for request in BODIES_OF_THE_OLD_ENGINE[:4]),
    ],
)
def test_a_request_that_was_on_its_way_when_the_engine_ended_is_503_while_adapters_are_missing(
    path, body, ends_in, is_draining, caplog
):
    client = make_client()
    app = make_app(client)
    lifecycle = app.state.context.lifecycle

    def end_engine():
        lifecycle.begin_restart()
        if is_draining:
            lifecycle.begin_drain()
        client.adapters.clear()

    async def pieces():
        yield json.dumps(body)[:5].encode()
        if ends_in == "body":
            end_engine()
        yield json.dumps(body)[5:].encode()

    submit = client.submit

    async def submit_after_the_end(*arguments, **options):
        end_engine()
        return await submit(*arguments, **options)

    client.submit = submit_after_the_end
    response = call(app, "POST", path, content=pieces())
    assert response.status_code == 503, response.text
    assert "is being started again" in response.text
    assert int(response.headers["retry-after"]) > 0
    assert f"POST {path}: ended with 503: the engine's process has ended" in caplog.text


def test_a_negative_number_of_restarts_is_refused():
    with pytest.raises(InvalidArgumentError, match="--max-engine-restarts is -1"):
        RestartSettings(max_restarts=-1)
