"""Steps that the launch parameters of the LoRA kernels are tried on: exact results, and times.

A step is measured on layers one after the other whose weights do not fit the caches, in one CUDA graph.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "kernels"))
from kernel_bench import graph_times_us
from rotating_layers import MOST_DECODES, Layers, Shape, make_layers

from lora_serve.kernels.reference import ReferenceResult, find_bound_violations, unit_roundoff
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink
from lora_serve.kernels.triton_lora_tiles import TrialTiles, token_class, trial_tiles
from lora_serve.kernels.tuned_lora_tiles import ExpandTiles, ShrinkTiles, TunedShrink
from lora_tile_candidates import expand_candidates, shrink_candidates

ROTATED_BYTES = 220 << 20  # each half of the weights several times the second-level cache
MOST_PREFILL_CALLS = 24
REPETITIONS = 7


def element_size_here() -> int:
    """Bytes of a weight that is measured: fp32 in the interpreter."""
    return 2 if torch.cuda.is_available() else 4


@dataclass(frozen=True)
class Compilation:
    """A kernel to be compiled: all that it depends on; the number of tokens only as few or many."""

    shape: Shape
    max_rank: int
    is_few: bool
    num_parts: int
    tiles: ShrinkTiles | ExpandTiles


@dataclass(frozen=True)
class Task:
    """One row of each table: a layer, a rank, a class of T, and the sizes at which it is measured."""

    shape: Shape
    max_rank: int
    num_tokens: tuple[int, ...]
    adapters: tuple[int, ...]

    @property
    def max_tokens(self) -> int:
        return token_class(self.num_tokens[0])

    def shrinks(self, element_size: int) -> list[TunedShrink]:
        in_features, widths = self.shape
        return shrink_candidates(self.max_tokens, len(widths), in_features, self.max_rank, element_size)

    def expands(self, element_size: int) -> list[ExpandTiles]:
        return expand_candidates(self.max_tokens, sum(self.shape[1]), self.max_rank, element_size)

    def points(self) -> list[tuple[int, int]]:
        """Tokens and adapters."""
        return [(tokens, count) for tokens in self.num_tokens for count in self.adapters if count <= tokens]

    def compilations(self, element_size: int) -> Iterator[Compilation]:
        shrinks = self.shrinks(element_size)
        for shrink in shrinks:
            yield self.compilation(shrink.num_parts, shrink.tiles)
        for num_parts in sorted({shrink.num_parts for shrink in shrinks}):
            for expand in self.expands(element_size):
                yield self.compilation(num_parts, expand)

    def compilation(self, num_parts: int, tiles: ShrinkTiles | ExpandTiles) -> Compilation:
        return Compilation(self.shape, self.max_rank, self.num_tokens[0] <= 32, num_parts, tiles)


class Point:
    """Some rows of some adapters on one layer's shape: weights of several layers, inputs, exact results."""

    def __init__(
        self, task: Task, num_tokens: int, num_adapters: int, *, rotated_bytes: int = ROTATED_BYTES
    ) -> None:
        on = "cuda" if torch.cuda.is_available() else "cpu"
        rank = task.max_rank
        self.layers: Layers = make_layers(
            task.shape, num_tokens, num_adapters, rank, rank, on, rotated_bytes=rotated_bytes
        )
        self.num_calls = min(self.layers.num_layers, MOST_PREFILL_CALLS if num_tokens > MOST_DECODES else 480)
        self.y = torch.randn_like(self.layers.y)  # not one of the layers': their sums grow as they are timed
        self._v: dict[int, Tensor] = {}

    def v(self, num_parts: int) -> Tensor:
        """What lies between the halves, random numbers."""
        if num_parts not in self._v:
            layers = self.layers
            shape = (num_parts, len(layers.output_slices), len(layers.x), layers.max_rank)
            dtype = torch.float32 if num_parts > 1 else layers.y.dtype
            self._v[num_parts] = torch.randn(shape, dtype=dtype, device=layers.y.device)
        return self._v[num_parts]

    def shrink(self, v: Tensor, layer: int) -> None:
        layers = self.layers
        triton_lora_shrink(v, layers.x_of(layer), layers.arena, layers.table(layer), layers.metadata)

    def expand(self, v: Tensor, y: Tensor | None, layer: int) -> None:
        layers = self.layers
        y = layers.y_of(layer) if y is None else y
        table, widths = layers.table(layer), layers.output_slices
        triton_lora_expand(y, v, layers.arena, table, layers.metadata, output_slices=widths)

    @cached_property
    def exact_shrink(self) -> ReferenceResult:
        """[S, T, R] of the first layer, without the last rounding."""
        layers, table = self.layers, self.layers.table(0)
        shape = (len(layers.output_slices), len(layers.x), layers.max_rank)
        value = torch.zeros(shape, dtype=torch.float64, device=layers.x.device)
        bound = torch.zeros_like(value)
        unit = (layers.in_features + 2) * unit_roundoff(torch.float32)
        for slot, rows in enumerate(layers.rows_of_slot):
            x = layers.x[rows].double()
            for index in range(shape[0]):
                a = float(table.scaling[slot, index]) * layers.a_of(slot, 0, index).double()
                value[index, rows] = x @ a.t()
                bound[index, rows] = unit * (x.abs() @ a.abs().t())
        return ReferenceResult(value, bound)

    def exact_expand(self, num_parts: int) -> ReferenceResult:
        """[T, O] of the first layer on the random v and `y`, without the last rounding."""
        layers, parts = self.layers, self.v(num_parts)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        v = total.to(layers.y.dtype).double()
        value = self.y.double()
        bound = torch.zeros_like(value)
        unit = (layers.lora_rank + 2) * unit_roundoff(torch.float32)
        for slot, rows in enumerate(layers.rows_of_slot):
            column = 0
            for index, width in enumerate(layers.output_slices):
                b = layers.b_of(slot, 0, index).double()
                columns = slice(column, column + width)
                before = value[rows, columns]
                bound[rows, columns] = unit * (before.abs() + v[index, rows].abs() @ b.abs())
                value[rows, columns] = before + v[index, rows] @ b
                column += width
        return ReferenceResult(value, bound)

    def time_us(self, call: Callable[[int], object]) -> float:
        """Of one layer. Disturbances only add, so the second fastest is taken."""
        if not self.layers.y.is_cuda:
            start = time.perf_counter()
            call(0)
            return (time.perf_counter() - start) * 1e6
        calls = [partial(call, layer) for layer in range(self.num_calls)]
        return sorted(graph_times_us(calls, REPETITIONS))[1]


