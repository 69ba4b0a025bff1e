"""The commands `lora-serve bench throughput`, `serve` and `table`: their options."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from lora_serve.cli.bench import options

_NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}
_POPULARITIES = ("uniform", "zipf")


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `lora-serve bench`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    throughput = commands.add_parser(
        "throughput",
        help="tokens/s of requests that are all there at the start",
        description="Tokens/s of requests that are all there at the start: output tokens, or prompt tokens "
        "with --output-len 1. Prints JSON.",
    )
    _add_workload(throughput, num_requests=32, output_len=128)
    options.add_arguments(throughput, default_repeats=2)
    throughput.set_defaults(command=lambda args: _run(_throughput, args))
    serve = commands.add_parser(
        "serve",
        help="waits of requests that come at random times",
        description="Times to the first token, between tokens and to the end, of requests that come at "
        "random times (Poisson). Prints JSON.",
    )
    _add_workload(serve, num_requests=1200, output_len=64)
    serve.add_argument(
        "--rate", type=float, default=12.0, metavar="R", help="arrivals a second (default: %(default)s)"
    )
    serve.add_argument(
        "--popularity",
        choices=_POPULARITIES,
        default="zipf",
        help="zipf: the k-th adapter is asked for in proportion to 1/k (default: %(default)s)",
    )
    serve.add_argument("--num-device-adapters", **_NUMBER, help="that fit the device (default: all)")
    serve.add_argument("--num-host-adapters", **_NUMBER, help="that fit host memory (default: all)")
    options.add_arguments(serve, default_repeats=1)
    serve.set_defaults(command=lambda args: _run(_serve, args))
    _add_table(commands.add_parser("table", help="all figures that are compared with vLLM's"))


def _add_workload(parser: argparse.ArgumentParser, *, num_requests: int, output_len: int) -> None:
    for option, default, text in (
        ("--num-requests", num_requests, "requests"),
        ("--input-len", 128, "prompt tokens of each"),
        ("--output-len", output_len, "output tokens of each"),
        ("--num-adapters", 0, "adapters that are asked for; 0 = the base model"),
        ("--num-idle-adapters", 0, "adapters that are loaded and not asked for"),
        ("--adapter-rank", 16, "of every adapter, on all seven projections"),
    ):
        parser.add_argument(option, **_NUMBER, default=default, help=text + " (default: %(default)s)")
    parser.add_argument("--seed-of-arrivals", **_NUMBER, default=0, help=argparse.SUPPRESS)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures the rows of the speed table, each with vLLM's figure and ours beside it. Writes table.json "
        "and table.md after every row; rows that are there already stay, so a table can be measured in parts."
    )
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--rows", metavar="A,B", help="names or patterns such as 'base*' (default: all)")
    parser.add_argument("--out", metavar="FOLDER", default="bench-table", help="(default: %(default)s)")
    parser.add_argument(
        "--merge", metavar="FILE", nargs="+", default=[], help="take the rows of other table.json files first"
    )
    parser.add_argument("--merge-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--time-limit-s", **_NUMBER, default=0, help="begin no row after so many seconds (default: no limit)"
    )
    parser.add_argument("--smallest", action="store_true", help="a few short requests a row: does it run?")
    parser.add_argument("--seed-of-arrivals", **_NUMBER, default=0, help=argparse.SUPPRESS)
    options.add_arguments(parser, default_repeats=2)
    parser.set_defaults(command=lambda args: _run(_table, args))


def _run(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    if "torch" not in sys.modules:  # Threads as in the engine's own process; torch reads this when imported.
        from lora_serve.engine.process_handle import make_environment

        os.environ.update(make_environment())
    from lora_serve.engine.loop_log import LoopLogHandler

    handler = LoopLogHandler(sys.stderr, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("lora_serve.engine.adapter_log").setLevel(logging.WARNING)  # Four lines an adapter.
    try:
        return command(args)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def _throughput(args: argparse.Namespace) -> int:
    from lora_serve.cli.bench.rows import EngineNeeds
    from lora_serve.cli.bench.session import Session
    from lora_serve.cli.bench.workloads import ClosedBatch

    workload = ClosedBatch(
        num_requests=args.num_requests,
        num_prompt_tokens=args.input_len,
        num_output_tokens=args.output_len,
        num_adapters=args.num_adapters,
    )
    needs = EngineNeeds(num_adapters=args.num_adapters + args.num_idle_adapters, lora_rank=args.adapter_rank)
    with Session(args) as session:
        print(json.dumps(session.measure("throughput", needs, workload), indent=1))
    return 0


def _serve(args: argparse.Namespace) -> int:
    from lora_serve.cli.bench.rows import SERVE_STEP_TOKENS, EngineNeeds
    from lora_serve.cli.bench.session import Session
    from lora_serve.cli.bench.workloads import OpenLoop

    workload = OpenLoop(
        num_requests=args.num_requests,
        num_prompt_tokens=args.input_len,
        num_output_tokens=args.output_len,
        rate=args.rate,
        num_adapters=args.num_adapters,
        popularity=args.popularity,
    )
    needs = EngineNeeds(
        num_adapters=args.num_adapters + args.num_idle_adapters,
        lora_rank=args.adapter_rank,
        num_device_adapters=args.num_device_adapters,
        num_host_adapters=args.num_host_adapters,
        max_num_batched_tokens=SERVE_STEP_TOKENS,
    )
    with Session(args) as session:
        print(json.dumps(session.measure("serve", needs, workload), indent=1))
    return 0


def _table(args: argparse.Namespace) -> int:
    from lora_serve.cli.bench import table

    return table.main(args)
