"""Find the launch parameters of the linear layer of few rows on this GPU.

Every candidate is checked against fp64 before it is timed; one that is wrong, or does not fit the GPU, is
out. Times are those of CUDA graph replays over weights that do not fit the caches, with the vendor's library
beside it. A table row names parameters only where they are faster than the library at both ends of the row's
class of M. Two tables are written: `early.json` for GPUs that launch kernels before the one ahead has ended
(from Hopper on), and `plain.json` for others. One of them goes to the package's folder `kernels/tuning`.

    python scripts/tune_skinny_linear.py --out DIR [--shapes qwen3-8b] [--rows 1 8 16]
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_serve.kernels.reference import find_bound_violations
from lora_serve.kernels.reference_linear import skinny_linear_reference
from lora_serve.kernels.skinny_linear import SkinnyLaunch, skinny_linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "kernels"))
from kernel_bench import graph_times_us, triton_version

SHAPES = {
    "qwen3-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (24576, 4096),
        "down": (4096, 12288),
        "lm_head": (151936, 4096),
    },
    "llama3-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "lm_head": (128256, 4096),
    },
}
DTYPE = torch.bfloat16
ROTATED_BYTES = 220 << 20  # several times the second-level cache
MIN_GAIN = 0.99  # of the library's time, at least

# block_n, block_k, warps, stages, tiles
FMA = (
    (1, 4096, 4, 1, 1),
    (1, 2048, 4, 1, 1),
    (2, 4096, 8, 1, 1),
    (2, 2048, 4, 1, 1),
    (4, 4096, 8, 1, 1),
    (4, 4096, 16, 1, 1),
    (8, 4096, 16, 1, 1),
    (4, 2048, 4, 1, 1),
    (4, 2048, 8, 1, 1),
    (8, 2048, 8, 1, 1),
    (4, 1024, 4, 1, 1),
    (8, 1024, 4, 1, 1),
    (16, 1024, 8, 1, 1),
    (8, 512, 2, 1, 1),
    (16, 512, 4, 1, 1),
    (16, 256, 2, 1, 1),
    (4, 2048, 4, 1, 2),
    (4, 4096, 8, 1, 4),
    (4, 2048, 8, 3, 1),
    (4, 2048, 8, 3, 4),
    (4, 4096, 8, 3, 4),
    (4, 4096, 16, 4, 8),
    (8, 1024, 4, 4, 1),
    (8, 1024, 4, 4, 2),
    (16, 512, 4, 4, 1),
    (16, 1024, 8, 4, 2),
    (4, 1024, 2, 6, 1),
)
# block_n, block_k, warps, stages, splits
DOT = (
    (16, 64, 4, 4, 4),
    (16, 128, 4, 3, 4),
    (16, 128, 4, 4, 4),
    (16, 64, 8, 3, 8),
    (16, 64, 8, 5, 8),
    (16, 128, 8, 3, 8),
    (32, 64, 4, 4, 4),
    (32, 128, 4, 3, 4),
    (32, 64, 4, 4, 2),
    (32, 128, 4, 4, 2),
    (32, 128, 2, 5, 1),
    (16, 256, 1, 4, 1),
    (64, 64, 4, 4, 1),
    (64, 64, 4, 7, 1),
    (64, 128, 4, 3, 1),
    (64, 128, 4, 5, 1),
    (128, 64, 4, 4, 1),
    (128, 64, 8, 6, 1),
    (128, 128, 8, 3, 1),
)
NUM_FINALISTS = 4


@dataclass(frozen=True)
class Trial:
    """One compilation: parameters with what the kernel is compiled on."""

    launch: SkinnyLaunch
    num_rows: int
    in_features: int
    launches_early: bool


def candidates(num_rows: int) -> list[SkinnyLaunch]:
    fma = [SkinnyLaunch("fma", n, k, warps, stages, tiles=tiles) for n, k, warps, stages, tiles in FMA]
    fma += [replace(launch, is_prefetched=True) for launch in fma if launch.num_stages == 1]
    dot = [SkinnyLaunch("dot", n, k, warps, stages, splits) for n, k, warps, stages, splits in DOT]
    dot += [replace(launch, is_prefetched=True) for launch in dot if launch.block_n <= 32]
    return fma + dot if num_rows == 1 else dot


def try_once(trial: Trial) -> tuple[Trial, str]:
    """Compile, and run on a small weight; in a worker, which leaves the compiled kernel on the disk."""
    try:
        x = torch.randn(trial.num_rows, trial.in_features, dtype=DTYPE, device="cuda")
        weight = torch.randn(512, trial.in_features, dtype=DTYPE, device="cuda")
        skinny_linear(x, weight, launch=trial.launch, launches_early=trial.launches_early)
        torch.cuda.synchronize()
        return trial, ""
    except Exception as error:  # any reason takes the candidate out
        return trial, f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"


class Layer:
    """One shape: weights of several layers, so that none stays in a cache."""

    def __init__(self, name: str, out_features: int, in_features: int) -> None:
        self.name, self.out_features, self.in_features = name, out_features, in_features
        self.num_bytes = out_features * in_features * DTYPE.itemsize
        num_weights = max(1, -(-ROTATED_BYTES // self.num_bytes))
        scale = in_features**-0.5
        self.weights = [
            torch.randn(out_features, in_features, dtype=DTYPE, device="cuda") * scale
            for _ in range(num_weights)
        ]
        self._num_calls = max(6, 3 * num_weights)

    def time_us(self, call: Callable[[torch.Tensor], object], repetitions: int = 7) -> float:
        weights = [self.weights[i % len(self.weights)] for i in range(self._num_calls)]
        calls = [functools.partial(call, weight) for weight in weights]
        times = sorted(graph_times_us(calls, repetitions))
        return times[len(times) // 2]


class Measured:
    """One layer at one class of M: its inputs, and what was measured."""

    def __init__(self, layer: Layer, rows_before: int, max_rows: int) -> None:
        self.layer, self.max_rows = layer, max_rows
        self.x = torch.randn(max_rows, layer.in_features, dtype=DTYPE, device="cuda")
        self.expected = skinny_linear_reference(self.x, layer.weights[0])
        ends = (self.x[: rows_before + 1], self.x)
        self.library_us = min(layer.time_us(functools.partial(F.linear, rows)) for rows in ends)
        self.plain: list[tuple[float, SkinnyLaunch]] = []
        self.early: list[tuple[float, SkinnyLaunch]] = []

    def trials(self, launches_early: bool) -> list[Trial]:
        """What is to be timed: every candidate, then the best of them launched early."""
        launches = candidates(self.max_rows)
        if launches_early:
            launches = [launch for _, launch in self.plain[:NUM_FINALISTS]]
        return [Trial(launch, self.max_rows, self.layer.in_features, launches_early) for launch in launches]

    def row(self, best: tuple[float, SkinnyLaunch]) -> dict[str, object]:
        time_us, launch = best
        return {
            "out_features": self.layer.out_features,
            "in_features": self.layer.in_features,
            "dtype": str(DTYPE).removeprefix("torch."),
            "max_rows": self.max_rows,
            "launch": asdict(launch) if time_us < MIN_GAIN * self.library_us else None,
            "time_us": round(time_us, 2),
            "library_us": round(self.library_us, 2),
        }

    def line(self, gb_per_s: float) -> str:
        (plain_us, plain), (early_us, early) = self.plain[0], self.early[0]
        num_bytes = self.layer.num_bytes
        return (
            f"M={self.max_rows} {self.layer.name} floor_us={num_bytes / gb_per_s / 1e3:.1f} "
            f"library_us={self.library_us:.1f} plain_us={plain_us:.1f} ({describe(plain)}) "
            f"early_us={early_us:.1f} ({describe(early)}) gb_per_s={num_bytes / early_us / 1e3:.0f}"
        )


class Tuner:
    """Compiles with workers, checks, times."""

    def __init__(self, pool: multiprocessing.pool.Pool) -> None:
        self._pool = pool
        self._failed: dict[Trial, str] = {}
        self._compiled: set[Trial] = set()

    def compile(self, trials: Iterable[Trial]) -> None:
        wanted = sorted(set(trials) - self._compiled, key=repr)
        for trial, problem in self._pool.imap_unordered(try_once, wanted):
            self._compiled.add(trial)
            if problem:
                self._failed[trial] = problem
                print(f"out: {trial}: {problem}", flush=True)

    def time_all(self, one: Measured, launches_early: bool) -> None:
        """Time a layer's candidates that are right, the fastest first."""
        timed = [(self._time_us(trial, one), trial.launch) for trial in one.trials(launches_early)]
        timed.sort(key=lambda entry: entry[0])
        if launches_early:
            one.early = timed
        else:
            one.plain = timed

    def _time_us(self, trial: Trial, one: Measured) -> float:
        if trial in self._failed:
            return float("inf")
        out = torch.full_like(one.expected.value, float("nan"), dtype=DTYPE)

        def call(weight: torch.Tensor) -> torch.Tensor:
            return skinny_linear(
                one.x, weight, out=out, launch=trial.launch, launches_early=trial.launches_early
            )

        num_wrong = len(find_bound_violations(call(one.layer.weights[0]), one.expected))
        if num_wrong:
            print(f"out: {trial}: {num_wrong} outputs of {one.layer.name} are wrong", flush=True)
            return float("inf")
        return one.layer.time_us(call)


