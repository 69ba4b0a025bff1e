from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    InternalError,
    InvalidArgumentError,
)
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine import wire
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.engine.messages import LoadAdapterResult, UnloadAdapterResult
from lora_serve.testing.oracle_tokens import oracle_tokens
from support.tiny_checkpoint import VOCAB_SIZE, write_byte_tokenizer

WAIT_S = 60.0
PROMPT = list(range(40))
LONG = 400  # Tokens of an answer that a test does not wait for.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path)
    return str(path)


def make_client(model, factory="make_slow_oracle"):
    config = EngineConfig(model=model, page_size=4, max_num_seqs=8, max_num_batched_tokens=64)
    return AsyncEngineClient(config, executor_factory=f"support.oracle_engine:{factory}")


class Engine:
    """One client for several tests, on one event loop."""

    def __init__(self, model):
        self.loop = asyncio.new_event_loop()
        self.client = make_client(model)
        self.run(self.client.start())

    def run(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, WAIT_S))

    def close(self):
        self.run(self.client.close())
        self.loop.close()


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model)
    yield engine
    engine.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, WAIT_S))


async def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not await condition():
        assert time.monotonic() < deadline, "the condition was not met"
        await asyncio.sleep(0.01)


async def is_idle(client):
    stats = await client.stats()
    return stats.num_running_requests == stats.num_waiting_requests == 0


async def assert_idle_before_its_end(client):
    """The engine dropped a request of LONG tokens: it comes to rest in far fewer steps than that."""
    first_step = (await client.stats()).total_steps
    await until(lambda: is_idle(client))
    stats = await client.stats()
    assert stats.total_steps - first_step < LONG / 2
    assert stats.num_private_pages == 0


def params(max_tokens=6, **fields):
    return SamplingParams(max_tokens=max_tokens, temperature=0, **fields)


def tokens_of(deltas):
    return [token_id for delta in deltas for token_id in delta.outputs[0].token_ids]


# --- Serving ----------------------------------------------------------------------------------------------


def test_model_info_tells_the_limits(engine):
    info = engine.client.model_info
    assert (info.max_model_len, info.vocab_size, info.page_size, info.num_device_pages) == (
        512,
        VOCAB_SIZE,
        4,
        128,
    )
    assert engine.client.is_healthy
    assert engine.client.failure is None


def test_streams_of_many_requests_carry_the_tokens_of_a_run_alone(engine):
    async def main():
        client = engine.client
        streams = [await client.submit(PROMPT[n:], params(12, n=2), request_id=f"r{n}") for n in range(4)]
        return await asyncio.gather(*[stream.collect() for stream in streams])

    for n, output in enumerate(engine.run(main())):
        assert output.request_id == f"r{n}"
        assert output.finished
        assert [answer.token_ids for answer in output.outputs] == [
            oracle_tokens(0, PROMPT[n:], 12, VOCAB_SIZE)
        ] * 2
        assert [answer.finish_reason for answer in output.outputs] == ["length"] * 2


def test_deltas_joined_are_the_answer(engine):
    async def main():
        stream = await engine.client.submit("some text", params(20))
        deltas = [delta async for delta in stream]
        whole = await (await engine.client.submit("some text", params(20))).collect()
        return stream, deltas, whole

    stream, deltas, whole = engine.run(main())
    assert stream.prompt == "some text"
    assert stream.prompt_token_ids == engine.client.tokenizer.encode("some text")
    assert len(deltas) > 5
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert tokens_of(deltas) == whole.outputs[0].token_ids
    assert "".join(delta.outputs[0].text for delta in deltas) == whole.outputs[0].text
    assert whole.num_cached_tokens == 8


def test_generate_gives_the_same_deltas_in_one_call(engine):
    async def main():
        return [delta async for delta in engine.client.generate(PROMPT, params(5))]

    deltas = engine.run(main())
    assert tokens_of(deltas) == oracle_tokens(0, PROMPT, 5, VOCAB_SIZE)


