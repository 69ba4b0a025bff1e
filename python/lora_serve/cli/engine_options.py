"""The options of `lora-serve serve` that are the engine's, and the configuration that they make."""

from __future__ import annotations

import argparse
from typing import Any

from lora_serve.cli import adapter_source_options
from lora_serve.common.config import (
    DTYPES,
    KV_WRITE_POLICIES,
    LOAD_FORMATS,
    SCHEDULING_POLICIES,
    EngineConfig,
)
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.kv_events_config import KVEventsConfig, parse_kv_events_config

_DEFAULTS = EngineConfig(model="MODEL")
_NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}
_MS: dict[str, Any] = {"type": int, "metavar": "MS"}
_GB: dict[str, Any] = {"type": float, "metavar": "GB"}


def add_arguments(parser: argparse.ArgumentParser, *, with_sources: bool = True) -> None:
    """Add the groups of options; their defaults are those of EngineConfig.

    Parameters
    ----------
    with_sources
        Those too that say which adapters to load, and where adapters may come from.
    """
    adapters = parser.add_argument_group("adapters")
    if with_sources:
        _add_source_options(adapters)
    _add_adapter_options(adapters)
    engine = parser.add_argument_group("engine")
    _add_model_options(engine)
    _add_kv_options(engine)
    _add_scheduling_options(parser.add_argument_group("scheduling"))


def make_config(args: argparse.Namespace) -> EngineConfig:
    """Give the configuration that parsed options ask for.

    Raises
    ------
    InvalidArgumentError
        An option's value is wrong.
    """
    asked = {field: getattr(args, field) for field in EngineConfig.__struct_fields__ if field in args}
    return EngineConfig(
        **asked,
        async_scheduling=not args.no_async_scheduling,
        enable_prefix_caching=not args.no_prefix_caching,
    )


def _add(group: argparse._ActionsContainer, option: str, text: str, **settings: Any) -> None:
    """Add the option of the field of EngineConfig with the same name, whose default it has and shows."""
    default = getattr(_DEFAULTS, option.removeprefix("--").replace("-", "_"))
    if default is not None:
        text += " (default: %(default)s)"
    group.add_argument(option, default=default, help=text, **settings)


def _kv_events_config(text: str) -> KVEventsConfig:
    try:
        return parse_kv_events_config(text)
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_source_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora-modules",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        default=[],
        help="adapters to load before the server answers",
    )
    adapter_source_options.add_arguments(group)


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--max-loras", "distinct adapters in one step", **_NUMBER)
    _add(group, "--max-lora-rank", "largest accepted adapter rank", **_NUMBER)
    _add(
        group,
        "--lora-memory-gb",
        "device memory for adapters in GiB; those that do not fit beside the others are brought in when "
        "requests want them",
        **_GB,
    )
    _add(
        group,
        "--lora-host-memory-gb",
        "host memory for adapters in GiB; those that do not fit are read from disk again when requests want "
        "them",
        **_GB,
    )
    _add(
        group,
        "--max-loading-adapters",
        "adapters that waiting requests bring to the device at once",
        **_NUMBER,
    )
    _add(
        group,
        "--adapter-patience-ms",
        "an adapter waits so long for room before one on the device is paused, or closed to newcomers",
        **_MS,
    )
    _add(
        group,
        "--adapter-time-slice-steps",
        "steps after which an adapter on the device may be paused for one that waits, when as many wait as "
        "are there; 0 = never",
        **_NUMBER,
    )
    _add(
        group,
        "--adapter-pause-ms",
        "a paused adapter waits so long before another one is paused for it",
        **_MS,
    )


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--device", "a torch device; auto = CUDA where torch finds a device, else the CPU")
    _add(group, "--dtype", "auto = the checkpoint's", choices=DTYPES)
    _add(group, "--load-format", "dummy = random weights, reading only config.json", choices=LOAD_FORMATS)
    _add(
        group,
        "--max-model-len",
        "longest prompt plus answer in tokens (default: the model's, or what the KV pages hold)",
        **_NUMBER,
    )
    _add(group, "--max-num-seqs", "requests that may run at once", **_NUMBER)
    _add(group, "--max-num-batched-tokens", "tokens of one step", **_NUMBER)
    _add(
        group,
        "--attention-backend",
        "how attention is computed; auto = flashinfer on CUDA, torch elsewhere",
        metavar="NAME",
    )
    group.add_argument(
        "--enforce-eager", action="store_true", help="replay no step from a CUDA graph (slower decode steps)"
    )
    _add(
        group,
        "--cuda-graph-sizes",
        "numbers of requests for which a decode step has a CUDA graph (default: 1, 2, 4, then every 8 up to "
        "--max-num-seqs)",
        nargs="+",
        **_NUMBER,
    )
    _add(
        group,
        "--prefill-graph-sizes",
        "numbers of tokens for which steps that prefill are run from CUDA graphs; no number = none (default: "
        "64 to 1024)",
        nargs="*",
        **_NUMBER,
    )
    _add(group, "--seed", "for requests without a seed and for dummy weights", **_NUMBER)


def _add_kv_options(group: argparse._ArgumentGroup) -> None:
    _add(group, "--page-size", "tokens of a KV page", **_NUMBER)
    pages = group.add_mutually_exclusive_group()
    _add(pages, "--num-device-pages", "KV pages on the device", **_NUMBER)
    _add(
        pages,
        "--kv-memory-gb",
        "memory of the KV pages in GiB (default: on CUDA what --gpu-memory-utilization leaves, elsewhere 1)",
        **_GB,
    )
    _add(
        pages,
        "--gpu-memory-utilization",
        "part of a CUDA device's memory that may be in use, KV pages included",
        type=float,
        metavar="PART",
    )
    _add(
        group,
        "--kv-host-memory-gb",
        "host memory in GiB for KV pages that leave the device; 0 = none",
        **_GB,
    )
    _add(
        group,
        "--kv-write-policy",
        "when KV pages are copied to the host: as soon as they are computed, shortly before they would be "
        "evicted, or only when their request is preempted",
        choices=KV_WRITE_POLICIES,
    )
    _add(
        group,
        "--kv-events-config",
        "publish over ZeroMQ which KV pages come and go, for routers: JSON with vLLM's fields, such as "
        """'{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}' (default: do not)""",
        type=_kv_events_config,
        metavar="JSON",
    )
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="no request starts from another's KV pages"
    )


def _add_scheduling_options(group: argparse._ArgumentGroup) -> None:
    _add(
        group,
        "--scheduling-policy",
        "who of the waiting requests of one priority goes first: those of the adapter that has had the "
        "fewest tokens for its weight, the oldest, or the one with the longest cached prefix",
        choices=SCHEDULING_POLICIES,
    )
    _add(group, "--priority-ageing-ms", "waiting so long counts as much as one class of priority", **_MS)
    for option, what in (
        ("--max-queued-requests", "requests that wait for their first step"),
        ("--max-queued-tokens", "prompt tokens of the requests that wait for their first step"),
        ("--max-requests-per-adapter", "waiting and running requests of one adapter, or of the base model"),
    ):
        _add(group, option, f"most {what}; more are answered 429. 0 = no limit", **_NUMBER)
    group.add_argument(
        "--no-async-scheduling",
        action="store_true",
        help="plan a step only when the one before has ended (the tokens are the same)",
    )
