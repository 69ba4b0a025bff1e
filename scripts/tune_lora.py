"""Find the launch parameters of the LoRA shrink and expand on this GPU, for the layers of a model.

Every candidate is checked against fp64 before it is timed; one that is wrong, or does not fit the GPU, is
out. Times are those of CUDA graph replays over layers whose weights do not fit the caches. A row of the table
holds for a class of T, whatever the adapters: the pair of shrink and expand is taken that loses least against
the best one at each number of adapters, half on average and half at worst. The number of parts belongs to
both halves, so that they are chosen together.

For the projections whose expand is a kernel of its own (o and down), and from 33 tokens on: up to 32 the
shrink runs beside the base product, and what is best for it alone would be in the way there.

What matters most comes first, and the table is written after each layer, so that a time limit loses little.
Workers compile ahead of the measurements. The tables of this GPU that the package has are carried over; a row
for the same layer, class of T and rank is replaced, whether it was faster or not.

    python scripts/tune_lora.py --out DIR [--ranks 64 16] [--tokens 128 512] [--shapes qwen3-8b]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import multiprocessing.pool
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "kernels"))
from kernel_bench import copy_rate_gb_per_s, triton_version

from lora_serve.kernels.lora_delta import FEW_TOKENS
from lora_serve.kernels.reference import ReferenceResult
from lora_serve.kernels.triton_lora_tiles import token_class, trial_tiles
from lora_serve.kernels.tuned_lora_tiles import ExpandTiles, TunedShrink
from lora_serve.kernels.tuned_tables import TUNING_FOLDER, read_table
from lora_tile_trials import (
    Compilation,
    Point,
    Shape,
    Task,
    count_wrong,
    element_size_here,
    trial_of,
    try_once,
)

MODELS: dict[str, list[Shape]] = {
    "qwen3-8b": [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (12288, 12288)), (12288, (4096,))],
    "llama3-8b": [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))],
    "qwen3-32b": [(5120, (8192, 1024, 1024)), (8192, (5120,)), (5120, (25600, 25600)), (25600, (5120,))],
    "llama3-70b": [(8192, (8192, 1024, 1024)), (8192, (8192,)), (8192, (28672, 28672)), (28672, (8192,))],
    "smallest": [(40, (24, 8))],
}
RANKS = (64, 16)
FIRST_TOKENS, MORE_TOKENS = (128, 4096, 16384), (512, 2048)
ADAPTERS = (8, 32, 1)
HOPELESS = 3.0  # times the best of a point: not measured at the others
PATIENCE_S = 45.0  # without any answer: whatever is waited for is given up

Times = dict[Any, list[float]]
"""Microseconds of each candidate at each point; infinite where it is out."""


class Answers(Protocol):
    """What the workers say of each compilation: "" or a problem."""

    def next(self, timeout: float) -> tuple[Compilation, str]:
        """The next answer; ``multiprocessing.TimeoutError`` where there is none yet."""


class OutOfTimeError(Exception):
    """The time limit has passed."""


class Tuner:
    """Waits for what the workers compile, checks, times, chooses."""

    def __init__(self, deadline: float, compiled: Answers | None) -> None:
        self._deadline = deadline
        self._compiled = compiled
        self._problems: dict[Compilation, str] = {}

    def run(self, task: Task, part_cost_us: float) -> Choice:
        """Raises `OutOfTimeError`."""
        element_size = element_size_here()
        for wanted in task.compilations(element_size):
            self._wait_for(wanted)
        points = [Point(task, *point) for point in task.points()]
        shrinks: Times = {shrink: [] for shrink in task.shrinks(element_size)}
        for point in points:
            self._time_point(shrinks, partial(self._shrink_us, task, point))
        all_parts, all_tiles = useful_parts(shrinks, part_cost_us), task.expands(element_size)
        expands: Times = {(parts, tiles): [] for parts in all_parts for tiles in all_tiles}
        for point in points:
            exact = {parts: point.exact_expand(parts) for parts, _ in expands}
            self._time_point(expands, partial(self._expand_us, task, point, exact))
        return choose(task, shrinks, expands, part_cost_us)

    def _wait_for(self, wanted: Compilation) -> None:
        patient_until = time.monotonic() + PATIENCE_S
        while self._compiled is not None and wanted not in self._problems:
            self._check_time()
            try:
                done, problem = self._compiled.next(timeout=1.0)
            except multiprocessing.TimeoutError:
                if time.monotonic() < patient_until:
                    continue
                done, problem = wanted, "no answer"
            patient_until = time.monotonic() + PATIENCE_S
            self._problems[done] = problem
            if problem:
                print(f"out: {done}: {problem}", flush=True)

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise OutOfTimeError

    def _time_point(self, times: Times, measure: Callable[[Any], float]) -> None:
        bests = [min(column) for column in zip(*times.values(), strict=True)]
        for candidate, so_far in times.items():
            self._check_time()
            is_out = any(ours > HOPELESS * best for ours, best in zip(so_far, bests, strict=True))
            so_far.append(math.inf if is_out or math.inf in so_far else measure(candidate))

    def _shrink_us(self, task: Task, point: Point, shrink: TunedShrink) -> float:
        if self._problems.get(task.compilation(shrink.num_parts, shrink.tiles)):
            return math.inf
        v = torch.full_like(point.v(shrink.num_parts), float("nan"))
        with trial_tiles(trial_of(shrink.tiles)):
            point.shrink(v, 0)
            total = v[0] if len(v) == 1 else v.double().sum(0).float()
            if is_wrong(count_wrong(total, point.exact_shrink), task, shrink):
                return math.inf
            return point.time_us(partial(point.shrink, v))

    def _expand_us(
        self,
        task: Task,
        point: Point,
        exact: dict[int, ReferenceResult],
        expand: tuple[int, ExpandTiles],
    ) -> float:
        num_parts, tiles = expand
        if self._problems.get(task.compilation(num_parts, tiles)):
            return math.inf
        v, y = point.v(num_parts), point.y.clone()
        with trial_tiles(trial_of(tiles)):
            point.expand(v, y, 0)
            if is_wrong(count_wrong(y, exact[num_parts]), task, expand):
                return math.inf
            return point.time_us(partial(point.expand, v, None))


def is_wrong(num_wrong: int, task: Task, candidate: object) -> bool:
    if num_wrong:
        print(f"out: {candidate}: {num_wrong} numbers of {task} are wrong", flush=True)
    return num_wrong > 0


def useful_parts(shrinks: Times, part_cost_us: float) -> list[int]:
    """Numbers of parts whose shrink is faster than that of every smaller number, at some point."""
    best: dict[int, list[float]] = {}
    for shrink, times in shrinks.items():
        costs = [us + part_cost_us * shrink.num_parts for us in times]
        best[shrink.num_parts] = list(map(min, best.get(shrink.num_parts, costs), costs))
    useful: list[int] = []
    for parts in sorted(best):
        smaller = [min(column) for column in zip(*(best[few] for few in useful), strict=True)]
        if not smaller or any(ours < least for ours, least in zip(best[parts], smaller, strict=True)):
            useful.append(parts)
    return useful


@dataclass(frozen=True)
class Choice:
    """The best pair of a task, with the times of both halves, and the default's, at each point."""

    task: Task
    shrink: TunedShrink
    expand: ExpandTiles
    shrink_us: list[float]
    expand_us: list[float]
    default_us: list[float]
    """Of both halves; empty where the default's parts were not worth an expand."""


