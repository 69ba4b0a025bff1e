"""The command `lora-serve demo`: serves the demo's model with its four adapters and asks them."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from lora_serve.common.errors import LoraServeError
from lora_serve.demo.paths import DemoPaths, demo_paths
from lora_serve.demo.prompts import BASE_MODEL, PROJECTS, password_question

if TYPE_CHECKING:
    from lora_serve.demo.server_process import ServerProcess

# What needs an HTTP client is imported when the demo runs: the other commands work without one.

PAGE_SIZE = 16
KV_MEMORY_GB = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lora-serve demo` to a parser."""
    parser.add_argument(
        "--once",
        action="store_true",
        help="stop after the table; the exit status is 0 only if every answer is right",
    )
    parser.add_argument(
        "--print-paths",
        action="store_true",
        help='print {"model": path, "adapters": {name: path}} as JSON and stop',
    )
    parser.add_argument("--port", type=int, default=0, help="port to serve on (default: a free one)")


def main(args: argparse.Namespace) -> int:
    """Runs the demo.

    Parameters
    ----------
    args
        Parsed options of `add_arguments`: `once`, `print_paths`, `port` (0 = a free one).

    Returns
    -------
    int
        The exit status: 0 if all is well, 1 if an answer was wrong or the server failed, 130 after Ctrl-C
        before the table was complete.
    """
    try:
        paths = demo_paths()
        if args.print_paths:
            adapters = {name: str(path) for name, path in paths.adapters.items()}
            print(json.dumps({"model": str(paths.model), "adapters": adapters}, indent=2))
            return 0
        with terminate_like_interrupt():
            return _serve_and_ask(paths, args.port, once=args.once)
    except LoraServeError as error:
        print(f"lora-serve demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def serve_arguments(paths: DemoPaths) -> list[str]:
    """The demo's arguments of `lora-serve serve`, without host and port."""
    modules = [f"{name}={path}" for name, path in paths.adapters.items()]
    return [
        str(paths.model),
        "--served-model-name",
        BASE_MODEL,
        "--device",
        "cpu",  # Its model is float32, which FlashInfer does not take.
        "--page-size",
        str(PAGE_SIZE),
        "--kv-memory-gb",
        str(KV_MEMORY_GB),
        "--lora-modules",
        *modules,
    ]


def _serve_and_ask(paths: DemoPaths, port: int, *, once: bool) -> int:
    from lora_serve.demo.report import curl_lines, find_mistakes, format_table
    from lora_serve.demo.rounds import ask_all
    from lora_serve.demo.server_process import ServerProcess

    _say(f"starting a server with the base model '{BASE_MODEL}' and the adapters {', '.join(PROJECTS)} ...")
    with ServerProcess(serve_arguments(paths), port) as server:
        num_requests = (1 + len(PROJECTS)) * len(PROJECTS)
        _say(f"serving on {server.url}; asking {num_requests} questions at once, twice:")
        _say(f"  {password_question('<name>')}\n")
        first, second = ask_all(server.url), ask_all(server.url)
        _say(format_table(first, second, PAGE_SIZE))
        mistakes = find_mistakes(first, second, PAGE_SIZE)
        for mistake in mistakes:
            _say(f"WRONG: {mistake}")
        if not mistakes:
            _say(
                "\nEvery model gives its own project's password and no other, and reuses only its own pages."
            )
        if once:
            return 1 if mistakes else 0
        _say("\nThe server keeps running. Try it from another terminal:\n")
        _say("\n".join(curl_lines(server.url, paths)))
        _say("\nCtrl-C stops it.")
        return _wait(server, 1 if mistakes else 0)


def _wait(server: ServerProcess, status: int) -> int:
    """Serves until Ctrl-C, which is the ordinary end here."""
    try:
        server_status = server.wait()
    except KeyboardInterrupt:
        _say("\nstopping the server ...")
        return status
    _say(f"the server ended with status {server_status}; its log:\n{server.log_tail()}")
    return 1


def _say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """Lets SIGTERM and a closed terminal unwind like Ctrl-C, so that the server never outlives the demo."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
