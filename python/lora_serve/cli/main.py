"""The command `lora-serve`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lora_serve.cli import serve
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
    )
    serve.add_arguments(serve_parser)
    serve_parser.set_defaults(command=serve.main)
    demo_parser = commands.add_parser("demo", help="serve a small model with four adapters and ask them")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(command=demo.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str or None
        Arguments without the program's name; None = the process's own.

    Returns
    -------
    int
        The exit status: 0 = well, 1 = an error that was printed, 130 = interrupted. Bad usage exits with 2.
    """
    args = make_parser().parse_args(argv)
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
