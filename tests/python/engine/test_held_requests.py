"""Requests whose form is being compiled: they wait as all others do, and can be ended."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import AdapterNotFoundError, CapacityError, QueueTimeoutError
from lora_serve.common.queueing import MAX_QUEUE_TIMEOUT_S, Queueing
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.common.structured_outputs import StructuredOutputsParams
from lora_serve.engine.engine_client import AsyncEngineClient
from support.tiny_checkpoint import write_byte_tokenizer

PLAIN = SamplingParams(max_tokens=2, temperature=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Takes up to two requests that wait; yields a client and what runs on its loop."""
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path)
    config = EngineConfig(
        model=str(path), page_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_queued_requests=2
    )
    loop = asyncio.new_event_loop()
    factory = "support.oracle_engine:make_oracle_with_endless_forms"
    client = AsyncEngineClient(config, executor_factory=factory)

    def run(coroutine):
        return loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    run(client.start())
    yield client, run
    run(client.close())
    loop.close()


def endless(**fields):
    form = StructuredOutputsParams(regex=f"endless{fields.pop('name', '')}")
    return SamplingParams(max_tokens=2, temperature=0, structured_outputs=form, **fields)


@contextlib.asynccontextmanager
async def held(client, params, **options):
    """A submission that waits for its form."""
    task = asyncio.ensure_future(client.submit([1, 2, 3], params, **options))
    await client.stats()  # The engine has read what came before.
    assert not task.done()
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await client.stats()


@pytest.mark.parametrize("num_answers", [1, 2])
def test_aborting_a_request_that_waits_for_its_form_ends_its_stream(engine, num_answers):
    client, run = engine

    async def main():
        ended = []
        client.observe = lambda *arguments: ended.append(arguments)
        try:
            async with held(client, endless(n=num_answers), request_id="mine") as task:
                await client.abort("mine")
                output = await (await task).collect()
        finally:
            client.observe = None
        assert [answer.finish_reason for answer in output.outputs] == ["abort"] * num_answers
        assert ended == [], "nobody watches what has ended already"

    run(main())


def test_a_request_fails_when_its_time_is_over_while_its_form_is_compiled(engine):
    client, run = engine

    async def main():
        with pytest.raises(QueueTimeoutError, match=r"queue_timeout of 0\.05 seconds") as refusal:
            await client.submit([1], endless(), queueing=Queueing(timeout_s=0.05))
        assert refusal.value.retry_after_s is not None

    run(main())


def test_the_longest_time_that_a_request_may_wait_for_its_form_does_not_end_the_engine(engine):
    client, run = engine

    async def main():
        async with held(client, endless(), queueing=Queueing(timeout_s=MAX_QUEUE_TIMEOUT_S)):
            output = await (await client.submit([1], PLAIN)).collect()
            assert output.outputs[0].finish_reason == "length"
            assert (await client.stats()).num_waiting_requests == 1

    run(main())


def test_requests_that_wait_for_their_forms_count_among_those_that_wait(engine):
    client, run = engine

    async def main():
        refused_before = (await client.stats()).total_rejected_requests
        async with held(client, endless()), held(client, endless(name="2")):
            for params in (PLAIN, endless(name="3"), endless()):
                with pytest.raises(CapacityError, match="3 queued requests; max_queued_requests is 2"):
                    await client.submit([1], params)
            stats = await client.stats()
            assert stats.total_rejected_requests == refused_before + 3
            assert (stats.num_waiting_requests, stats.num_queued_requests, stats.num_queued_tokens) == (
                2,
                2,
                6,
            )
        output = await (await client.submit([1], PLAIN)).collect()
        assert output.outputs[0].finish_reason == "length"

    run(main())


def test_more_answers_than_can_ever_wait_and_unknown_adapters_are_refused_before_anything_is_compiled(engine):
    client, run = engine

    async def main():
        with pytest.raises(CapacityError, match="can never be accepted"):
            await client.submit([1], endless(n=3))
        with pytest.raises(AdapterNotFoundError):
            await client.submit([1], endless(), lora_name="nobody")

    run(main())