def choose(task: Task, shrinks: Times, expands: Times, part_cost_us: float) -> Choice:
    """The pair that loses least; ``ValueError`` where every candidate is out."""
    pairs = [
        (shrink, tiles, [a + b + part_cost_us * parts for a, b in zip(first, second, strict=True)])
        for shrink, first in shrinks.items()
        for (parts, tiles), second in expands.items()
        if parts == shrink.num_parts
    ]
    best = [min(column) for column in zip(*(times for _, _, times in pairs), strict=True)]
    if not best or all(math.inf in times for _, _, times in pairs):
        raise ValueError(f"no candidate of {task} is right and fast everywhere")

    def loss(times: Sequence[float]) -> float:
        ratios = [ours / least for ours, least in zip(times, best, strict=True)]
        return max(ratios) / 2 + sum(ratios) / len(ratios) / 2

    shrink, tiles, _ = min(pairs, key=lambda pair: loss(pair[2]))
    first_shrink, first_expand = next(iter(shrinks)), task.expands(element_size_here())[0]
    default = expands.get((first_shrink.num_parts, first_expand), [])
    default_us = [a + b for a, b in zip(shrinks[first_shrink], default, strict=False)]
    return Choice(task, shrink, tiles, shrinks[shrink], expands[shrink.num_parts, tiles], default_us)


