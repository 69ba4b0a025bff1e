"""The command `lora-serve serve`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from lora_serve.cli import engine_options
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.log_format import LOG_FORMATS
from lora_serve.server.limits import ServerLimits
from lora_serve.server.settings import (
    DEFAULT_ADAPTER_FOLDER_POLL_SECONDS,
    DEFAULT_DRAIN_TIMEOUT_S,
    DEFAULT_MAX_ANSWERS_PER_REQUEST,
    DEFAULT_MAX_AUTOLOADED_ADAPTERS,
    DEFAULT_MAX_BODY_BYTES,
    DEFAULT_METRICS_MAX_ADAPTERS,
    REASONING_PARSERS,
    TOOL_PARSERS,
)

if TYPE_CHECKING:
    from lora_serve.common.config import EngineConfig
    from lora_serve.server.launch import AdapterModule, Launch
    from lora_serve.server.settings import AutoloadSettings

API_KEY_VARIABLE = "LORA_SERVE_API_KEY"
"""Environment variable with a key, for those who do not want it in the list of processes."""
ADMIN_API_KEY_VARIABLE = "LORA_SERVE_ADMIN_API_KEY"
"""The same for an admin's key."""
LOG_LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-serve serve` to a parser; the engine's defaults are those of EngineConfig."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub id")
    _add_server_options(parser.add_argument_group("server"))
    engine_options.add_arguments(parser)


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
        "--admin-api-key",
        metavar="KEY",
        action="append",
        default=[],
        help="a key that may do everything, also given by the environment variable "
        f"{ADMIN_API_KEY_VARIABLE}; with one, other keys may not load and unload adapters",
    )
    group.add_argument(
        "--api-keys-file",
        metavar="FILE",
        help="JSON file of more keys, each with a name and, where it is a tenant's, its adapters; see "
        "docs/security.md",
    )
    group.add_argument(
        "--max-answers-per-request",
        type=int,
        metavar="N",
        default=DEFAULT_MAX_ANSWERS_PER_REQUEST,
        help="most answers (prompts times n) that one HTTP request may ask for (default: %(default)s)",
    )
    _add_limit_options(group)
    group.add_argument(
        "--no-operator-page", action="store_true", help="GET / does not give the page for operators"
    )
    group.add_argument(
        "--enable-tokenizer-info-endpoint",
        action="store_true",
        help="GET /tokenizer_info gives the settings of the base model's tokenizer and its chat template",
    )
    group.add_argument(
        "--metrics-max-adapters",
        type=int,
        metavar="N",
        default=DEFAULT_METRICS_MAX_ADAPTERS,
        help="most adapters whose requests have series of their own in /metrics (default: %(default)s)",
    )
    group.add_argument(
        "--tool-call-parser",
        choices=TOOL_PARSERS,
        default="auto",
        help="how the model writes tool calls; auto = as its chat template shows them (default: %(default)s)",
    )
    group.add_argument(
        "--reasoning-parser",
        choices=REASONING_PARSERS,
        help="how the model writes its reasoning, which answers then give apart (default: it is content)",
    )
    _add_adapter_options(group)
    _add_log_options(group)


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora-dir",
        metavar="FOLDER",
        help="each subfolder is an adapter of its name: loaded, reloaded and unloaded as the folder changes",
    )
    group.add_argument(
        "--lora-dir-poll-seconds",
        type=float,
        metavar="SECONDS",
        default=DEFAULT_ADAPTER_FOLDER_POLL_SECONDS,
        help="between two looks at that folder (default: %(default)s)",
    )
    group.add_argument(
        "--lora-autoload",
        action="store_true",
        help="load an adapter whose path or hub id a request gives as its adapter; local paths need "
        "--lora-allowed-roots, hub ids --lora-allow-hub",
    )
    group.add_argument(
        "--lora-autoload-max",
        type=int,
        metavar="N",
        default=DEFAULT_MAX_AUTOLOADED_ADAPTERS,
        help="adapters loaded in this way at once; the least recently used ones make way (default: "
        "%(default)s)",
    )


def _add_log_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="info",
        help="least severity of the log (default: %(default)s)",
    )
    group.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default=LOG_FORMATS[0],
        help="lines of the log, of both processes (default: %(default)s)",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="OpenTelemetry collector (OTLP over HTTP) that gets a span of each request, such as "
        "http://127.0.0.1:4318/v1/traces; needs the packages of lora-serve[tracing]",
    )
    group.add_argument(
        "--log-requests", action="store_true", help="log one line a request: its status, its time and its id"
    )


def _add_limit_options(group: argparse._ArgumentGroup) -> None:
    defaults = ServerLimits()
    for option, metavar, default, what in (
        ("--max-body-bytes", "BYTES", DEFAULT_MAX_BODY_BYTES, "longest body of a request"),
        (
            "--max-concurrent-requests",
            "N",
            defaults.max_concurrent_requests,
            "most requests at once that ask for tokens, streams included; further ones get 429; 0 = no limit",
        ),
        (
            "--max-concurrent-requests-per-key",
            "N",
            defaults.max_concurrent_requests_per_key,
            "the same, of one API key",
        ),
        (
            "--max-connections",
            "N",
            defaults.max_connections,
            "most open connections; the idle one that has waited longest is closed for another one; 0 = as "
            "many as the limit on open files has room for",
        ),
    ):
        group.add_argument(
            option, type=int, metavar=metavar, default=default, help=f"{what} (default: %(default)s)"
        )
    for option, seconds, what in (
        (
            "--header-timeout",
            defaults.header_timeout_s,
            "a connection without a whole request's headers is closed",
        ),
        ("--body-timeout", defaults.body_timeout_s, "a request whose body is not complete fails"),
        (
            "--drain-timeout",
            DEFAULT_DRAIN_TIMEOUT_S,
            "running requests are ended after a signal; a second signal ends them at once",
        ),
    ):
        group.add_argument(
            option,
            type=float,
            metavar="SECONDS",
            default=seconds,
            help=f"after so long {what} (default: %(default)s)",
        )
    group.add_argument(
        "--restart-engine",
        action="store_true",
        help="start the engine's process again when it ends by itself, with the adapters that were loaded",
    )
    group.add_argument(
        "--max-engine-restarts",
        type=int,
        metavar="N",
        default=5,
        help="tries in a row before the server gives up and tells liveness probes so (default: %(default)s)",
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
    from lora_serve.server.server_log import set_up_log

    set_up_log(args.log_level, args.log_format, logs_requests=args.log_requests)
    return 0 if serve(make_launch(args)) else 130


def make_launch(args: argparse.Namespace) -> Launch:
    """Give what the options ask for.

    Raises
    ------
    InvalidArgumentError
        An option's value is wrong.
    """
    from lora_serve.server.api_keys import read_key_file
    from lora_serve.server.engine_supervisor import RestartSettings
    from lora_serve.server.launch import Launch
    from lora_serve.server.settings import AdapterFolderSettings, ServerSettings

    served_model_name = args.model if args.served_model_name is None else args.served_model_name
    api_keys = list(args.api_key)
    if os.environ.get(API_KEY_VARIABLE):
        api_keys.append(os.environ[API_KEY_VARIABLE])
    admin_api_keys = list(args.admin_api_key)
    if os.environ.get(ADMIN_API_KEY_VARIABLE):
        admin_api_keys.append(os.environ[ADMIN_API_KEY_VARIABLE])

    def announce(url: str) -> None:
        names = ", ".join([served_model_name, *(adapter.name for adapter in adapters)])
        print(f"lora-serve: serving {names} at {url}", flush=True)

    adapters = [_parse_module(module) for module in args.lora_modules]
    names = [adapter.name for adapter in adapters]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgumentError(f"--lora-modules names {name!r} twice; give each adapter its own name")
    config = engine_options.make_config(args)
    adapter_folder = None
    if args.lora_dir is not None:
        adapter_folder = AdapterFolderSettings(
            path=args.lora_dir,
            served_model_name=served_model_name,
            poll_seconds=args.lora_dir_poll_seconds,
            allowed_roots=config.lora_allowed_roots,
        )
    return Launch(
        config=config,
        settings=ServerSettings(
            served_model_name=served_model_name,
            model_path=args.model,
            api_keys=tuple(api_keys),
            admin_api_keys=tuple(dict.fromkeys(admin_api_keys)),
            key_entries=() if args.api_keys_file is None else read_key_file(args.api_keys_file),
            max_answers_per_request=args.max_answers_per_request,
            max_body_bytes=args.max_body_bytes,
            otlp_traces_endpoint=args.otlp_traces_endpoint,
            limits=ServerLimits(
                max_concurrent_requests=args.max_concurrent_requests,
                max_concurrent_requests_per_key=args.max_concurrent_requests_per_key,
                max_connections=args.max_connections,
                header_timeout_s=args.header_timeout,
                body_timeout_s=args.body_timeout,
            ),
            autoload=_autoload_settings(args, config),
            metrics_max_adapters=args.metrics_max_adapters,
            tool_call_parser=args.tool_call_parser,
            reasoning_parser=args.reasoning_parser,
            operator_page=not args.no_operator_page,
            tokenizer_info=args.enable_tokenizer_info_endpoint,
        ),
        adapters=adapters,
        host=args.host,
        port=args.port,
        announce=announce,
        adapter_folder=adapter_folder,
        restart=RestartSettings(max_restarts=args.max_engine_restarts if args.restart_engine else 0),
        drain_timeout_s=args.drain_timeout,
    )


def _autoload_settings(args: argparse.Namespace, config: EngineConfig) -> AutoloadSettings | None:
    from lora_serve.server.settings import AutoloadSettings

    settings = AutoloadSettings(
        max_adapters=args.lora_autoload_max,
        allow_local=config.lora_allowed_roots is not None,
        allow_hub=config.lora_allow_hub,
    )
    if not args.lora_autoload:
        return None
    if not (settings.allow_local or settings.allow_hub or config.lora_resolvers):
        raise InvalidArgumentError(
            "--lora-autoload is given, but there is nowhere that requests may load adapters from; add "
            "--lora-allowed-roots with the folders that hold adapters, or --lora-allow-hub"
        )
    return settings


def _parse_module(module: str) -> AdapterModule:
    from lora_serve.server.launch import AdapterModule

    name, separator, path = module.partition("=")
    if not name or not separator or not path:
        raise InvalidArgumentError(
            f"--lora-modules has {module!r} but must have NAME=PATH, such as sql=/adapters/sql-v2"
        )
    return AdapterModule(name=name, path=path)