def describe(launch: SkinnyLaunch) -> str:
    rest = f"splits {launch.splits}" if launch.kind == "dot" else f"tiles {launch.tiles}"
    ahead = " prefetched" if launch.is_prefetched else ""
    tile = f"{launch.block_n}x{launch.block_k}"
    return f"{launch.kind} {tile} warps {launch.num_warps} stages {launch.num_stages} {rest}{ahead}"


def read_rate_gb_per_s() -> float:
    """The rate of a large sum."""
    numbers = torch.ones(1 << 30, dtype=torch.bfloat16, device="cuda")
    return 2 * numbers.numel() / min(graph_times_us([numbers.sum], 10)) / 1e3


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    table = {"gpu": torch.cuda.get_device_name(), "triton": triton_version(), "skinny_linear": rows}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that both tables are written to")
    parser.add_argument("--shapes", choices=list(SHAPES), default="qwen3-8b", help="of a model")
    parser.add_argument("--layers", nargs="*", help="some of its layers, such as qkv; None = all")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 16, 32, 64], help="classes of rows")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile ahead")
    parser.add_argument(
        "--time-limit-s", type=float, default=1e9, help="times no further candidates after it"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        tuner = Tuner(pool)
        shapes = SHAPES[options.shapes]
        names = options.layers or list(shapes)
        tuner.compile(
            Trial(launch, rows, size, False)
            for rows in options.rows
            for size in {shapes[name][1] for name in names}
            for launch in candidates(rows)
        )
        print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
        gb_per_s = read_rate_gb_per_s()
        print(f"{torch.cuda.get_device_name()}, reads {gb_per_s:.0f} GB/s", flush=True)
        done: list[Measured] = []
        layers = [Layer(name, *shapes[name]) for name in names]
        for rows_before, max_rows in zip([0, *options.rows], options.rows, strict=False):
            for layer in layers:
                if time.monotonic() - begin > options.time_limit_s:
                    print(f"left out: {layer.name} M={max_rows}")
                    continue
                one = Measured(layer, rows_before, max_rows)
                tuner.time_all(one, launches_early=False)
                done.append(one)
        print(f"timed after {time.monotonic() - begin:.0f} s", flush=True)
        tuner.compile(trial for one in done for trial in one.trials(launches_early=True))
        for one in done:
            tuner.time_all(one, launches_early=True)
            print(one.line(gb_per_s), flush=True)
        write_table(options.out / "plain.json", [one.row(one.plain[0]) for one in done])
        write_table(options.out / "early.json", [one.row(one.early[0]) for one in done])
    print(f"all after {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