def print_choice(choice: Choice, gb_per_s: float) -> None:
    task, shrink = choice.task, choice.shrink
    in_features, widths = task.shape
    print(f"{task.shape} rank {task.max_rank}: {shrink} {choice.expand}")
    for index, (tokens, adapters) in enumerate(task.points()):
        weights = adapters * task.max_rank * sum(in_features + width for width in widths)
        moved = 2 * (weights + tokens * (in_features + 2 * sum(widths)))
        floor = f"{moved / gb_per_s / 1e3:.2f}" if gb_per_s else "-"
        default = f"{choice.default_us[index]:.2f}" if choice.default_us else "-"
        print(
            f"  T {tokens} adapters {adapters}: shrink {choice.shrink_us[index]:.2f} us, "
            f"expand {choice.expand_us[index]:.2f} us, default both {default} us, floor {floor} us",
            flush=True,
        )


def rows_of(choice: Choice, element_size: int) -> dict[str, dict[str, object]]:
    """One row for each table."""
    task, (in_features, widths) = choice.task, choice.task.shape
    layer = {
        "max_tokens": task.max_tokens,
        "max_rank": task.max_rank,
        "element_size": element_size,
        "num_slices": len(widths),
        "num_parts": choice.shrink.num_parts,
    }

    def times(values: list[float]) -> dict[str, float]:
        points = task.points()
        return {
            f"{tokens} tokens, {adapters} adapters": round(value, 2)
            for (tokens, adapters), value in zip(points, values, strict=True)
        }

    return {
        "lora_shrink": {
            "in_features": in_features,
            **layer,
            "tiles": asdict(choice.shrink.tiles),
            "time_us": times(choice.shrink_us),
        },
        "lora_expand": {
            "out_features": sum(widths),
            **layer,
            "tiles": asdict(choice.expand),
            "time_us": times(choice.expand_us),
        },
    }


class TableFile:
    """The table of this GPU: what earlier runs wrote there, else what the package has, with rows added or put
    in the place of older ones."""

    def __init__(self, folder: Path, gpu: str) -> None:
        name = re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"
        self.table: dict[str, Any] = {"gpu": gpu, "triton": triton_version()}
        for file in sorted(TUNING_FOLDER.glob("*.json")):
            table = read_table(file)
            if table["gpu"] == gpu:
                self.table, name = table, file.name
        self.path = folder / name
        if self.path.exists():
            table = read_table(self.path)
            if table["gpu"] != gpu:
                raise ValueError(f"{self.path} is a table of {table['gpu']!r}, expected one of {gpu!r}")
            self.table = table

    def put(self, rows: dict[str, dict[str, object]]) -> None:
        for kernel, row in rows.items():
            self.table = with_row(self.table, kernel, row)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.table, indent=1) + "\n", encoding="utf-8")


def with_row(table: dict[str, Any], kernel: str, row: dict[str, Any]) -> dict[str, Any]:
    """A table with this row in the place of the one that is found by the same."""
    kept = [old for old in table.get(kernel, []) if _key(kernel, old) != _key(kernel, row)]
    return table | {kernel: [*kept, row]}