def test_stop_string_ends_the_request_in_the_engine_too(engine):
    async def main():
        whole = await (await engine.client.submit("abc", params(30))).collect()
        text = whole.outputs[0].text
        stop = text[10:12]
        output = await (await engine.client.submit("abc", params(LONG, stop=stop))).collect()
        await assert_idle_before_its_end(engine.client)
        return text, stop, output.outputs[0]

    text, stop, answer = engine.run(main())
    assert answer.text == text[: text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert len(answer.token_ids) < 30


@pytest.mark.parametrize(
    ("prompt", "fields", "error"),
    [
        (PROMPT, {"lora_name": "nope"}, AdapterNotFoundError),
        ([], {}, InvalidArgumentError),
        ([VOCAB_SIZE], {}, InvalidArgumentError),
        ("x" * 512, {}, InvalidArgumentError),
        ("half a pair \ud800", {}, InvalidArgumentError),
        (PROMPT, {"lora_name": "\ud800"}, InvalidArgumentError),
    ],
)
def test_bad_request_is_refused_before_a_stream_exists(engine, prompt, fields, error):
    with pytest.raises(error):
        engine.run(engine.client.submit(prompt, params(), **fields))
    assert engine.run(is_idle(engine.client))


def test_request_id_in_use_is_refused_and_free_again_afterwards(engine):
    async def main():
        stream = await engine.client.submit(PROMPT, params(30), request_id="mine")
        with pytest.raises(InvalidArgumentError, match="'mine' is in use"):
            await engine.client.submit(PROMPT, params(), request_id="mine")
        await stream.collect()
        await (await engine.client.submit(PROMPT, params(), request_id="mine")).collect()

    engine.run(main())


@pytest.mark.parametrize(("name", "path"), [("\ud800", "/a"), ("a", "/\ud800"), ("a", "/\0")])
def test_adapter_name_or_path_that_no_message_can_carry_is_refused(engine, name, path):
    with pytest.raises(InvalidArgumentError, match="valid Unicode"):
        engine.run(engine.client.load_lora_adapter(name, path))
    assert engine.client.is_healthy


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "\ud800"}], [5]])
def test_messages_that_cannot_be_rendered_are_refused(engine, messages):
    with pytest.raises(InvalidArgumentError):
        engine.run(engine.client.encode_chat(messages))


def test_text_that_cannot_fit_is_refused_without_being_tokenised(engine, monkeypatch):
    def encode(*_, **__):
        raise AssertionError("the text was tokenised")

    text = "x" * (512 * len("<|endoftext|>"))
    monkeypatch.setattr(engine.client._encoder_tokenizer.backend, "encode", encode)
    for call in (
        engine.client.submit(text, params()),
        engine.client.encode(text, add_special_tokens=False),
        engine.client.encode_chat([{"role": "user", "content": text}]),
    ):
        with pytest.raises(InvalidArgumentError, match=r"characters but max_model_len is 512.*at most 6643"):
            engine.run(call)


# --- Aborts -----------------------------------------------------------------------------------------------


def test_abort_ends_the_stream_with_the_reason(engine):
    async def main():
        stream = await engine.client.submit(PROMPT, params(LONG, n=2), request_id="long")
        await stream.__anext__()
        await engine.client.abort("long")
        await engine.client.abort("long")
        output = await stream.collect()
        await assert_idle_before_its_end(engine.client)
        return output

    output = engine.run(main())
    assert output.finished
    assert [answer.finish_reason for answer in output.outputs] == ["abort", "abort"]


@pytest.mark.parametrize("how", ["aclose", "async_with", "cancel_reader", "close_generator"])
def test_leaving_a_stream_early_aborts_in_the_engine(engine, how):
    async def main():
        client = engine.client
        if how == "close_generator":
            generator = client.generate(PROMPT, params(LONG, n=2))
            await generator.__anext__()
            await generator.aclose()
        else:
            stream = await client.submit(PROMPT, params(LONG, n=2))
            await stream.__anext__()
            if how == "aclose":
                await stream.aclose()
            elif how == "async_with":
                async with stream:
                    await stream.__anext__()
            else:
                task = asyncio.create_task(stream.collect())
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        await assert_idle_before_its_end(client)
        assert client._streams == {}

    engine.run(main())


