"""The options of `lora-serve serve` that are the engine's, and the configuration that they make."""

from __future__ import annotations

import argparse

from lora_serve.common.config import (
    DTYPES,
    KV_WRITE_POLICIES,
    LOAD_FORMATS,
    SCHEDULING_POLICIES,
    EngineConfig,
)

_DEFAULTS = EngineConfig(model="MODEL")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the groups of options; their defaults are those of EngineConfig."""
    _add_adapter_options(parser.add_argument_group("adapters"))
    _add_engine_options(parser.add_argument_group("engine"))
    _add_scheduling_options(parser.add_argument_group("scheduling"))


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
    group.add_argument(
        "--lora-memory-gb",
        type=float,
        metavar="GB",
        default=_DEFAULTS.lora_memory_gb,
        help="device memory for adapters in GiB; those that do not fit beside the others are brought in when "
        "requests want them (default: no limit)",
    )
    group.add_argument(
        "--max-loading-adapters",
        type=int,
        metavar="N",
        default=_DEFAULTS.max_loading_adapters,
        help="adapters that waiting requests bring to the device at once (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-patience-ms",
        type=int,
        metavar="MS",
        default=_DEFAULTS.adapter_patience_ms,
        help="an adapter waits so long for room before one on the device is paused, or closed to newcomers "
        "(default: %(default)s)",
    )

    group.add_argument(
        "--adapter-time-slice-steps",
        type=int,
        metavar="N",
        default=_DEFAULTS.adapter_time_slice_steps,
        help="steps after which an adapter on the device may be paused for one that waits, when as many wait "
        "as are there; 0 = never (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-pause-ms",
        type=int,
        metavar="MS",
        default=_DEFAULTS.adapter_pause_ms,
        help="a paused adapter waits so long before another one is paused for it (default: %(default)s)",
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


def _add_scheduling_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scheduling-policy",
        choices=SCHEDULING_POLICIES,
        default=_DEFAULTS.scheduling_policy,
        help="who of the waiting requests of one priority goes first: those of the adapter that has had the "
        "fewest tokens for its weight, the oldest, or the one with the longest cached prefix "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--priority-ageing-ms",
        type=int,
        metavar="MS",
        default=_DEFAULTS.priority_ageing_ms,
        help="waiting so long counts as much as one class of priority (default: %(default)s)",
    )
    limits = (
        ("--max-queued-requests", "requests that wait for their first step"),
        ("--max-queued-tokens", "prompt tokens of the requests that wait for their first step"),
        ("--max-requests-per-adapter", "waiting and running requests of one adapter, or of the base model"),
    )
    for option, what in limits:
        group.add_argument(
            option,
            type=int,
            metavar="N",
            default=getattr(_DEFAULTS, option[2:].replace("-", "_")),
            help=f"most {what}; more are answered 429. 0 = no limit (default: %(default)s)",
        )
    group.add_argument(
        "--no-async-scheduling",
        action="store_true",
        help="plan a step only when the one before has ended (the tokens are the same)",
    )


def make_config(args: argparse.Namespace) -> EngineConfig:
    """Give the configuration that parsed options ask for.

    Raises
    ------
    InvalidArgumentError
        An option's value is wrong.
    """
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
        lora_memory_gb=args.lora_memory_gb,
        max_loading_adapters=args.max_loading_adapters,
        adapter_patience_ms=args.adapter_patience_ms,
        adapter_time_slice_steps=args.adapter_time_slice_steps,
        adapter_pause_ms=args.adapter_pause_ms,
        scheduling_policy=args.scheduling_policy,
        priority_ageing_ms=args.priority_ageing_ms,
        max_queued_requests=args.max_queued_requests,
        max_queued_tokens=args.max_queued_tokens,
        max_requests_per_adapter=args.max_requests_per_adapter,
        async_scheduling=not args.no_async_scheduling,
        enable_prefix_caching=not args.no_prefix_caching,
        lora_allowed_roots=args.lora_allowed_roots,
        seed=args.seed,
    )
