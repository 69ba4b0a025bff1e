"""Minutes of streams over HTTP, and then: is any answer wrong or lost, does anything grow, is anything left?

    python scripts/soak_server.py                  500 streams, 3 minutes
    python scripts/soak_server.py --smallest       60 streams, 10 seconds

A server process of its own serves the demo's model. Clients in this process hold the streams open: each asks
again as soon as it is answered. Some go away in mid-stream, some read slowly over a small socket buffer.
Meanwhile adapters are loaded, replaced in place and unloaded, with and without force. KV pages and adapter
memory are scarce: requests are preempted, pages go to the host tier and come back, adapters are evicted.

Every answer is compared, to the letter, with what the same question got before, when nothing else ran, from
the content that its `system_fingerprint` names; what the demo's model was trained for is known without
asking. The answer of a client that went away, or whose adapter was unloaded by force, must be a beginning.

In the end the streams run out, and all adapters are unloaded. It has failed (exit status 1) if an answer was
wrong, mixed, lost or ended by nobody, if memory or threads of server or engine grew after the warm-up (see
`soak/server_state.py`), if requests, adapters, pinned or adapters' KV pages or sockets are left, if the
server has counted other answers than the clients, does not end with status 0 when it is told to, or has
logged an error until then, or if something that the load should try has not happened. The last line is a
summary in JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

import aiohttp  # noqa: E402

from lora_serve.demo.paths import demo_paths  # noqa: E402
from lora_serve.demo.prompts import BASE_MODEL  # noqa: E402
from lora_serve.demo.run import serve_arguments  # noqa: E402
from lora_serve.demo.server_process import ServerProcess  # noqa: E402
from soak.adapter_changes import AdapterChanges  # noqa: E402
from soak.http_adapters import HttpAdapters, read_loras  # noqa: E402
from soak.http_streams import PATIENT, StreamReader, choose_manner  # noqa: E402
from soak.memory import find_growth, growth_of  # noqa: E402
from soak.server_answers import AnswerCheck  # noqa: E402
from soak.server_questions import Question, learn_answers  # noqa: E402
from soak.server_sizes import MUST_HAVE_HAPPENED, SCARCE, SMALLEST, Sizes  # noqa: E402
from soak.server_state import (  # noqa: E402
    BOUNDS,
    ServerProcesses,
    find_leftovers,
    num_base_pages,
)
from soak.server_summary import MUST_BE_ANSWERS, end_server, find_untried  # noqa: E402

_DRAIN_LIMIT_S = 180.0
_CLOSE_LIMIT_S = 60.0
_MORE_S = 60.0
"""How much longer than asked for the load lasts at most, where something has not happened yet."""
_TICK_S = 0.02


class Soak:
    """One server under load.

    Parameters
    ----------
    server
        Healthy.
    sizes
        How much load.
    seed
        Of all choices.
    record
        Samples go there, a line each.
    """

    def __init__(self, server: ServerProcess, sizes: Sizes, seed: int, record: TextIO) -> None:
        self._server, self._sizes, self._seed, self._record = server, sizes, seed, record
        self._processes = ServerProcesses(server.pid)
        self._choices = random.Random(seed)
        self._samples: list[dict[str, float]] = []
        self._num_open = 0
        self._is_over = False
        self.problems: list[str] = []

    async def run(self) -> dict[str, Any]:
        """Learn, load, let the streams end, check; give the summary."""
        # Operators' calls wait for drains; a kept-alive connection may be closed by the server as it is used.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=_DRAIN_LIMIT_S)
        async with aiohttp.ClientSession(self._server.url, connector=connector, timeout=timeout) as session:
            num_sockets = self._processes.num_sockets()
            self._reader = StreamReader(self._server.url, self._sizes.num_streams)
            try:
                summary = await self._run(session)
            finally:
                await self._reader.close()
            await self._check_sockets(num_sockets)
        self.problems += find_untried(summary, self._sizes)
        return {**summary, "problems": self.problems}

    async def _run(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        await self._learn(session)
        begin = time.perf_counter()
        clients = [asyncio.create_task(self._client(n)) for n in range(self._sizes.num_streams)]
        self._changes.load_all()
        await self._watch(begin, self._sizes.seconds)
        load_s = time.perf_counter() - begin
        self._is_over = True
        _, late = await asyncio.wait(clients, timeout=_DRAIN_LIMIT_S)
        for client in late:
            client.cancel()
        self.problems += [f"{len(late)} streams did not end in {_DRAIN_LIMIT_S:.0f} s"] * bool(late)
        self.problems += [repr(one.exception()) for one in clients if one not in late and one.exception()]
        drain_s = time.perf_counter() - begin - load_s
        stats = await self._check_rest(session)
        self._answers.check_generations()
        growth = growth_of(self._samples, self._sizes.warm_up_s, BOUNDS)
        self.problems += find_growth(growth) + self._answers.problems + self._changes.problems
        counts = self._answers.counts
        return {
            "seconds": round(load_s, 1),
            "drain_s": round(drain_s, 1),
            "streams": self._sizes.num_streams,
            "least_open": int(min(sample["open"] for sample in self._samples[1:])),
            "answers": dict(counts),
            "slow": self._num_slow,
            "checked_characters": self._answers.num_checked_characters,
            "answers_per_s": round(counts["answered"] / load_s, 1),
            "changes": self._changes.counts,
            "stats": {name: stats[name] for name in MUST_HAVE_HAPPENED},
            "warm_up_s": self._sizes.warm_up_s,
            "memory": growth,
        }

    async def _learn(self, session: aiohttp.ClientSession) -> None:
        """Ask everything of every content while nothing else runs."""
        digests: dict[str, str] = {}
        adapters = HttpAdapters(session, digests)
        contents = {name: str(path) for name, path in demo_paths().adapters.items()}
        for name, path in contents.items():  # The demo has loaded them; this only reads what it has.
            await adapters.load(name, path)

        async def ask(question: Question, model: str) -> Any:
            return await self._reader.read(question.path, question.body(model), PATIENT)

        models = {"": BASE_MODEL, **{name: name for name in contents}}
        right = await learn_answers(ask, models, self._sizes.questions)
        for name in contents:
            await adapters.unload(name)
        self._num_learnt = len(right)
        self._adapters = HttpAdapters(session, digests)
        content_of_digest = {digests[path][:8]: name for name, path in contents.items()}
        self._answers = AnswerCheck(right, content_of_digest, self._adapters, BASE_MODEL)
        paths = list(demo_paths().adapters.values())
        num_paths = len(paths)
        self._changes = AdapterChanges(
            self._adapters,
            {
                f"team-{index}": [paths[index % num_paths], paths[(index + 1) % num_paths]]
                for index in range(self._sizes.num_names)
            },
            interval_s=self._sizes.change_interval_s,
            seed=self._seed,
            expect_aborts=lambda _: None,  # `HttpAdapters` counts them.
        )
        self._num_slow = 0

    async def _client(self, number: int) -> None:
        choices = random.Random(f"{self._seed} {number}")
        while not self._is_over:
            names = [BASE_MODEL, *self._changes.serving]
            question = choices.choice(self._sizes.questions)
            asked = self._answers.ask(question, choices.choice(names))
            manner = choose_manner(choices)
            self._num_slow += manner.pause_s > 0
            self._num_open += 1
            heard = await self._reader.read(question.path, question.body(asked.model), manner)
            self._num_open -= 1
            self._answers.take(asked, heard)

    async def _watch(self, begin: float, seconds: float) -> None:
        """Change adapters and take samples until the time is over."""
        next_sample_at = 0.0
        while True:
            at = time.perf_counter() - begin
            if at >= seconds and (self._has_tried_everything() or at >= seconds + _MORE_S):
                break
            self._changes.tick(at)
            if at >= next_sample_at:
                next_sample_at = at + self._sizes.sample_interval_s
                self._sample(at)
            await asyncio.sleep(_TICK_S)

    def _has_tried_everything(self) -> bool:
        """Whether there was some of everything; on a slow machine that may take longer than asked for."""
        answers = (self._answers.counts.get(kind, 0) for kind in MUST_BE_ANSWERS)
        return all([*answers, *self._changes.counts.values(), self._num_slow])

    def _sample(self, at_s: float) -> None:
        sample = {"at_s": round(at_s, 2), "open": self._num_open, **self._processes.sample()}
        self._samples.append(sample)
        self._record.write(json.dumps({**sample, **self._answers.counts}) + "\n")
        self._record.flush()
        sizes = " ".join(f"{name}={sample[name] / 2**20:.1f}M" for name in ("server_rss", "engine_rss"))
        counts = " ".join(f"{name}={count}" for name, count in sorted(self._answers.counts.items()))
        print(f"{at_s:7.1f} s {sizes} open={self._num_open} {counts}", flush=True)

    async def _check_rest(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """What is left without requests, and without adapters."""
        await self._end_changes()
        loras = await self._settled(session)
        self.problems += find_leftovers(loras, has_adapters=True)
        base_pages = num_base_pages(loras)
        self._changes.unload_all()
        await self._end_changes()
        loras = await self._settled(session)
        self.problems += find_leftovers(loras, has_adapters=False)
        if num_base_pages(loras) != base_pages:
            self.problems.append(
                f"without adapters {num_base_pages(loras)} KV pages (device, host) are cached, but there "
                f"were {base_pages} of the base model"
            )
        self._check_counts(await _read_finished(session))
        stats: dict[str, Any] = loras["stats"]
        return stats

    async def _end_changes(self) -> None:
        deadline = time.perf_counter() + _DRAIN_LIMIT_S
        while self._changes.num_pending and time.perf_counter() < deadline:
            self._changes.tick(0.0, may_change=False)
            await asyncio.sleep(_TICK_S)
        if self._changes.num_pending:
            self.problems.append(f"{self._changes.num_pending} changes of adapters did not end")

    async def _settled(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """What the server says as soon as aborted requests and copies have ended, or in the end."""
        deadline = time.perf_counter() + _CLOSE_LIMIT_S
        while True:
            loras = await read_loras(session)
            if not find_leftovers(loras, has_adapters=True) or time.perf_counter() > deadline:
                return loras
            await asyncio.sleep(0.1)

    def _check_counts(self, finished: dict[str, int]) -> None:
        """The server must have ended as many answers as the clients have read, and failed none."""
        counts = self._answers.counts
        least = counts["answered"] + self._num_learnt
        whole = finished.get("stop", 0) + finished.get("length", 0)
        most_aborted = counts["left"] + counts["aborted by an unload"]
        if finished.get("error", 0) or not least <= whole <= least + counts["left"]:
            self.problems.append(f"the server counts {finished}, the clients {least} answers and {counts}")
        if finished.get("abort", 0) > most_aborted:
            self.problems.append(f"the server counts {finished}, but only {most_aborted} were ended early")

    async def _check_sockets(self, num_before: int) -> None:
        deadline = time.perf_counter() + _CLOSE_LIMIT_S
        while (num_sockets := self._processes.num_sockets()) > num_before:
            if time.perf_counter() > deadline:
                self.problems.append(
                    f"the server has {num_sockets} sockets open, and had {num_before} before the load"
                )
                return
            await asyncio.sleep(0.1)


async def _read_finished(session: aiohttp.ClientSession) -> dict[str, int]:
    """Answers by how they ended, as /metrics counts them."""
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    finished: dict[str, int] = {}
    for line in lines:
        if line.startswith("vllm:request_success_total{"):
            reason = line.split('finished_reason="')[1].split('"')[0]
            finished[reason] = finished.get(reason, 0) + int(float(line.rsplit(" ", 1)[1]))
    return finished


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smallest", action="store_true", help="fewer streams, 10 seconds")
    parser.add_argument("--record", metavar="FILE", help="write the samples there, a line of JSON each")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    sizes = SMALLEST if options.smallest else Sizes()
    with ServerProcess([*serve_arguments(demo_paths()), *SCARCE]) as server:
        try:
            with open(options.record or os.devnull, "w", encoding="utf-8") as record:
                summary = asyncio.run(Soak(server, sizes, options.seed, record).run())
            summary["problems"] += end_server(server)
        except BaseException:
            print(server.log_tail(), file=sys.stderr)
            raise
    print(json.dumps(summary), flush=True)
    for problem in summary["problems"]:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
