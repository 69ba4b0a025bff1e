"""Find the launch parameters of the LoRA kernels with which whole layers take least, on this GPU.

`tune_lora.py` times shrink and expand alone. In a step they run among the norms and products of the base
model, and what is best alone may hold those up, or be hidden behind them. So here steps of six layers of
Qwen3-8B are timed as a whole (`bench_lora_layers`). The launch of one kernel is changed at a time, and all
its candidates are timed in turn in one run. The one that costs least on average over the steps is timed again
beside what was in use; if it still gains, it is kept for the kernels that follow. A candidate whose layers
are further from what torch gives than those in use is out.

A candidate is a table with rows of its own in it, read as the package reads its tables. A row holds for a
class of T, so all numbers of tokens must be of one class, of up to 2,048 tokens. Workers compile ahead,
side by side. The table of this GPU is written after each kernel, with all that it had before: run this
after `tune_lora.py`.

    python scripts/tune_lora_layers.py --out DIR --tokens 256 512 --lora-rank 16 --adapters 8 32 64
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "kernels"))
import bench_lora_layers as bench

from lora_serve.kernels import tuned_tables
from lora_serve.kernels.lora_delta import FEW_TOKENS
from lora_serve.kernels.triton_lora_tiles import (
    choose_num_parts,
    choose_shrink_tiles,
    clear_choices,
    token_class,
)
from lora_serve.kernels.tuned_lora_tiles import ShrinkTiles, TunedShrink
from lora_tile_candidates import (
    expands_in_layers,
    rotary_store_candidates,
    shrink_candidates,
    silu_mul_candidates,
)
from tune_lora import TableFile, with_row

KERNELS = ("silu", "rotary", "qkv", "o", "down", "o_shrink", "down_shrink", "qkv_shrink", "gate_up_shrink")
"""In the order in which they are tried; "qkv", "o" and "down" are their expands, with each number of parts.

Up to `MOST_TOKENS_BESIDE` tokens have an expand of queries, keys and values. Longer steps have it in the
rotary kernel: there only the number of parts of "qkv" counts, and its tiles are chance.
"""
NOW = "now"
LEAST_GAIN_US = 0.3  # of a layer, on average
CONFIRMATIONS = 3  # times as many repetitions before a table is kept: the best of many may be so by chance
MOST_TOKENS = 2048  # of a step: in longer ones the clock changes more than a launch does
MOST_ERROR = 1.5  # times that of the table in use, which other orders of adding up do not reach

Table = dict[str, Any]
Times = dict[tuple[int, int], float]
"""Microseconds of a layer over base, by tokens of the step and adapters in it."""


@dataclass(frozen=True)
class Search:
    """What all candidates have in common: class of T and rank of their rows, and one of the layers."""

    max_tokens: int
    max_rank: int
    layer: Any

    def candidates(self, kernel: str, table: Table) -> dict[str, Table]:
        """Tables that differ from this one, which is in use, in one kernel; by what is different."""
        if kernel == "silu":
            launches = silu_mul_candidates(self.max_tokens, self.max_rank)
            return {str(launch): with_row(table, "lora_silu_mul", self._row(launch)) for launch in launches}
        if kernel == "rotary":
            head_dim = self.layer.self_attn.head_dim
            return {
                str(launch): with_row(table, "lora_rotary_store", self._row(launch, head_dim=head_dim))
                for launch in rotary_store_candidates(self.max_tokens, self.max_rank)
            }
        qkv, o, gate_up, down = self.layer.packed_linears()
        linears = {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}
        if kernel in linears:
            return self._expands(table, linears[kernel])
        return self._shrinks(table, linears[kernel.removesuffix("_shrink")], kernel)

    def _expands(self, table: Table, linear: Any) -> dict[str, Table]:
        num_slices, out_features = len(linear.output_slices), sum(linear.output_slices)
        size = (self.max_tokens, linear.in_features, self.max_rank, self._element_size)
        shrink = choose_shrink_tiles(*size, num_slices)
        found = {}
        for num_parts, tiles in expands_in_layers(self.max_tokens, self.max_rank):
            layer = {"out_features": out_features, "num_slices": num_slices, "num_parts": num_parts}
            changed = with_row(table, "lora_expand", self._row(tiles, **layer))
            found[f"{num_parts} parts, {tiles}"] = self._with_shrink(changed, linear, num_parts, shrink)
        return found

    def _shrinks(self, table: Table, linear: Any, kernel: str) -> dict[str, Table]:
        size = (self.max_tokens, len(linear.output_slices), linear.in_features, self.max_rank)
        num_parts = choose_num_parts(*size, self._element_size)
        max_tokens, num_slices, *others = size
        now = choose_shrink_tiles(max_tokens, *others, self._element_size, num_slices)
        # Which programs start first matters beside other kernels alone: tried here, with the tiles in use.
        in_other_order = TunedShrink(num_parts, replace(now, tiles_first=not now.tiles_first))
        return {
            f"{found.num_parts} parts, {found.tiles}": self._with_shrink(
                table, linear, found.num_parts, found.tiles
            )
            for found in (in_other_order, *shrink_candidates(*size, self._element_size))
            # Rows of the expand hold for a number of parts; those of the silu kernel hold for all.
            if kernel == "gate_up_shrink" or found.num_parts == num_parts
        }

    def _with_shrink(self, table: Table, linear: Any, num_parts: int, tiles: ShrinkTiles) -> Table:
        layer = {"in_features": linear.in_features, "num_slices": len(linear.output_slices)}
        return with_row(table, "lora_shrink", self._row(tiles, **layer, num_parts=num_parts))

    def _row(self, tiles: Any, **others: int) -> dict[str, Any]:
        key = {"max_tokens": self.max_tokens, "max_rank": self.max_rank, "element_size": self._element_size}
        return others | key | {"tiles": asdict(tiles)}

    @property
    def _element_size(self) -> int:
        return int(self.layer.input_layernorm.weight.element_size())


@contextmanager
def using(table: Table) -> Iterator[None]:
    """The package reads this table and no other, and chooses by it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "table.json").write_text(json.dumps(table), encoding="utf-8")
        with patch.object(tuned_tables, "TUNING_FOLDER", Path(folder)):
            clear_choices()
            try:
                yield
            finally:
                clear_choices()


