"""The command `lora-serve`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lora_serve.cli import adapter_check, serve
from lora_serve.cli.bench import commands as bench
from lora_serve.common.errors import LoraServeError


def make_parser() -> argparse.ArgumentParser:
    """Give the parser of the whole command; `command` of the result is the function to call."""
    from lora_serve.demo import run as demo

    parser = argparse.ArgumentParser(
        prog="lora-serve", description="Serve hundreds of LoRA adapters from one base model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        help="serve a model and its adapters over HTTP",
        description="Serve a model and its adapters over HTTP.",
        allow_abbrev=False,  # Else another server's --enable-lora could be taken for an option of ours.
    )
    serve.add_arguments(serve_parser)
    serve_parser.set_defaults(command=serve.main)
    _add_adapter_commands(commands.add_parser("adapter", help="look at adapters, without a server"))
    bench.add_commands(commands.add_parser("bench", help="how fast the engine is, without a server"))
    demo_parser = commands.add_parser("demo", help="serve a small model with four adapters and ask them")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(command=demo.main)
    return parser


def _add_adapter_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check_parser = commands.add_parser(
        "check",
        help="whether a model could serve an adapter",
        description="Say what of a model an adapter would change, its ranks and bytes, or everything that is "
        "wrong with it. Exit status: 0 = it fits, 1 = it would be refused, 2 = the question is wrong.",
    )
    adapter_check.add_arguments(check_parser)
    check_parser.set_defaults(command=adapter_check.main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str or None
        Arguments without the program's name; None = the process's own.

    Returns
    -------
    int
        The exit status: 0 = well, 1 = an error that was printed, 130 = interrupted. Bad usage exits with 2,
        and `adapter check` has its own.
    """
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)} (options of other servers, what stands for them "
            "here or why they are not needed: docs/migrating.md)"
        )
    try:
        status: int = args.command(args)
    except LoraServeError as error:
        print(f"lora-serve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
