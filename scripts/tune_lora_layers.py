"""Find the launch parameters of the LoRA kernels with which whole layers take least, on this GPU.

`tune_lora.py` times shrink and expand alone. In a step they run among the norms and products of the base
model, and what is best alone may hold those up, or be hidden behind them. So here steps of six layers of
Qwen3-8B are timed as a whole (`bench_lora_layers`). The launch of one kernel is changed at a time, all its
candidates are timed in turn in one run, and the one that costs least on average over the steps is kept for
the kernels that follow. A candidate whose layers do not give what torch gives is out.

A candidate is a table with rows of its own in it, read as the package reads its tables. A row holds for a
class of T, so all numbers of tokens must be of one class. Processes compile ahead, side by side. What was
kept is written as the table of this GPU, with all that the package has in its own.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "kernels"))
import bench_lora_layers as bench
from timing import percentiles

from lora_serve.kernels import tuned_tables
from lora_serve.kernels.triton_lora_tiles import (
    choose_num_parts,
    choose_shrink_tiles,
    clear_choices,
    token_class,
)
from lora_serve.kernels.tuned_lora_tiles import (
    ExpandTiles,
    LoRARotaryStoreLaunch,
    LoRASiluMulLaunch,
    ShrinkTiles,
)
from lora_tile_candidates import shrink_candidates
from tune_lora import TableFile, with_row

KERNELS = ("silu", "rotary", "o_and_down", "o", "down", "qkv", "gate_up")
"""In the order in which they are tried; "o_and_down" are their expands with each number of parts, the four
projections their shrinks."""
NOW = "now"
LEAST_GAIN_US = 0.3  # of a layer, on average: less is noise

PARTS = (2, 4, 8)
# block_t, block_n, n_tiles, num_stages
_EXPAND = (
    (16, 128, 1, 1),
    (16, 128, 2, 2),
    (16, 128, 4, 3),
    (16, 64, 4, 3),
    (16, 256, 1, 1),
    (32, 128, 1, 1),
    (32, 128, 2, 2),
    (64, 64, 2, 2),
)
_SILU_MUL = (
    (16, 64, 4, 2),
    (16, 64, 4, 3),
    (16, 64, 8, 3),
    (16, 128, 4, 2),
    (32, 64, 4, 2),
    (32, 64, 8, 3),
    (64, 32, 8, 3),
)
# block_t, heads, num_stages
_ROTARY_STORE = ((16, 1, 1), (16, 2, 2), (16, 4, 2), (16, 4, 3), (32, 2, 2), (32, 4, 3), (64, 4, 3))

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
            return self._with_silu_mul(table)
        if kernel == "rotary":
            return self._with_rotary_store(table)
        qkv, o, gate_up, down = self.layer.packed_linears()
        if kernel == "o_and_down":
            return self._with_expand(table, (o, down))
        linear = {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}[kernel]
        size = (self.max_tokens, len(linear.output_slices), linear.in_features, self.max_rank)
        num_parts = choose_num_parts(*size, self._element_size)
        return {
            f"{found.num_parts} parts, {found.tiles}": self._with_shrink(
                table, linear, found.num_parts, found.tiles
            )
            for found in shrink_candidates(*size, self._element_size)
            # The expands of o and down were chosen for a number of parts.
            if kernel in ("qkv", "gate_up") or found.num_parts == num_parts
        }

    @property
    def _element_size(self) -> int:
        return int(self.layer.input_layernorm.weight.element_size())

    @property
    def _block_r(self) -> int:
        return min(max(1 << (self.max_rank - 1).bit_length(), 16), 128)

    def _row(self, tiles: Any, **others: int) -> dict[str, Any]:
        key = {"max_tokens": self.max_tokens, "max_rank": self.max_rank, "element_size": self._element_size}
        return others | key | {"tiles": asdict(tiles)}

    def _with_silu_mul(self, table: Table) -> dict[str, Table]:
        launches = [
            LoRASiluMulLaunch(block_t, block_n, self._block_r, n_tiles, 4, num_stages)
            for block_t, block_n, n_tiles, num_stages in _SILU_MUL
        ]
        return {str(launch): with_row(table, "lora_silu_mul", self._row(launch)) for launch in launches}

    def _with_rotary_store(self, table: Table) -> dict[str, Table]:
        head_dim = self.layer.self_attn.head_dim
        launches = [
            LoRARotaryStoreLaunch(block_t, self._block_r, heads, 4, num_stages)
            for block_t, heads, num_stages in _ROTARY_STORE
        ]
        return {
            str(launch): with_row(table, "lora_rotary_store", self._row(launch, head_dim=head_dim))
            for launch in launches
        }

    def _with_expand(self, table: Table, linears: Sequence[Any]) -> dict[str, Table]:
        found = {}
        for num_parts in PARTS:
            for block_t, block_n, n_tiles, num_stages in _EXPAND:
                tiles = ExpandTiles(block_t, block_n, self._block_r, 4, False, n_tiles, num_stages)
                changed = table
                for linear in linears:
                    num_slices, out_features = len(linear.output_slices), sum(linear.output_slices)
                    size = (self.max_tokens, linear.in_features, self.max_rank, self._element_size)
                    shrink = choose_shrink_tiles(*size, num_slices)
                    changed = self._with_shrink(changed, linear, num_parts, shrink)
                    layer = {"out_features": out_features, "num_slices": num_slices, "num_parts": num_parts}
                    changed = with_row(changed, "lora_expand", self._row(tiles, **layer))
                found[f"{num_parts} parts, {tiles}"] = changed
        return found

    def _with_shrink(self, table: Table, linear: Any, num_parts: int, tiles: ShrinkTiles) -> Table:
        layer = {"in_features": linear.in_features, "num_slices": len(linear.output_slices)}
        return with_row(table, "lora_shrink", self._row(tiles, **layer, num_parts=num_parts))


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
        self._adapters = [bench.Adapters(layers, count, options.lora_rank) for count in options.adapters]
        self._repetitions = options.repetitions

    def times(self, tables: dict[str, Table]) -> dict[str, Times]:
        """Those of every table whose layers are right in all steps."""
        found: dict[str, Times] = {name: {} for name in tables}
        for step in self._steps:
            for adapters in self._adapters:
                still_in = {name: tables[name] for name in found}
                times = self._time(step, adapters, still_in)
                for name, us in times.items():
                    found[name][step.num_tokens, adapters.num_adapters] = us
                found = {name: found[name] for name in times}
        return found

    def compile(self, tables: list[Table]) -> None:
        """Run each once, so that its kernels are in Triton's cache; what is wrong with one shows later."""
        for step in self._steps:
            for adapters in self._adapters:
                for table in tables:
                    _try_run(step, adapters, table)

    def _time(self, step: Any, adapters: Any, tables: dict[str, Table]) -> dict[str, float]:
        base = bench.Variant(step, "base", None)
        base.run()
        ours = {}
        for name, table in tables.items():
            variant = _try_run(step, adapters, table)
            if variant is None:
                print(f"out: {name}", flush=True)
                continue
            ours[name] = variant
            if torch.cuda.is_available():
                with using(table):
                    variant.capture()
        if torch.cuda.is_available():
            base.capture()
        for _ in range(self._repetitions):
            step.restart()
            for variant in (base, *ours.values()):
                _time_once(variant)
        base_us = percentiles(base.times_us)[1]
        return {name: percentiles(variant.times_us)[1] - base_us for name, variant in ours.items()}


