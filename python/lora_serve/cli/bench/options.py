"""The options that all bench commands share, and the engine's configuration that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec

from lora_serve.cli import engine_options
from lora_serve.cli.bench.rows import PREFILL_STEP_TOKENS, SERVE_STEP_TOKENS
from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError

_MEMORY_SHARE = 0.85
_GIB = 2**30
_SPARE = 1.05
_LEAST_GB = 1 / 1024
_WHAT_FITS = f"what those that fit take, plus {_SPARE - 1:.0%}"
_SHOWN_DEFAULTS = {
    "gpu_memory_utilization": str(_MEMORY_SHARE),
    "max_loras": "as many adapters as fit the device",
    "max_lora_rank": "the adapters' own",
    "lora_memory_gb": _WHAT_FITS,
    "lora_host_memory_gb": _WHAT_FITS,
    "max_num_batched_tokens": f"{SERVE_STEP_TOKENS}; of closed batches on CUDA {PREFILL_STEP_TOKENS}",
}
"""Where `make_config` chooses for itself."""


class _Unset:
    """Stands for an engine option that the user has not given; help shows what it is then."""

    def __init__(self, default: object) -> None:
        self._default = default

    def __str__(self) -> str:
        return str(self._default)


def add_arguments(parser: argparse.ArgumentParser, *, default_repeats: int) -> None:
    """Add the model, the way of measuring, and the engine's own options."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="MODEL", help="a Hugging Face directory or hub id")
    model.add_argument(
        "--model-shape", metavar="NAME", help="random weights of a published model's sizes, such as qwen3-8b"
    )
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--repeats",
        type=int,
        default=default_repeats,
        metavar="N",
        help="runs of a closed batch after a warm-up, of which the best counts (default: %(default)s)",
    )
    measuring.add_argument(
        "--scratch", metavar="FOLDER", help="where generated adapters go for the time of the run"
    )
    measuring.add_argument(
        "--commit", metavar="TEXT", help="what to note as the sources' commit (default: git's)"
    )
    measuring.add_argument(
        "--profile",
        metavar="FOLDER",
        help="after each measurement, trace some steps and write the trace and tables of the device's time "
        "there; what is measured after a trace in the same run may be a little slower",
    )
    engine_options.add_arguments(parser, with_sources=False)  # The bench makes its own adapters.
    defaults = EngineConfig(model="MODEL")
    parser.set_defaults(
        **{field: _Unset(_SHOWN_DEFAULTS.get(field, getattr(defaults, field))) for field in _option_fields()},
    )


def _option_fields() -> list[str]:
    others = {"model", "async_scheduling", "enable_prefix_caching"}
    others |= {"lora_allowed_roots", "lora_allow_hub", "lora_resolvers"}
    return [field for field in EngineConfig.__struct_fields__ if field not in others]


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineConfig that the user has set."""
    given = {
        field: getattr(args, field)
        for field in _option_fields()
        if not isinstance(getattr(args, field, _Unset(None)), _Unset)
    }
    if args.no_async_scheduling:
        given["async_scheduling"] = False
    return given


class ModelChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The model under test.

    Parameters
    ----------
    name
        As shown.
    path
        A Hugging Face directory or hub id.
    load_format
        As in EngineConfig.
    """

    name: str
    path: str
    load_format: str


def choose_model(args: argparse.Namespace, folder: Path) -> ModelChoice:
    """Give the model; a shape is written to a folder first.

    Raises
    ------
    InvalidArgumentError
        None was named, or the shape is unknown.
    """
    from lora_serve.models.shapes import write_model_shape

    if args.model is not None:
        return ModelChoice(name=args.model, path=args.model, load_format="auto")
    if args.model_shape is None:
        raise InvalidArgumentError("name a model: --model-shape qwen3-8b for random weights, or --model")
    path = write_model_shape(args.model_shape, folder / args.model_shape)
    return ModelChoice(name=args.model_shape, path=str(path), load_format="dummy")


def make_config(
    model: ModelChoice,
    given: dict[str, Any],
    *,
    max_num_batched_tokens: int,
    lora_rank: int,
    device_adapter_bytes: int,
    host_adapter_bytes: int,
    num_device_adapters: int,
) -> EngineConfig:
    """Give the configuration of an engine under test; what the user has set wins.

    Parameters
    ----------
    model
        What to run.
    given
        As `given_options` gives them.
    max_num_batched_tokens
        Of a step, on CUDA.
    lora_rank
        Of the adapters.
    device_adapter_bytes, host_adapter_bytes
        Of all adapters that either memory shall hold; it gets 5% more.
    num_device_adapters
        How many those on the device are.
    """
    from lora_serve.engine.model_choice import choose_device

    device = choose_device(given.get("device", "auto"))
    settings: dict[str, Any] = {
        "load_format": model.load_format,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": _MEMORY_SHARE,
        "max_loras": max(1, num_device_adapters),
        "max_lora_rank": lora_rank,
        "lora_memory_gb": _memory_gb(device_adapter_bytes),
        "lora_host_memory_gb": _memory_gb(host_adapter_bytes),
    }
    if device.startswith("cuda"):
        settings["max_num_batched_tokens"] = max_num_batched_tokens
    return EngineConfig(model=model.path, **{**settings, **given, "device": device})


def _memory_gb(adapter_bytes: int) -> float:
    return _SPARE * adapter_bytes / _GIB if adapter_bytes else _LEAST_GB
