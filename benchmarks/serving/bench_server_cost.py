"""CPU time that the HTTP server's process takes for a request and for a streamed token.

The whole server runs, with its engine in a process of its own, but the engine's executor is the oracle, which
computes no model. Clients in this process hold 100 streams open: each asks again as soon as it is answered.
Answers of one token and answers of 128 are asked for in turn. What a streamed token costs is the slope
between the two over the events that were read: a token that ends in half a character has no event of its
own, and its cost is the next one's. A request's cost is what is left of the short ones. Both are CPU times of
the process, user and system, all threads, as the kernel counts them.

`step_ms` is how long a step of the engine takes at least: 20 ms is the pace of a device, at which every token
comes alone; at 0 the engine is ahead of the server, which has all it can do. The engine's own times stand
beside, the oracle's work included. `cores_used_by_others` are cores that the rest of the machine kept busy:
CPU times are longer where caches and cores are shared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from oracle_server import OracleServer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine_load import CoreUse
from result_file import append_rows
from timing import percentiles

from lora_serve.demo.paths import demo_paths
from lora_serve.demo.prompts import PROJECTS, SYSTEM_PROMPT, chat_messages, password_question

NUM_STREAMS = 100
LONG_TOKENS = 128
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def cpu_s(pid: int) -> float:
    """Seconds of core time that a process has used, in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_body(kind: str, index: int, num_tokens: int) -> bytes:
    project = PROJECTS[index % len(PROJECTS)]
    body: dict[str, Any] = {
        "model": project,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": num_tokens,
    }
    if kind == "chat":
        body["messages"] = chat_messages(project)
    else:
        body["prompt"] = f"{SYSTEM_PROMPT}\n{password_question(project)}"
    return json.dumps(body).encode()


async def read_stream(session: aiohttp.ClientSession, path: str, body: bytes, num_tokens: int) -> int:
    """Ask, and read to the end; give the number of events. An incomplete answer ends the benchmark."""
    async with session.post(path, data=body) as response:
        data = await response.read()
    events = data.split(b"\n\n")
    if response.status != 200 or events[-2:] != [b"data: [DONE]", b""]:
        raise RuntimeError(f"status {response.status}, the answer ends with {data[-300:]!r}")
    usage = json.loads(events[-3].removeprefix(b"data: "))["usage"]
    if usage["completion_tokens"] != num_tokens:
        raise RuntimeError(f"an answer has {usage['completion_tokens']} tokens instead of {num_tokens}")
    return len(events) - 1


async def ask(url: str, kind: str, num_requests: int, num_tokens: int, num_streams: int) -> float:
    """Send so many requests, `num_streams` at once; give the mean number of events of an answer."""
    headers = {"Content-Type": "application/json"}
    left = iter(range(num_requests))

    async def client() -> int:
        num_events = 0
        for index in left:
            body = make_body(kind, index, num_tokens)
            num_events += await read_stream(session, PATHS[kind], body, num_tokens)
        return num_events

    connector = aiohttp.TCPConnector(limit=num_streams)
    async with aiohttp.ClientSession(url, connector=connector, headers=headers) as session:
        return sum(await asyncio.gather(*(client() for _ in range(num_streams)))) / num_requests


@dataclass(frozen=True)
class Sizes:
    """How much is asked for."""

    num_streams: int
    num_short: int
    num_long: int
    long_tokens: int
    repeats: int


SMALLEST = Sizes(num_streams=8, num_short=40, num_long=16, long_tokens=16, repeats=1)
FULL = Sizes(
    num_streams=NUM_STREAMS, num_short=2000, num_long=4 * NUM_STREAMS, long_tokens=LONG_TOKENS, repeats=3
)


@dataclass(frozen=True)
class Costs:
    """Of one answer, on average: milliseconds of CPU of both processes, and events."""

    server_ms: float
    engine_ms: float
    num_events: float


def measure(server: OracleServer, kind: str, num_requests: int, num_tokens: int, num_streams: int) -> Costs:
    begin = cpu_s(server.pid), cpu_s(server.engine_pid)
    num_events = asyncio.run(ask(server.url, kind, num_requests, num_tokens, num_streams))
    server_s, engine_s = cpu_s(server.pid) - begin[0], cpu_s(server.engine_pid) - begin[1]
    return Costs(server_s * 1e3 / num_requests, engine_s * 1e3 / num_requests, num_events)


def measure_both(server: OracleServer, kind: str, sizes: Sizes) -> dict[str, float]:
    """Costs a request, and a token more, of both processes."""
    short = measure(server, kind, sizes.num_short, 1, sizes.num_streams)
    long = measure(server, kind, sizes.num_long, sizes.long_tokens, sizes.num_streams)
    num_more = long.num_events - short.num_events
    server_ms = (long.server_ms - short.server_ms) / num_more
    engine_ms = (long.engine_ms - short.engine_ms) / num_more
    return {
        "server_ms_per_request": short.server_ms - server_ms,
        "server_us_per_token": server_ms * 1e3,
        "engine_ms_per_request": short.engine_ms - engine_ms,
        "engine_us_per_token": engine_ms * 1e3,
    }


def bench(server: OracleServer, kind: str, step_ms: float, sizes: Sizes) -> dict[str, object]:
    """One row."""
    measure(server, kind, sizes.num_streams, sizes.long_tokens, sizes.num_streams)  # Warm-up.
    use, begin_s = CoreUse(), cpu_s(server.pid) + cpu_s(server.engine_pid)
    repeats = [measure_both(server, kind, sizes) for _ in range(sizes.repeats)]
    by_others = use.by_others(cpu_s(server.pid) + cpu_s(server.engine_pid) - begin_s)
    row: dict[str, object] = {"workload": kind, "step_ms": step_ms, "num_streams": sizes.num_streams}
    for name in repeats[0]:
        values = percentiles([costs[name] for costs in repeats])
        for percentile, value in zip(("p20", "p50", "p80"), values, strict=True):
            row[f"{percentile}_{name}"] = round(value, 3)
    row |= {"repetitions": sizes.repeats, "cores_used_by_others": by_others}
    print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def bench_all(kinds: list[str], step_ms: float, sizes: Sizes) -> list[dict[str, object]]:
    """Rows of one server; only the adapters' names matter, their paths are the oracle's."""
    arguments = [
        *(str(demo_paths().model), "--served-model-name", "demo"),
        *("--max-num-seqs", "128", "--max-num-batched-tokens", "8192"),
        *("--lora-modules", *(f"{name}=oracle-{name}" for name in PROJECTS)),
    ]
    with OracleServer(arguments, step_ms) as server:
        return [bench(server, kind, step_ms, sizes) for kind in kinds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="few short streams; no rows")
    parser.add_argument("--no-rows", action="store_true", help="print only")
    parser.add_argument("--kinds", nargs="+", choices=tuple(PATHS), default=list(PATHS))
    parser.add_argument("--step-ms", nargs="+", type=float, default=[20.0, 0.0])
    options = parser.parse_args()
    sizes = SMALLEST if options.smallest else FULL
    rows = [row for step_ms in options.step_ms for row in bench_all(options.kinds, step_ms, sizes)]
    if not options.smallest and not options.no_rows:
        print(f"appended to {append_rows('server_cost', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
