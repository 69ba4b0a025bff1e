"""The command `lora-serve adapter check`: could a model serve an adapter? Answered without its weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lora_serve.cli import adapter_source_options
from lora_serve.common.config import DTYPES, EngineConfig
from lora_serve.common.errors import InvalidArgumentError, LoraServeError

if TYPE_CHECKING:
    import torch

    from lora_serve.layers.linear import LoRATarget
    from lora_serve.lora.adapter_layout import AdapterLayout
    from lora_serve.lora.sources import AdapterSources
    from lora_serve.models.decoder import DecoderModel

FITS, DOES_NOT_FIT, CANNOT_SAY = 0, 1, 2


@dataclass(frozen=True)
class MatchedModule:
    """One module of the model that the adapter would change.

    Parameters
    ----------
    module : str
        Its path.
    lora_rank : int
        The adapter's rank there.
    scaling : float
        What the adapter's product is multiplied by.
    num_bytes : int
        Of A and B in the model's dtype; an A that several modules share counts for the first of them.
    """

    module: str
    lora_rank: int
    scaling: float
    num_bytes: int

    @property
    def kind(self) -> str:
        """The last component of the path."""
        return self.module.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class CheckReport:
    """What the command prints.

    Parameters
    ----------
    path : str
        The adapter, as the user gave it.
    model : str
        The model, as the user gave it.
    dtype : str
        The model's.
    problems : list of str
        Why it would be refused; empty = it fits.
    modules : list of MatchedModule
        Ordered by path; empty where there are problems.
    num_bytes : int
        Of the whole adapter on the device, alignment included.
    content_digest : str
        As `/v1/loras` shows it.
    """

    path: str
    model: str
    dtype: str
    problems: list[str]
    modules: list[MatchedModule]
    num_bytes: int = 0
    content_digest: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-serve adapter check` to a parser."""
    defaults = EngineConfig(model="MODEL")
    parser.add_argument("path", metavar="PATH", help="the adapter, as --lora-modules takes it")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a Hugging Face directory or hub id; not its weights"
    )
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        metavar="N",
        default=defaults.max_lora_rank,
        help="as the server has it (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=defaults.dtype, help="auto = the checkpoint's (default: auto)"
    )
    adapter_source_options.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every module")


def main(args: argparse.Namespace) -> int:
    """Check an adapter and print what was found.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options of `add_arguments`.

    Returns
    -------
    int
        The exit status: 0 = it fits, 1 = it would be refused, 2 = the model or an option is wrong.
    """
    from lora_serve.lora.sources import AdapterSources

    try:
        if args.max_lora_rank < 1:
            raise InvalidArgumentError(f"--max-lora-rank is {args.max_lora_rank} but must be at least 1")
        sources = AdapterSources(
            allowed_roots=args.lora_allowed_roots,
            allow_hub=args.lora_allow_hub,
            resolvers=args.lora_resolvers,
        )
        decoder = _describe_model(args.model, args.dtype)
    except LoraServeError as error:
        print(f"lora-serve: error: {error}", file=sys.stderr)
        return CANNOT_SAY
    report = check_adapter(args.path, args.model, decoder, sources, args.max_lora_rank)
    print(json.dumps(_to_json(report), indent=2) if args.json else _to_text(report))
    return DOES_NOT_FIT if report.problems else FITS


def check_adapter(
    path: str, model: str, decoder: DecoderModel, sources: AdapterSources, max_lora_rank: int
) -> CheckReport:
    """Do what a load does up to the device: locate, match, check every number.

    Parameters
    ----------
    path, model : str
        As the user gave them.
    decoder : DecoderModel
        On any device; only its shapes are used.
    sources : AdapterSources
        Where adapters may come from.
    max_lora_rank : int
        Largest accepted rank.
    """
    import torch

    from lora_serve.lora.load_problems import AdapterProblemsError
    from lora_serve.lora.peft_adapter import check_peft_adapter
    from lora_serve.lora.peft_modules import AdapterLimits
    from lora_serve.lora.peft_reader import read_into

    dtype = decoder.config.dtype
    dtype_name = str(dtype).removeprefix("torch.")
    targets = decoder.lora_targets()
    try:
        folder = sources.locate(path)
        with check_peft_adapter(
            folder.path,
            targets,
            AdapterLimits(max_lora_rank=max_lora_rank, dtype=dtype),
            fused=decoder.fused_lora_targets(),
            name=path,
            resolve=folder.resolve,
        ) as checked:
            block = torch.empty(checked.layout.num_bytes, dtype=torch.uint8)
            digest = read_into(checked, block, threads=None, is_cancelled=lambda: False)
    except InvalidArgumentError as error:
        problems = list(error.problems) if isinstance(error, AdapterProblemsError) else [str(error)]
        return CheckReport(path, model, dtype_name, problems, [])
    modules = _matched_modules(checked.layout, targets, dtype)
    return CheckReport(path, model, dtype_name, [], modules, checked.layout.num_bytes, digest)