def _key(kernel: str, row: dict[str, Any]) -> tuple[object, ...]:
    """By what a row is found: the number of parts is the shrink's answer and the expand's question."""
    is_answer = {"tiles", "time_us"} | ({"num_parts"} if kernel == "lora_shrink" else set())
    return tuple(sorted((name, value) for name, value in row.items() if name not in is_answer))


def shapes_of(names: Sequence[str]) -> list[Shape]:
    """Of models by name, and of layers as ``4096:12288,12288``; each once."""
    shapes: list[Shape] = []
    for name in names:
        if name in MODELS:
            shapes += MODELS[name]
        elif re.fullmatch(r"\d+:\d+(,\d+)*", name):
            in_features, widths = name.split(":")
            shapes.append((int(in_features), tuple(map(int, widths.split(",")))))
        else:
            raise ValueError(f"{name!r} is none of {list(MODELS)} and no layer as 4096:12288,12288")
    return list(dict.fromkeys(shapes))


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """In the order of their importance."""
    if options.smallest:
        return [Task(MODELS["smallest"][0], 8, tokens, (2, 1)) for tokens in ((1,), (5,))]
    first = [tokens for tokens in options.tokens if tokens not in MORE_TOKENS]
    more = [tokens for tokens in options.tokens if tokens in MORE_TOKENS]
    return [
        Task(shape, rank, tuple(tokens for tokens in some if token_class(tokens) == limit), ADAPTERS)
        for some in (first, more)
        for rank in options.ranks
        for limit in dict.fromkeys(map(token_class, some))
        for shape in shapes_of(options.shapes)
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that the table is written to")
    parser.add_argument("--smallest", action="store_true", help="one tiny layer, in the interpreter")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["qwen3-8b"],
        help=f"of {', '.join(MODELS)}, or layers as 5120:8192,1024",
    )
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=list(RANKS), help="--max-lora-rank of engines"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[*FIRST_TOKENS, *MORE_TOKENS], help=f"above {FEW_TOKENS}"
    )
    parser.add_argument("--workers", type=int, default=14, help="processes that compile ahead")
    parser.add_argument("--time-limit-s", type=float, default=1e9, help="measures nothing further after it")
    parser.add_argument(
        "--part-cost-us",
        type=float,
        default=0.0,
        help="added to a candidate for each part of the input features: what other kernels take to read it",
    )
    options = parser.parse_args(arguments)
    if min(options.tokens) <= FEW_TOKENS:
        parser.error(f"--tokens {options.tokens}: up to {FEW_TOKENS} other kernels run, expected more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    begin = time.monotonic()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.smallest:
        sys.exit("this needs a GPU; --smallest runs in Triton's interpreter")
    tasks = tasks_of(options)
    element_size = element_size_here()
    table = TableFile(options.out, torch.cuda.get_device_name() if has_gpu else "interpreter")
    table.write()
    wanted = dict.fromkeys(wanted for task in tasks for wanted in task.compilations(element_size))
    with multiprocessing.get_context("spawn").Pool(options.workers) if has_gpu else nullcontext() as pool:
        compiled = pool.imap_unordered(try_once, wanted) if pool is not None else None
        tuner = Tuner(begin + options.time_limit_s, compiled)
        gb_per_s = copy_rate_gb_per_s() if has_gpu else 0.0
        print(f"{len(tasks)} tasks, {len(wanted)} kernels, copies {gb_per_s:.0f} GB/s", flush=True)
        num_done = 0
        for task in tasks:
            try:
                choice = tuner.run(task, options.part_cost_us)
            except OutOfTimeError:
                break
            except (ValueError, RuntimeError) as error:  # also out of memory: the others may fit
                print(error, flush=True)
                continue
            table.put(rows_of(choice, element_size))
            print_choice(choice, gb_per_s)
            num_done += 1
            print(f"{num_done} of {len(tasks)} after {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{table.path}: {num_done} of {len(tasks)} layers, after {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