def test_cancelled_submit_leaves_nothing_running(engine):
    async def main():
        tasks = [
            asyncio.create_task(engine.client.submit(PROMPT, params(LONG), request_id=f"c{n}"))
            for n in range(5)
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await assert_idle_before_its_end(engine.client)
        assert engine.client._streams == {}

    engine.run(main())


# --- Adapters ---------------------------------------------------------------------------------------------


def test_adapter_goes_through_its_life_over_the_wire(engine):
    async def main():
        client = engine.client
        loads = await asyncio.gather(*[client.load_lora_adapter("a", "/a") for _ in range(3)])
        assert {load.adapter_id for load in loads} == {loads[0].adapter_id}
        with pytest.raises(AdapterConflictError):
            await client.load_lora_adapter("a", "/b")
        stream = await client.submit(PROMPT, params(30), lora_name="a")
        assert stream.adapter_id == loads[0].adapter_id
        assert stream.content_digest == loads[0].content_digest
        unload = asyncio.create_task(client.unload_lora_adapter("a"))
        await until(lambda: is_serving_nothing(client))
        with pytest.raises(AdapterNotFoundError):
            await client.submit(PROMPT, params(), lora_name="a")
        output = await stream.collect()
        assert output.adapter_id == stream.adapter_id
        assert output.lora_name == "a"
        assert output.outputs[0].token_ids == oracle_tokens(stream.adapter_id, PROMPT, 30, VOCAB_SIZE)
        assert (await unload).adapter_ids == [stream.adapter_id]
        assert await client.list_lora_adapters() == []
        with pytest.raises(AdapterNotFoundError):
            await client.unload_lora_adapter("a")

    async def is_serving_nothing(client):
        return not any(info.is_serving for info in await client.list_lora_adapters())

    engine.run(main())


def test_an_adapter_that_cannot_be_brought_back_is_no_loaded_one_any_more(model):
    async def main():
        async with make_client(model, "make_forgetful_oracle") as client:
            for name in ("a", "b"):
                await client.load_lora_adapter(name, f"/{name}")
            await (await client.submit(PROMPT, params(), lora_name="b")).collect()
            lost = await client.submit(PROMPT, params(), lora_name="a")
            with pytest.raises(InternalError, match="'a' could not be brought to the device"):
                await lost.collect()
            assert [adapter.name for adapter in client.loaded_adapters] == ["b"]
            serving = [info.name for info in await client.list_lora_adapters() if info.is_serving]
            assert serving == ["b"]
            again = await client.load_lora_adapter("a", "/a")
            assert {adapter.name: adapter.adapter_id for adapter in client.loaded_adapters} == {
                "b": 2,
                "a": again.adapter_id,
            }

    run(main())


def test_an_unload_that_overtakes_the_answer_of_a_load_leaves_nothing_loaded(model):
    class Connection:
        """The load is answered while the unload is under way."""

        is_loaded = asyncio.Event()

        async def call(self, make_message, _kind):
            message = make_message(0)
            if isinstance(message, wire.LoadAdapter):
                await self.is_loaded.wait()
                return LoadAdapterResult(
                    name=message.name, adapter_id=7, content_digest="", already_loaded=False
                )
            self.is_loaded.set()
            await load
            return UnloadAdapterResult(name=message.name, adapter_ids=[7])

    async def main():
        nonlocal load
        client = make_client(model)
        client._connection = Connection()
        load = asyncio.create_task(client.load_lora_adapter("a", "/a"))
        await client.unload_lora_adapter("a")
        assert client.loaded_adapters == []

    load = None
    run(main())


def test_long_list_of_adapters_is_made_while_others_are_served(engine):
    async def main():
        client = engine.client
        names = [f"many-{number}" for number in range(70)]
        await asyncio.gather(*(client.load_lora_adapter(name, f"/{name}") for name in names))
        stream = await client.submit(PROMPT, params(20))
        lists = await asyncio.gather(client.list_lora_adapters(), client.list_lora_adapters())
        output = await stream.collect()
        idle = await client.list_lora_adapters()
        await asyncio.gather(*(client.unload_lora_adapter(name) for name in names))
        return names, [[info.name for info in infos] for infos in (*lists, idle)], output

    names, lists, output = engine.run(main())
    assert [sorted(found) for found in lists] == [sorted(names)] * 3
    assert output.outputs[0].token_ids == oracle_tokens(0, PROMPT, 20, VOCAB_SIZE)
    assert output.queue_s is not None


def test_deltas_name_the_generation_also_when_they_arrive_together_with_the_admission(engine):
    async def main():
        client = engine.client
        load = await client.load_lora_adapter("late", "/late")
        submission = asyncio.create_task(client.submit(PROMPT[:8], params(3), lora_name="late"))
        await asyncio.sleep(0)
        time.sleep(0.3)  # Nothing is read meanwhile; a step takes 0.02 s.
        deltas = [delta async for delta in await submission]
        await client.unload_lora_adapter("late")
        return load.adapter_id, [delta.adapter_id for delta in deltas]

    adapter_id, ids_of_deltas = engine.run(main())
    assert len(ids_of_deltas) == 3
    assert set(ids_of_deltas) == {adapter_id}


def test_forced_unload_ends_streams_with_abort(engine):
    async def main():
        await engine.client.load_lora_adapter("f", "/f")
        stream = await engine.client.submit(PROMPT, params(LONG), lora_name="f")
        await stream.__anext__()
        await engine.client.unload_lora_adapter("f", force=True)
        return await stream.collect()

    assert engine.run(main()).outputs[0].finish_reason == "abort"


def test_idle_engine_sleeps(engine):
    pid = engine.client._connection.pid
    engine.run(until(lambda: is_idle(engine.client)))

    def cpu_ticks():
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    before = cpu_ticks()
    time.sleep(1.0)
    assert cpu_ticks() - before <= 0.2 * os.sysconf("SC_CLK_TCK")


def test_idle_engine_wakes_for_a_finished_read(engine):
    async def main():
        await until(lambda: is_idle(engine.client))
        await engine.client.load_lora_adapter("wake", "/wake")
        await engine.client.unload_lora_adapter("wake")

    engine.run(main())


# --- Ends -------------------------------------------------------------------------------------------------


def test_after_a_restart_only_what_was_loaded_since_is_loaded(model):
    async def main():
        async with make_client(model) as client:
            for name in ("a", "b"):
                await client.load_lora_adapter(name, f"/{name}")
            os.kill(client._connection.pid, signal.SIGKILL)
            await client.wait_for_failure()
            assert [adapter.name for adapter in client.loaded_adapters] == ["a", "b"]
            await client.restart()
            assert client.loaded_adapters == []
            await client.load_lora_adapter("b", "/b")
            assert [adapter.name for adapter in client.loaded_adapters] == ["b"]

    run(main())


def test_killed_process_fails_everything_in_flight(model):
    async def main():
        async with make_client(model) as client:
            await client.load_lora_adapter("a", "/a")
            stream = await client.submit(PROMPT, params(LONG), lora_name="a")
            await stream.__anext__()
            unload = asyncio.create_task(client.unload_lora_adapter("a"))
            collect = asyncio.create_task(stream.collect())
            await asyncio.sleep(0.1)
            os.kill(client._connection.pid, signal.SIGKILL)
            for task in (unload, collect):
                with pytest.raises(InternalError, match=r"has ended \(killed by SIGKILL\)"):
                    await task
            assert not client.is_healthy
            assert "SIGKILL" in client.failure
            for call in (
                client.stats(),
                client.submit(PROMPT, params()),
                client.load_lora_adapter("b", "/b"),
            ):
                with pytest.raises(InternalError, match="has ended"):
                    await call

    run(main())


def test_broken_step_fails_everybody_with_the_reason_and_ends_the_process(model):
    async def main():
        async with make_client(model, "make_breaking_oracle") as client:
            streams = [await client.submit(PROMPT, params(LONG)) for _ in range(2)]
            for stream in streams:
                with pytest.raises(InternalError, match="the third shared step broke"):
                    await stream.collect()
            await until(lambda: asyncio.sleep(0, not client.is_healthy))
            assert "the third shared step broke" in client.failure
            with pytest.raises(InternalError, match="the third shared step broke"):
                await client.stats()

    run(main())


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        ("refuse_to_start", InvalidArgumentError, "cannot be served; try another"),
        ("crash_at_start", InternalError, "OSError: the disk is on fire"),
        ("die_at_start", InternalError, "exit code 7"),
    ],
)
def test_failure_at_start_is_carried_to_the_caller(model, factory, error, message):
    async def main():
        client = make_client(model, factory)
        with pytest.raises(error, match=message):
            await client.start()
        assert not client.is_healthy
        with pytest.raises(InternalError):
            await client.stats()
        await client.close()

    run(main())


