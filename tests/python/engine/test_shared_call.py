from __future__ import annotations

import asyncio

import pytest

from lora_serve.common.errors import InternalError
from lora_serve.engine.shared_call import SharedCall


class Engine:
    """Answers a call when told, with what was true when it began."""

    def __init__(self):
        self.value = 0
        self.num_calls = self.num_running = self.most_running = 0
        self.may_answer = asyncio.Semaphore(0)
        self.error = None

    async def ask(self):
        self.num_calls += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        value = self.value
        await self.may_answer.acquire()
        self.num_running -= 1
        if self.error is not None:
            raise self.error
        return value


def run(main):
    return asyncio.run(asyncio.wait_for(main(), 60))


async def ask_together(shared, number):
    asked = [asyncio.ensure_future(shared()) for _ in range(number)]
    await asyncio.sleep(0.01)
    return asked


def test_those_who_ask_at_once_share_a_call_and_those_who_come_later_the_next_one():
    async def main():
        engine = Engine()
        shared = SharedCall(engine.ask)
        first = await ask_together(shared, 50)
        engine.value = 1
        later = await ask_together(shared, 50)
        assert engine.num_calls == 1
        engine.may_answer.release()
        assert await asyncio.gather(*first) == [0] * 50
        engine.may_answer.release()
        assert await asyncio.gather(*later) == [1] * 50, "a list older than the question would lack a load"
        assert (engine.num_calls, engine.most_running) == (2, 1)

    run(main)


def test_one_who_goes_away_ends_nobodys_call():
    async def main():
        engine = Engine()
        shared = SharedCall(engine.ask)
        first, other = await ask_together(shared, 2)
        first.cancel()
        await asyncio.sleep(0)
        engine.may_answer.release()
        assert await other == 0

    run(main)


def test_an_error_reaches_all_who_share_the_call_and_nobody_else():
    async def main():
        engine = Engine()
        shared = SharedCall(engine.ask)
        engine.error = InternalError("it has ended")
        asked = await ask_together(shared, 3)
        engine.may_answer.release()
        for one in asked:
            with pytest.raises(InternalError, match="it has ended"):
                await one
        engine.error = None
        engine.may_answer.release()
        assert await shared() == 0

    run(main)
