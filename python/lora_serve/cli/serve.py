"""The command `lora-serve serve`."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING

from lora_serve.common.config import DTYPES, KV_WRITE_POLICIES, LOAD_FORMATS, EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server.settings import DEFAULT_MAX_ANSWERS_PER_REQUEST

if TYPE_CHECKING:
    from lora_serve.server.launch import AdapterModule, Launch

API_KEY_VARIABLE = "LORA_SERVE_API_KEY"
"""Environment variable with a key, for those who do not want it in the list of processes."""
LOG_LEVELS = ("debug", "info", "warning", "error")
_DEFAULTS = EngineConfig(model="MODEL")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-serve serve` to a parser; the engine's defaults are those of EngineConfig."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub id")
    _add_server_options(parser.add_argument_group("server"))
    _add_adapter_options(parser.add_argument_group("adapters"))
    _add_engine_options(parser.add_argument_group("engine"))


def _add_server_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="0 = a free one (default: %(default)s)")
    group.add_argument(
        "--served-model-name", metavar="NAME", help="the base model's name in requests (default: MODEL)"
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help="requests must show this key, or another one given by a repeated option or by the environment "
        f"variable {API_KEY_VARIABLE} (default: no key is asked for)",
    )
    group.add_argument(
        "--max-answers-per-request",
        type=int,
        metavar="N",
        default=DEFAULT_MAX_ANSWERS_PER_REQUEST,
        help="most answers (prompts times n) that one HTTP request may ask for (default: %(default)s)",
    )
    group.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="info",
        help="least severity of the log (default: %(default)s)",
    )


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora-modules",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        default=[],
        help="adapters to load before the server answers",
    )
    group.add_argument(
        "--max-loras",
        type=int,
        metavar="N",
        default=_DEFAULTS.max_loras,
        help="distinct adapters in one step (default: %(default)s)",
    )
    group.add_argument(
        "--max-lora-rank",
        type=int,
        metavar="N",
        default=_DEFAULTS.max_lora_rank,
        help="largest accepted adapter rank (default: %(default)s)",
    )
    group.add_argument(
        "--lora-allowed-roots",
        metavar="FOLDER",
        nargs="+",
        action="extend",
        help="folders that adapters may be read from (default: any)",
    )


def _add_engine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default=_DEFAULTS.device, help="a torch device (default: %(default)s)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=_DEFAULTS.dtype,
        help="auto = the checkpoint's (default: %(default)s)",
    )
    group.add_argument(
        "--load-format",
        choices=LOAD_FORMATS,
        default=_DEFAULTS.load_format,
        help="dummy = random weights, reading only config.json (default: %(default)s)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        default=_DEFAULTS.max_model_len,
        help="longest prompt plus answer in tokens (default: the model's, or what the KV pages hold)",
    )
    group.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="N",
        default=_DEFAULTS.max_num_seqs,
        help="requests that may run at once (default: %(default)s)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        default=_DEFAULTS.max_num_batched_tokens,
        help="tokens of one step (default: %(default)s)",
    )
    _add_kv_options(group)
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=_DEFAULTS.seed,
        help="for requests without a seed and for dummy weights (default: %(default)s)",
    )


def _add_kv_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--page-size",
        type=int,
        metavar="N",
        default=_DEFAULTS.page_size,
        help="tokens of a KV page (default: %(default)s)",
    )
    pages = group.add_mutually_exclusive_group()
    pages.add_argument("--num-device-pages", type=int, metavar="N", help="KV pages on the device")
    pages.add_argument(
        "--kv-memory-gb",
        type=float,
        metavar="GB",
        default=_DEFAULTS.kv_memory_gb,
        help="memory of the KV pages in GiB (default: %(default)s)",
    )
    group.add_argument(
        "--kv-host-memory-gb",
        type=float,
        metavar="GB",
        default=_DEFAULTS.kv_host_memory_gb,
        help="host memory in GiB for KV pages that leave the device; 0 = none (default: %(default)s)",
    )
    group.add_argument(
        "--kv-write-policy",
        choices=KV_WRITE_POLICIES,
        default=_DEFAULTS.kv_write_policy,
        help="when KV pages are copied to the host: as soon as they are computed, shortly before they would "
        "be evicted, or only when their request is preempted (default: %(default)s)",
    )
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="no request starts from another's KV pages"
    )


def main(args: argparse.Namespace) -> int:
    """Serve until a signal comes.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options of `add_arguments`.

    Returns
    -------
    int
        The exit status: 0 after a server that has answered, 130 when a signal came while it was starting.

    Raises
    ------
    LoraServeError
        Why it cannot serve.
    """
    from lora_serve.server.launch import serve

    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    return 0 if serve(make_launch(args)) else 130


def make_launch(args: argparse.Namespace) -> Launch:
    """Give what the options ask for.

    Raises
    ------
    InvalidArgumentError
        An option's value is wrong.
    """
    from lora_serve.server.launch import Launch
    from lora_serve.server.settings import ServerSettings

    served_model_name = args.model if args.served_model_name is None else args.served_model_name
    api_keys = list(args.api_key)
    if os.environ.get(API_KEY_VARIABLE):
        api_keys.append(os.environ[API_KEY_VARIABLE])

    def announce(url: str) -> None:
        names = ", ".join([served_model_name, *(adapter.name for adapter in adapters)])
        print(f"lora-serve: serving {names} at {url}", flush=True)

    adapters = [_parse_module(module) for module in args.lora_modules]
    names = [adapter.name for adapter in adapters]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgumentError(f"--lora-modules names {name!r} twice; give each adapter its own name")
    return Launch(
        config=_make_config(args),
        settings=ServerSettings(
            served_model_name=served_model_name,
            model_path=args.model,
            api_keys=tuple(api_keys),
            max_answers_per_request=args.max_answers_per_request,
        ),
        adapters=adapters,
        host=args.host,
        port=args.port,
        announce=announce,
    )


def _make_config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model=args.model,
        dtype=args.dtype,
        device=args.device,
        load_format=args.load_format,
        page_size=args.page_size,
        num_device_pages=args.num_device_pages,
        kv_memory_gb=args.kv_memory_gb,
        kv_host_memory_gb=args.kv_host_memory_gb,
        kv_write_policy=args.kv_write_policy,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        max_loras=args.max_loras,
        max_lora_rank=args.max_lora_rank,
        enable_prefix_caching=not args.no_prefix_caching,
        lora_allowed_roots=args.lora_allowed_roots,
        seed=args.seed,
    )


def _parse_module(module: str) -> AdapterModule:
    from lora_serve.server.launch import AdapterModule

    name, separator, path = module.partition("=")
    if not name or not separator or not path:
        raise InvalidArgumentError(
            f"--lora-modules has {module!r} but must have NAME=PATH, such as sql=/adapters/sql-v2"
        )
    return AdapterModule(name=name, path=path)
