"""LoRA kernels on one packed layer: microseconds of shrink and expand, beside the floor.

A run stands for many layers one after the other, as in a model (`rotating_layers`): their adapters' weights
are more than 100 MB and cannot stay in the L2 cache. x and y stay there in decodes, and in prefills (as far
as they fit) with `--rows-in-cache`: in a model the kernels before have just written them. All layers are
captured in one CUDA graph, and a row is the graph's time divided by their number. Who computes is told in
`lora_providers`; all providers are checked against a loop in torch first.

`floor_us` is the larger of two: the bytes that must be moved at the rate of a large copy in the same run, and
the products at the rate of a large matrix product in it. It counts x and y wherever they are. Without a GPU,
`--smallest` runs in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernel_bench import copy_rate_gb_per_s, driver_version, graph_times_us, matmul_tflops, triton_version
from lora_providers import Provider, floor_us, providers_of
from result_file import append_rows
from rotating_layers import Layers, Shape, make_layers
from timing import percentiles

# Input features and widths of the slices. Qwen3-8B's packed layers, and one square matrix.
SHAPES: dict[str, Shape] = {
    "square": (4096, (4096,)),
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (12288, 12288)),
    "down": (12288, (4096,)),
    "smallest": (40, (24, 8)),
}
LAYERS_OF_MODEL = 36
ROWS = (1, 8, 32, 128)
ADAPTERS = (1, 4, 8, 32)
LORA_RANKS = (8, 16, 64, 128)
LARGEST_ERROR = 0.02

Rates = tuple[float, float]
"""GB/s of a copy and TFLOP/s of a product; 0 without a GPU."""


def check(layers: Layers, providers: dict[str, Provider]) -> None:
    """Raise unless all give what the loop gives: a kernel that does nothing would be the fastest."""
    last = layers.num_layers - 1
    results = {}
    for name, provider in providers.items():
        if provider.halves == "both":
            layers.y_of(last).zero_()
            with provider.in_its_tiles():
                provider.run(last)
            results[name] = layers.y_of(last).float().clone()
    expected = results["torch_loop"]
    scale = expected.abs().max().item()
    for name, result in results.items():
        error = (result - expected).abs().max().item()
        if not error <= LARGEST_ERROR * scale or scale == 0:
            raise RuntimeError(
                f"{name} differs from torch_loop by {error}, where the largest delta is {scale}"
            )


def times_us(provider: Provider, layers: Layers, repetitions: int) -> list[float]:
    """Times of one layer."""
    with provider.in_its_tiles():
        if layers.y.is_cuda:
            calls = [partial(provider.run, layer) for layer in range(layers.num_layers)]
            return graph_times_us(calls, repetitions)
        start = time.perf_counter()
        provider.run(0)
        return [(time.perf_counter() - start) * 1e6]


def measure(name: str, layers: Layers, rates: Rates, repetitions: int) -> list[dict[str, object]]:
    """The rows of one combination, printed."""
    providers = providers_of(layers)
    check(layers, providers)
    key = {
        "shape": name,
        "rows": len(layers.x),
        "rows_in": "cache" if len(layers.xs) == 1 else "memory",
        "adapters": layers.num_adapters,
        "lora_rank": layers.lora_rank,
        "max_lora_rank": layers.max_rank,
    }
    rows: list[dict[str, object]] = []
    for provider_name, provider in providers.items():
        p20, p50, p80 = percentiles(times_us(provider, layers, repetitions))
        floor = floor_us(layers, provider.halves, *rates) if all(rates) else 0.0
        row: dict[str, object] = {"provider": provider_name, **key, "layers": layers.num_layers}
        row |= {"p20_us": round(p20, 2), "p50_us": round(p50, 2), "p80_us": round(p80, 2)}
        row |= {"floor_us": round(floor, 2), "floor_over_p50": round(floor / p50, 3)}
        row |= {"copy_gb_per_s": round(rates[0]), "matmul_tflops": round(rates[1])}
        rows.append(row | {"triton": triton_version(), "driver": driver_version()})
    times = (f"{row['provider']} {row['p50_us']} ({row['floor_us']})" for row in rows)
    print(*(f"{k} {v}" for k, v in key.items()), *times, sep="  ", flush=True)
    return rows


def print_steps(rows: list[dict[str, object]]) -> None:
    """Milliseconds of a whole step: the four packed layers of all of the model's layers."""
    sums: dict[tuple[object, ...], dict[str, tuple[float, float]]] = {}
    for row in rows:
        key = (row["rows"], row["adapters"], row["lora_rank"], row["provider"])
        sums.setdefault(key, {})[str(row["shape"])] = (float(str(row["p50_us"])), float(str(row["floor_us"])))
    print("\nrows adapters rank provider      ms a step  floor ms")
    for (num_rows, adapters, rank, provider), by_shape in sums.items():
        if set(by_shape) >= {"qkv", "o", "gate_up", "down"}:
            layers = [by_shape[name] for name in ("qkv", "o", "gate_up", "down")]
            total, floor = (LAYERS_OF_MODEL * sum(column) / 1e3 for column in zip(*layers, strict=True))
            print(f"{num_rows:4} {adapters:8} {rank:4} {provider:13} {total:9.2f} {floor:9.2f}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--smallest", action="store_true", help="one tiny run that writes nothing")
    parser.add_argument("--dry-run", action="store_true", help="print, write no results")
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel, time none")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES)[:-1], help="layers")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="tokens of the steps")
    parser.add_argument("--adapters", nargs="+", type=int, default=list(ADAPTERS), help="in a step")
    parser.add_argument("--lora-ranks", nargs="+", type=int, default=list(LORA_RANKS), help="of the adapters")
    parser.add_argument("--max-lora-rank", type=int, help="of the engine; None = the adapters' own rank")
    parser.add_argument(
        "--rows-in-cache",
        action="store_true",
        help="a prefill's x and y stay in the L2 cache, as in a model, and do not come from memory",
    )
    parser.add_argument("--repetitions", type=int, default=20, help="of each graph")
    return parser.parse_args()


def combinations(options: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """Shape, rank, rows, adapters."""
    if options.smallest:
        return [("smallest", 5, 3, 2)]
    return [
        (name, lora_rank, num_rows, adapters)
        for name in options.shapes
        for lora_rank in options.lora_ranks
        for num_rows in options.rows
        for adapters in options.adapters
        if adapters <= num_rows
    ]


def main() -> None:
    """Measure every combination and append the rows."""
    options = parse_arguments()
    on = "cuda" if torch.cuda.is_available() else "cpu"
    if on == "cpu" and not options.smallest:
        sys.exit("this benchmark needs a GPU; --smallest runs in Triton's interpreter")
    is_timed = on == "cuda" and not options.compile_only
    rates = (copy_rate_gb_per_s(), matmul_tflops()) if is_timed else (0.0, 0.0)
    rows: list[dict[str, object]] = []
    for name, lora_rank, num_rows, adapters in combinations(options):
        max_rank = 8 if options.smallest else options.max_lora_rank or lora_rank
        layers = make_layers(
            *(SHAPES[name], num_rows, adapters, lora_rank, max_rank, on), rows_in_cache=options.rows_in_cache
        )
        if options.compile_only:
            check(layers, providers_of(layers))
        else:
            rows += measure(name, layers, rates, options.repetitions)
        del layers
    if rows:
        print_steps(rows)
    if rows and not options.smallest and not options.dry_run:
        print(f"appended to {append_rows('lora_kernels', rows)}")


if __name__ == "__main__":
    main()