def _try_run(step: Any, adapters: Any, table: Table) -> Any | None:
    """A variant that gave what torch gives, with this table; None where it did not, or does not fit."""
    variant = bench.Variant(step, "ours", adapters)
    with using(table):
        try:
            step.restart()
            variant.check(variant.run() + step.residual)
        except Exception as error:  # of the compiler, of the GPU's memory, or a wrong result: it is out
            print(f"{type(error).__name__}: {str(error)[:200]}", flush=True)
            return None
    return variant


def _time_once(variant: Any) -> None:
    if torch.cuda.is_available():
        variant.time()
    else:
        start = time.perf_counter()
        variant.run()
        variant.times_us.append((time.perf_counter() - start) * 1e6)


def mean_us(times: Times) -> float:
    return sum(times.values()) / len(times)


def choose(times: dict[str, Times]) -> str:
    """The table with the smallest mean, or the one in use where that gains nothing worth speaking of.

    Raises ``ValueError`` where the one in use is out.
    """
    if NOW not in times:
        raise ValueError("the layers are wrong with the table in use: nothing can be compared with it")
    best = min(times, key=lambda name: mean_us(times[name]))
    return best if mean_us(times[best]) < mean_us(times[NOW]) - LEAST_GAIN_US else NOW


def print_times(kernel: str, times: dict[str, Times], chosen: str) -> None:
    print(f"\n{kernel}: {chosen}\n    mean  " + "  ".join(f"T {t}, {n} adapters" for t, n in times[NOW]))
    for name in sorted(times, key=lambda name: mean_us(times[name])):
        columns = "  ".join(f"{us:+15.2f}" for us in times[name].values())
        print(f"{mean_us(times[name]):8.2f}  {columns}  {name}", flush=True)