class Steps:
    """The steps that candidates are timed in."""

    def __init__(self, layers: list[Any], config: Any, options: argparse.Namespace) -> None:
        self._steps = [bench.Step(layers, config, tokens) for tokens in options.tokens]
        max_loras = max(bench.MAX_LORAS, *options.adapters)
        self._adapters = [
            bench.Adapters(layers, count, options.lora_rank, max_loras) for count in options.adapters
        ]

    def times(self, tables: dict[str, Table], repetitions: int) -> dict[str, Times]:
        """Those of every table whose layers are right in all steps; the first is the table in use.

        Raises ``RuntimeError`` where the layers are wrong with that.
        """
        found: dict[str, Times] = {name: {} for name in tables}
        for step in self._steps:
            for adapters in self._adapters:
                times = self._time(step, adapters, {name: tables[name] for name in found}, repetitions)
                for name, us in times.items():
                    found[name][step.num_tokens, adapters.num_adapters] = us
                found = {name: found[name] for name in times}
        return found

    def compile(self, tables: Sequence[Table]) -> None:
        """Run each once, so that its kernels are in Triton's cache; what is wrong with one shows later."""
        for step in self._steps:
            for adapters in self._adapters:
                for table in tables:
                    _try_run(step, adapters, table, bench.LARGEST_ERROR, captures=False)

    def _time(self, step: Any, adapters: Any, tables: dict[str, Table], repetitions: int) -> dict[str, float]:
        base = bench.Variant(step, "base", None)
        base.run()
        if base.is_cuda:
            base.capture()
        found, most_error = {}, bench.LARGEST_ERROR
        for name, table in tables.items():
            ours = _try_run(step, adapters, table, most_error, captures=True)
            if ours is None and not found:
                raise RuntimeError(f"the layers are wrong with table {name!r}: nothing can be compared to it")
            if ours is None:
                print(f"out: {name}", flush=True)
                continue
            if not found:
                most_error = min(most_error, MOST_ERROR * ours[1])
            found[name] = ours[0]
        for _ in range(repetitions):
            step.restart()
            for variant in (base, *found.values()):
                _time_once(variant)
        # Of each repetition by itself: what the GPU's clock does comes to all of its variants.
        return {
            name: median(
                ours - without for ours, without in zip(variant.times_us, base.times_us, strict=True)
            )
            for name, variant in found.items()
        }


def _try_run(
    step: Any, adapters: Any, table: Table, most_error: float, captures: bool
) -> tuple[Any, float] | None:
    """A variant with this table, ready to be timed, and its error; None where that is large, or it fails."""
    variant = bench.Variant(step, "ours", adapters)
    with using(table):
        try:
            step.spoil()
            result = variant.run()
            if captures and variant.is_cuda:
                variant.capture()
                step.spoil()
                variant.graph.replay()
                result = variant.result
            error = variant.error_of(result)
        except Exception as problem:  # of the compiler, or of the GPU's memory: it is out
            print(f"{type(problem).__name__}: {str(problem)[:200]}", flush=True)
            return None
    if error <= most_error:
        return variant, error
    print(f"off by {error} of what the adapters change, {most_error} is allowed", flush=True)
    return None


def _time_once(variant: Any) -> None:
    if variant.is_cuda:
        variant.time()
    else:
        start = time.perf_counter()
        variant.run()
        variant.times_us.append((time.perf_counter() - start) * 1e6)