def _describe_model(model: str, dtype: str) -> DecoderModel:
    """The model on torch's meta device: shapes without memory, from its config.json alone."""
    import torch

    from lora_serve.models.config import read_model_config
    from lora_serve.models.decoder import DecoderModel
    from lora_serve.models.loader import resolve_model_directory

    config = read_model_config(resolve_model_directory(model, needs_weights=False), dtype)
    return DecoderModel(config, device=torch.device("meta"))


def _matched_modules(
    layout: AdapterLayout, targets: Mapping[str, LoRATarget], dtype: torch.dtype
) -> list[MatchedModule]:
    from lora_serve.lora.adapter_layout import matrix_shapes

    matched = []
    counted_a: set[int] = set()
    for entry in layout.modules:
        (rows_a, columns_a), (rows_b, columns_b) = matrix_shapes(targets[entry.module], entry.lora_rank)
        num_elements = rows_b * columns_b
        if entry.a_offset not in counted_a:
            num_elements += rows_a * columns_a
        counted_a.add(entry.a_offset)
        matched.append(
            MatchedModule(entry.module, entry.lora_rank, entry.scaling, num_elements * dtype.itemsize)
        )
    return matched


def _to_json(report: CheckReport) -> dict[str, object]:
    return {
        "path": report.path,
        "model": report.model,
        "dtype": report.dtype,
        "fits": not report.problems,
        "problems": report.problems,
        "lora_rank": max((module.lora_rank for module in report.modules), default=0),
        "num_bytes": report.num_bytes,
        "num_bytes_by_kind": {kind: _sum_bytes(found) for kind, found in _by_kind(report.modules).items()},
        "content_digest": report.content_digest,
        "modules": [asdict(module) for module in report.modules],
    }


def _to_text(report: CheckReport) -> str:
    if report.problems:
        title = f"{report.path} cannot be served by {report.model}:"
        return "\n".join([title, *(f"  - {problem}" for problem in report.problems)])
    rows = [("modules", "number", "layers", "rank", "scaling", "bytes")]
    for kind, found in _by_kind(report.modules).items():
        rows.append(
            (
                kind,
                str(len(found)),
                _ranges(_layers(found)),
                _distinct(str(module.lora_rank) for module in found),
                _distinct(f"{module.scaling:.6g}" for module in found),
                f"{_sum_bytes(found):,}",
            )
        )
    rows.append(("in all, aligned", str(len(report.modules)), "", "", "", f"{report.num_bytes:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    title = f"{report.path} fits {report.model} ({report.dtype}):"
    return "\n".join([title, *lines, f"  content {report.content_digest}"])


def _by_kind(modules: Iterable[MatchedModule]) -> dict[str, list[MatchedModule]]:
    kinds: dict[str, list[MatchedModule]] = {}
    for module in modules:
        kinds.setdefault(module.kind, []).append(module)
    return kinds


def _sum_bytes(modules: Iterable[MatchedModule]) -> int:
    return sum(module.num_bytes for module in modules)


def _layers(modules: Iterable[MatchedModule]) -> list[int]:
    from lora_serve.lora.peft_keys import layer_index

    layers = (layer_index(module.module) for module in modules)
    return sorted(layer for layer in layers if layer is not None)


def _ranges(numbers: list[int]) -> str:
    """Such as "0-3, 5" for 0, 1, 2, 3 and 5; "-" for none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs) or "-"


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))