def with_times(table: Table, before: Table, times: Times, lora_rank: int) -> Table:
    """The table with what layers took in the end in every row that is new."""
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


def tune(search: Search, steps: Steps, table: Table, options: argparse.Namespace) -> Table:
    """The table with the rows that were kept, one kernel after the other."""
    before, last = table, None
    for kernel in options.kernels:
        with using(table):
            tables = {NOW: table} | search.candidates(kernel, table)
        times = steps.times(tables)
        chosen = choose(times)
        print_times(kernel, times, chosen)
        table, last = tables[chosen], times[chosen]
    return with_times(table, before, last, options.lora_rank) if last else table


def compile_ahead(arguments: Sequence[str], workers: int) -> None:
    """Run this program side by side, each with a part of the candidates of the table in use."""
    command = [sys.executable, __file__, *arguments]
    parts = [subprocess.Popen([*command, "--part", f"{index}/{workers}"]) for index in range(workers)]
    for part in parts:
        part.wait()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that the table is written to")
    parser.add_argument("--smallest", action="store_true", help="tiny layers on the CPU")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 512], help="of one class of T")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--adapters", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--workers", type=int, default=14, help="processes that compile ahead")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smallest:
        options.tokens, options.adapters, options.workers = [5, 7], [2], 0
    classes = sorted({token_class(tokens) for tokens in options.tokens})
    if len(classes) > 1:
        parser.error(f"--tokens {options.tokens} are of the classes up to {classes}, expected one class")
    if max(options.adapters) > min(options.tokens):
        parser.error(f"--adapters {max(options.adapters)} do not fit a step of {min(options.tokens)} tokens")
    return options


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.smallest:
        sys.exit("this needs a GPU; --smallest runs on the CPU")
    if options.workers and not options.part:
        compile_ahead(given, options.workers)
    num_layers = 1 if options.part else bench.NUM_LAYERS
    with patch.object(bench, "NUM_LAYERS", num_layers):
        config = bench.make_config(options.smallest)
        layers = bench.make_layers(config, torch.device("cuda" if has_gpu else "cpu"))
        search = Search(token_class(options.tokens[0]), options.lora_rank, layers[0])
        file = TableFile(options.out, torch.cuda.get_device_name() if has_gpu else "interpreter")
        steps = Steps(layers, config, options)
        if options.part:
            index, count = map(int, options.part.split("/"))
            tables = [t for kernel in options.kernels for t in search.candidates(kernel, file.table).values()]
            steps.compile(tables[index::count])
            return 0
        file.table = tune(search, steps, file.table, options)
    file.write()
    print(f"{file.path}: class of up to {search.max_tokens} tokens, ranks up to {search.max_rank}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