def test_model_without_a_tokenizer_is_refused_at_start(tmp_path):
    async def main():
        client = make_client(str(tmp_path))
        with pytest.raises(InvalidArgumentError, match="tokenizer"):
            await client.start()

    run(main())


def test_close_fails_what_is_in_flight_and_ends_the_process(model):
    async def main():
        client = make_client(model)
        await client.start()
        pid = client._connection.pid
        stream = await client.submit(PROMPT, params(LONG))
        await client.close()
        await client.close()
        with pytest.raises(InternalError, match="closed"):
            await stream.collect()
        return pid

    pid = run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_client_that_was_not_started_says_so(model):
    async def main():
        client = make_client(model)
        with pytest.raises(InternalError, match="was not started"):
            await client.stats()
        await client.close()

    run(main())


PARENT = """
import asyncio, os, sys
from engine.test_engine_client import LONG, PROMPT, make_client, params
async def main():
    client = make_client(sys.argv[1])
    await client.start()
    stream = await client.submit(PROMPT, params(LONG))
    print(client._connection.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_end_of_the_parent_ends_the_engine(model):
    paths = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, model], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    with parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + WAIT_S
    while is_running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError("the engine outlived its parent")
        time.sleep(0.01)


def is_running(pid):
    """False also for a process that has ended and waits for somebody to ask."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