def choose(times: dict[str, Times]) -> str:
    """The table with the smallest mean, or the one in use where that gains nothing worth speaking of."""
    best = min(times, key=lambda name: fmean(times[name].values()))
    return best if fmean(times[best].values()) < fmean(times[NOW].values()) - LEAST_GAIN_US else NOW


def print_times(title: str, times: dict[str, Times]) -> None:
    print(f"\n{title}\n    mean  " + "  ".join(f"T {t}, {n} adapters" for t, n in times[NOW]))
    for name in sorted(times, key=lambda name: fmean(times[name].values())):
        columns = "  ".join(f"{us:+15.2f}" for us in times[name].values())
        print(f"{fmean(times[name].values()):8.2f}  {columns}  {name}", flush=True)


def with_times(table: Table, before: Table, times: Times, lora_rank: int) -> Table:
    """The table with what layers take now in every row that is new."""
    said = {
        f"a layer over base, {tokens} tokens, {adapters} adapters of rank {lora_rank}": round(us, 2)
        for (tokens, adapters), us in times.items()
    }
    return {
        kernel: [row if row in before.get(kernel, []) else row | {"time_us": said} for row in rows]
        if isinstance(rows, list)
        else rows
        for kernel, rows in table.items()
    }


def tune(search: Search, steps: Steps, file: TableFile, options: argparse.Namespace) -> None:
    """Write the table with the rows that are kept, after one kernel after the other."""
    for kernel in options.kernels:
        with using(file.table):
            tables = {NOW: file.table} | search.candidates(kernel, file.table)
        times = steps.times(tables, options.repetitions)
        print_times(kernel, times)
        best = choose(times)
        if best == NOW:
            continue
        both = {NOW: tables[NOW], best: tables[best]}
        times = steps.times(both, CONFIRMATIONS * options.repetitions)
        print_times(f"{kernel} again", times)
        if choose(times) == best:
            file.table = with_times(tables[best], tables[NOW], times[best], options.lora_rank)
            file.write()


def compile_ahead(arguments: Sequence[str], workers: int) -> None:
    """Run this program side by side, each with a share of the candidates of the table in use."""
    command = [sys.executable, __file__, *arguments]
    shares = [subprocess.Popen([*command, "--share", f"{index}/{workers}"]) for index in range(workers)]
    for index, share in enumerate(shares):
        if status := share.wait():
            print(f"worker {index} ended with {status}: its kernels are compiled later", flush=True)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that the table is written to")
    parser.add_argument("--smallest", action="store_true", help="tiny layers on the CPU")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 512], help="of one class of T")
    parser.add_argument("--lora-rank", type=int, default=16, help="--max-lora-rank of engines")
    parser.add_argument("--adapters", nargs="+", type=int, default=[8, 32, 64], help="in a step")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="to be tuned")
    parser.add_argument("--repetitions", type=int, default=15, help="of each candidate in each step")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile ahead")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smallest:
        options.tokens, options.adapters, options.workers = [33, 40], [2], 0
    classes = sorted({token_class(tokens) for tokens in options.tokens})
    if len(classes) > 1:
        parser.error(f"--tokens {options.tokens} are of the classes up to {classes}, expected one class")
    if classes[0] <= FEW_TOKENS:
        parser.error(f"--tokens {options.tokens}: up to {FEW_TOKENS} other kernels run, expected more")
    if classes[0] > MOST_TOKENS:
        parser.error(
            f"--tokens {options.tokens}: the GPU's clock changes more within such steps than a launch does, "
            f"expected at most {MOST_TOKENS}; tune_lora.py tunes the kernels of longer steps alone"
        )
    if max(options.adapters) > min(options.tokens):
        parser.error(f"--adapters {max(options.adapters)} do not fit a step of {min(options.tokens)} tokens")
    return options


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    if not torch.cuda.is_available() and not options.smallest:
        sys.exit("this needs a GPU; --smallest runs on the CPU")
    if options.workers and not options.share:
        compile_ahead(given, options.workers)
    with patch.object(bench, "NUM_LAYERS", 1 if options.share else bench.NUM_LAYERS):
        config = bench.make_config(options.smallest)
        layers = bench.make_layers(config, torch.device("cpu" if options.smallest else "cuda"))
        search = Search(token_class(options.tokens[0]), options.lora_rank, layers[0])
        file = TableFile(options.out, "none" if options.smallest else torch.cuda.get_device_name())
        steps = Steps(layers, config, options)
        if options.share:
            index, count = map(int, options.share.split("/"))
            found = [search.candidates(kernel, file.table).values() for kernel in options.kernels]
            steps.compile([table for tables in found for table in tables][index::count])
            return 0
        tune(search, steps, file, options)
    print(f"{file.path}: class of up to {search.max_tokens} tokens, ranks up to {search.max_rank}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
