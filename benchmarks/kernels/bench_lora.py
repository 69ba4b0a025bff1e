"""LoRA kernels of decode steps: microseconds of shrink and expand on one packed layer, beside the byte floor.

A run stands for many layers one after the other, as in a model: enough of them that their adapters' weights
are more than 100 MB and cannot stay in the L2 cache. All are captured in one CUDA graph, and a row is the
graph's time divided by the number of layers. Rows take their adapters in turn, so that those of one adapter
are never neighbours.

Providers:

- ours: the Triton kernels, two launches a layer; ours_shrink, ours_expand: one of the two alone
- torch_loop: for each adapter and slice a gather, two matrix products and an indexed addition

`floor_us` is what the bytes take that must be moved (A and B of the adapters present once, x, and y twice) at
the rate of a large copy in the same run. Without a GPU, `--smallest` runs in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernel_bench import copy_rate_gb_per_s, driver_version, graph_times_us, triton_version
from result_file import append_rows
from timing import percentiles

from lora_serve.kernels.device_tables import DeviceLayerTable, DeviceTables, ModulePlace
from lora_serve.kernels.lora_metadata import LoRAMetadata, build_lora_metadata
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import triton_add_lora_linear
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink
from lora_serve.kernels.triton_lora_tiles import choose_num_parts, token_class

# Input features and widths of the slices. Qwen3-8B's packed layers, and one square matrix.
SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {
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
LORA_RANKS = (16, 64)
ROTATED_BYTES = 110 << 20
MAX_LORAS = 64

RunLayer = Callable[[int], object]
"""A provider, on the layer of a number."""


@dataclass
class Layers:
    """Several layers of one shape, whose adapters have modules on all slices; and one step on them."""

    in_features: int
    output_slices: tuple[int, ...]
    lora_rank: int
    max_rank: int
    num_adapters: int
    num_layers: int
    arena: Tensor
    tables: DeviceTables
    x: Tensor
    y: Tensor
    metadata: LoRAMetadata
    rows_of_slot: list[Tensor]

    @property
    def weight_bytes(self) -> int:
        """Of one layer: A and B of all adapters of the step."""
        per_slice = (self.in_features + width for width in self.output_slices)
        return self.num_adapters * self.lora_rank * sum(per_slice) * self.arena.element_size()

    @property
    def moved_bytes(self) -> int:
        """Of one layer: what any implementation must read and write."""
        return self.weight_bytes + self.x.nbytes + 2 * self.y.nbytes

    def table(self, layer: int) -> DeviceLayerTable:
        """Where the layer's weights lie."""
        return self.tables.layers[layer]