def count_wrong(actual: Tensor, exact: ReferenceResult) -> int:
    """Elements further from the exact result than sums and one rounding to the dtype can be."""
    unit = unit_roundoff(actual.dtype)
    rounding = unit * (exact.value.abs() + exact.bound) + torch.finfo(actual.dtype).tiny
    return len(find_bound_violations(actual, ReferenceResult(exact.value, exact.bound + rounding)))


@lru_cache(maxsize=4)
def small_point(shape: Shape, max_rank: int, is_few: bool) -> Point:
    tokens = 32 if is_few else 128
    return Point(Task(shape, max_rank, (tokens,), (1,)), tokens, 1, rotated_bytes=1)


def try_once(wanted: Compilation) -> tuple[Compilation, str]:
    """Compile, and run on a small step; in a worker, which leaves the compiled kernel on the disk."""
    try:
        point = small_point(wanted.shape, wanted.max_rank, wanted.is_few)
        v = point.v(wanted.num_parts)
        with trial_tiles(trial_of(wanted.tiles)):
            if isinstance(wanted.tiles, ShrinkTiles):
                point.shrink(v, 0)
            else:
                point.expand(v, None, 0)
        torch.cuda.synchronize()
        return wanted, ""
    except Exception as error:  # any reason takes the candidate out
        return wanted, f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"


def trial_of(tiles: ShrinkTiles | ExpandTiles) -> TrialTiles:
    return TrialTiles(shrink=tiles) if isinstance(tiles, ShrinkTiles) else TrialTiles(expand=tiles)