def make_layers(
    shape: tuple[int, tuple[int, ...]],
    num_rows: int,
    num_adapters: int,
    lora_rank: int,
    max_rank: int,
    on: str,
) -> Layers:
    """Random weights and inputs; as many layers as exceed the L2 cache."""
    in_features, output_slices = shape
    dtype = torch.bfloat16 if on == "cuda" else torch.float32
    a_layer = lora_rank * sum(in_features + width for width in output_slices) * num_adapters
    num_layers = min(max(-(-ROTATED_BYTES // (a_layer * dtype.itemsize)), 8), 480) if on == "cuda" else 2
    arena = torch.empty(num_layers * a_layer, dtype=dtype, device=on).normal_(std=0.05)
    tables = DeviceTables([len(output_slices)] * num_layers, num_adapters, on)
    end = 0
    for slot in range(num_adapters):
        modules = []
        for layer in range(num_layers):
            for index, width in enumerate(output_slices):
                b_offset = end + lora_rank * in_features
                modules.append(ModulePlace(layer, index, end, b_offset, lora_rank, 0.5))
                end = b_offset + lora_rank * width
        tables.rows[slot].copy_(tables.make_row(modules))
    mapping = torch.arange(num_rows, dtype=torch.int32) % num_adapters
    return Layers(
        in_features,
        output_slices,
        lora_rank,
        max_rank,
        num_adapters,
        num_layers,
        arena,
        tables,
        torch.randn(num_rows, in_features, dtype=dtype, device=on),
        torch.zeros(num_rows, sum(output_slices), dtype=dtype, device=on),
        build_lora_metadata(mapping, MAX_LORAS if on == "cuda" else num_adapters, device=torch.device(on)),
        [(mapping == slot).nonzero()[:, 0].to(on) for slot in range(num_adapters)],
    )


def providers_of(layers: Layers) -> dict[str, RunLayer]:
    """The providers by name."""
    num_rows, num_slices = len(layers.x), len(layers.output_slices)
    parts = choose_num_parts(token_class(num_rows), num_slices, layers.in_features, layers.max_rank)
    shape = (parts, num_slices, num_rows, layers.max_rank)
    v = torch.zeros(shape, dtype=torch.float32 if parts > 1 else layers.y.dtype, device=layers.y.device)
    scratch = torch.zeros(v.numel(), dtype=torch.float32, device=layers.y.device)
    return {
        "ours": partial(ours, layers, scratch),
        "ours_shrink": partial(ours_shrink, layers, v),
        "ours_expand": partial(ours_expand, layers, v),
        "torch_loop": partial(torch_loop, layers),
    }


def ours(layers: Layers, scratch: Tensor, layer: int) -> None:
    """Both halves."""
    triton_add_lora_linear(
        layers.y,
        layers.x,
        layers.arena,
        layers.table(layer),
        layers.metadata,
        output_slices=layers.output_slices,
        max_rank=layers.max_rank,
        scratch=scratch,
    )


def ours_shrink(layers: Layers, v: Tensor, layer: int) -> None:
    """The first half."""
    triton_lora_shrink(v, layers.x, layers.arena, layers.table(layer), layers.metadata)


def ours_expand(layers: Layers, v: Tensor, layer: int) -> None:
    """The second half."""
    table = layers.table(layer)
    triton_lora_expand(layers.y, v, layers.arena, table, layers.metadata, output_slices=layers.output_slices)


def torch_loop(layers: Layers, layer: int) -> None:
    """Each adapter and slice on its own; where the weights lie is worked out on the host."""
    rank, in_features = layers.lora_rank, layers.in_features
    per_layer = layers.weight_bytes // layers.arena.element_size() // layers.num_adapters
    for slot, rows in enumerate(layers.rows_of_slot):
        start = (slot * layers.num_layers + layer) * per_layer
        x = layers.x.index_select(0, rows)
        column = 0
        for width in layers.output_slices:
            a = layers.arena[start : start + rank * in_features].view(rank, in_features)
            start += rank * in_features
            b = layers.arena[start : start + rank * width].view(rank, width)
            start += rank * width
            delta = (x @ a.t()).mul_(0.5) @ b
            layers.y[:, column : column + width].index_add_(0, rows, delta)
            column += width


def check(layers: Layers, providers: dict[str, RunLayer]) -> None:
    """Raise unless ours gives what the loop gives: a kernel that does nothing would be the fastest."""
    results = []
    for name in ("ours", "torch_loop"):
        layers.y.zero_()
        providers[name](layers.num_layers - 1)
        results.append(layers.y.float())
    error = (results[0] - results[1]).abs().max().item()
    scale = results[1].abs().max().item()
    if not error <= 0.02 * scale or scale == 0:
        raise RuntimeError(f"ours differs from torch_loop by {error} where the largest delta is {scale}")


def times_us(run: RunLayer, layers: Layers, repetitions: int) -> list[float]:
    """Times of one layer."""
    if layers.y.is_cuda:
        return graph_times_us([partial(run, layer) for layer in range(layers.num_layers)], repetitions)
    start = time.perf_counter()
    run(0)
    return [(time.perf_counter() - start) * 1e6]


def print_steps(rows: list[dict[str, object]]) -> None:
    """Milliseconds of a whole step: the four packed layers of all of the model's layers."""
    sums: dict[tuple[object, ...], dict[str, tuple[float, float]]] = {}
    for row in rows:
        key = (row["rows"], row["adapters"], row["lora_rank"], row["provider"])
        sums.setdefault(key, {})[str(row["shape"])] = (float(str(row["p50_us"])), float(str(row["floor_us"])))
    print("\nrows adapters rank provider     ms a step  floor ms")
    for (num_rows, adapters, rank, provider), by_shape in sums.items():
        if set(by_shape) >= {"qkv", "o", "gate_up", "down"}:
            layers = [by_shape[name] for name in ("qkv", "o", "gate_up", "down")]
            total, floor = (LAYERS_OF_MODEL * sum(column) / 1e3 for column in zip(*layers, strict=True))
            print(f"{num_rows:4} {adapters:8} {rank:4} {provider:12} {total:9.2f} {floor:9.2f}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smallest", action="store_true", help="one tiny run that writes nothing")
    parser.add_argument("--dry-run", action="store_true", help="print, write no results")
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel, time none")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES)[:-1])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--adapters", nargs="+", type=int, default=list(ADAPTERS))
    parser.add_argument("--lora-ranks", nargs="+", type=int, default=list(LORA_RANKS))
    parser.add_argument("--max-lora-rank", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=20)
    return parser.parse_args()


def measure(name: str, layers: Layers, gb_per_s: float, repetitions: int) -> list[dict[str, object]]:
    """The rows of one combination, printed."""
    providers = providers_of(layers)
    check(layers, providers)
    floor_us = layers.moved_bytes / gb_per_s / 1e3 if gb_per_s else 0.0
    key = {
        "shape": name,
        "rows": len(layers.x),
        "adapters": layers.num_adapters,
        "lora_rank": layers.lora_rank,
        "max_lora_rank": layers.max_rank,
    }
    rows: list[dict[str, object]] = []
    for provider, run in providers.items():
        p20, p50, p80 = percentiles(times_us(run, layers, repetitions))
        rows.append(
            {
                "provider": provider,
                **key,
                "layers": layers.num_layers,
                "p20_us": round(p20, 2),
                "p50_us": round(p50, 2),
                "p80_us": round(p80, 2),
                "floor_us": round(floor_us, 2),
                "copy_gb_per_s": round(gb_per_s),
                "triton": triton_version(),
                "driver": driver_version(),
            }
        )
    times = (f"{row['provider']} {row['p50_us']:>6}" for row in rows)
    print(*(f"{k} {v}" for k, v in key.items()), *times, f"floor {floor_us:.2f}", sep="  ", flush=True)
    return rows


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
        if adapters <= num_rows and (adapters != 4 or name == "square")
    ]


def main() -> None:
    """Measure every combination and append the rows."""
    options = parse_arguments()
    on = "cuda" if torch.cuda.is_available() else "cpu"
    if on == "cpu" and not options.smallest:
        sys.exit("this benchmark needs a GPU; --smallest runs in Triton's interpreter")
    gb_per_s = copy_rate_gb_per_s() if on == "cuda" and not options.compile_only else 0.0
    max_rank = 8 if options.smallest else options.max_lora_rank
    rows: list[dict[str, object]] = []
    for name, lora_rank, num_rows, adapters in combinations(options):
        layers = make_layers(SHAPES[name], num_rows, adapters, lora_rank, max_rank, on)
        if options.compile_only:
            check(layers, providers_of(layers))
        else:
            rows += measure(name, layers, gb_per_s, options.repetitions)
        del layers
    if rows:
        print_steps(rows)
    if rows and not options.smallest and not options.dry_run:
        print(f"appended to {append_rows('lora_kernels', rows)}")


if __name__ == "__main__":
    main()
