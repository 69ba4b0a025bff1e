"""Who computes the LoRA deltas of a layer in `bench_lora`, and what each must move and multiply at least."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rotating_layers import ROTATED_BYTES, Layers
from torch import Tensor

from lora_serve.kernels.device_tables import MAX_RANK
from lora_serve.kernels.triton_lora_expand import triton_lora_expand
from lora_serve.kernels.triton_lora_linear import make_shrunk, triton_add_lora_linear
from lora_serve.kernels.triton_lora_shrink import triton_lora_shrink
from lora_serve.kernels.triton_lora_tiles import ExpandTiles, ShrinkTiles, TrialTiles, trial_tiles
from lora_serve.kernels.tuned_lora_tiles import block_of

RunLayer = Callable[[int], object]
"""A provider, on the layer of a number."""

_NAIVE_BLOCK = 64


@dataclass(frozen=True)
class Provider:
    """A way to compute a layer's deltas, or one half of it.

    Parameters
    ----------
    run
        On the layer of a number.
    halves
        "shrink", "expand", or "both": what its floor is made of.
    tiles
        Launch parameters to be used while it is compiled, captured and run; None = the engine's own choice.
    """

    run: RunLayer
    halves: str = "both"
    tiles: TrialTiles | None = None

    def in_its_tiles(self) -> AbstractContextManager[None]:
        """A context in which the kernels take its launch parameters."""
        return nullcontext() if self.tiles is None else trial_tiles(self.tiles)


def providers_of(layers: Layers) -> dict[str, Provider]:
    """All providers by name.

    - ours: two launches a layer, as the engine makes them; ours_shrink, ours_expand: one of them alone
    - naive: two launches without any tuning: tiles of 16 rows and 64 features, input features not split
    - copy_shrink, copy_expand: a plain copy of as many bytes as the half must move: what a launch, its first
      loads and its last stores take on top of the floor
    - torch_grouped: rows gathered by adapter, grouped products of the library (bfloat16 on a GPU alone)
    - torch_loop: for each adapter and slice a gather, two matrix products and an indexed addition
    """
    block_r = block_of(layers.max_rank, MAX_RANK)
    naive_tiles = TrialTiles(
        num_parts=1,
        shrink=ShrinkTiles(16, block_r, _NAIVE_BLOCK, num_warps=4, num_stages=2),
        expand=ExpandTiles(16, _NAIVE_BLOCK, block_r, num_warps=4),
    )
    v = _shrunk(layers)
    providers = {
        "ours": Provider(partial(_both_halves, layers)),
        "ours_shrink": Provider(partial(_shrink, layers, v), "shrink"),
        "ours_expand": Provider(partial(_expand, layers, v), "expand"),
        "naive": Provider(partial(_both_halves, layers), tiles=naive_tiles),
        "torch_loop": Provider(partial(_torch_loop, layers)),
        "copy_shrink": Provider(_Copies(layers, "shrink"), "shrink"),
        "copy_expand": Provider(_Copies(layers, "expand"), "expand"),
    }
    if layers.x.is_cuda:
        providers["torch_grouped"] = Provider(_TorchGrouped(layers))
    return providers


def floor_us(layers: Layers, halves: str, gb_per_s: float, tflops: float) -> float:
    """Microseconds: the larger of what the bytes and what the products take at measured rates."""
    features = layers.in_features * len(layers.output_slices) if halves != "expand" else 0
    features += sum(layers.output_slices) if halves != "shrink" else 0
    operations = 2 * len(layers.x) * layers.lora_rank * features
    return max(num_bytes_of(layers, halves) / gb_per_s / 1e3, operations / tflops / 1e6)


def num_bytes_of(layers: Layers, halves: str) -> int:
    """What must be moved at least.

    A and B of the adapters present are read once, x too; y is read and written. What lies between the halves
    is written by the one and read by the other, and nobody's need where both are one provider.
    """
    num_rows, num_slices, out_features = len(layers.x), len(layers.output_slices), sum(layers.output_slices)
    weights = layers.num_adapters * layers.lora_rank
    numbers = num_slices * num_rows * layers.lora_rank if halves != "both" else 0
    if halves != "expand":
        numbers += (weights * num_slices + num_rows) * layers.in_features
    if halves != "shrink":
        numbers += (weights + 2 * num_rows) * out_features
    return layers.arena.element_size() * numbers


def _shrunk(layers: Layers) -> Tensor:
    num_slices = len(layers.output_slices)
    return make_shrunk(layers.x, num_slices, layers.max_rank, dtype=layers.y.dtype).zero_()


def _both_halves(layers: Layers, layer: int) -> None:
    triton_add_lora_linear(
        layers.y_of(layer),
        layers.x_of(layer),
        layers.arena,
        layers.table(layer),
        layers.metadata,
        output_slices=layers.output_slices,
        max_rank=layers.max_rank,
    )


def _shrink(layers: Layers, v: Tensor, layer: int) -> None:
    triton_lora_shrink(v, layers.x_of(layer), layers.arena, layers.table(layer), layers.metadata)


def _expand(layers: Layers, v: Tensor, layer: int) -> None:
    y, table, widths = layers.y_of(layer), layers.table(layer), layers.output_slices
    triton_lora_expand(y, v, layers.arena, table, layers.metadata, output_slices=widths)


def _torch_loop(layers: Layers, layer: int) -> None:
    """Where the weights lie is worked out on the host, which a graph's replay does not pay for."""
    per_layer = layers.arena.numel() // (layers.num_adapters * layers.num_layers)
    rank, in_features = layers.lora_rank, layers.in_features
    for slot, rows in enumerate(layers.rows_of_slot):
        start = (slot * layers.num_layers + layer) * per_layer
        x = layers.x_of(layer).index_select(0, rows)
        column = 0
        for width in layers.output_slices:
            a = layers.arena[start : start + rank * in_features].view(rank, in_features)
            start += rank * in_features
            b = layers.arena[start : start + rank * width].view(rank, width)
            start += rank * width
            delta = (x @ a.t()).mul_(0.5) @ b
            layers.y_of(layer)[:, column : column + width].index_add_(0, rows, delta)
            column += width


class _Copies:
    """Copies of which each reads half of the bytes that a half must move, and writes as many."""

    def __init__(self, layers: Layers, halves: str) -> None:
        num_bytes = num_bytes_of(layers, halves)
        num_sets = min(-(-ROTATED_BYTES // num_bytes) + 1, layers.num_layers)
        shape = (num_sets, 2, num_bytes // 2)
        self._sets = torch.zeros(shape, dtype=torch.uint8, device=layers.x.device)

    def __call__(self, layer: int) -> None:
        source, target = self._sets[layer % len(self._sets)]
        target.copy_(source)


class _TorchGrouped:
    """Gather by adapter, two grouped products a slice, scatter; on copies of the weights that suit them."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._order = torch.cat(layers.rows_of_slot)
        counts = torch.tensor([len(rows) for rows in layers.rows_of_slot])
        self._ends = counts.cumsum(0).to(torch.int32).to(layers.x.device)
        slots, slices = range(layers.num_adapters), range(len(layers.output_slices))
        self._a = [self._stack(layers.a_of, slots, layer, slices) for layer in range(layers.num_layers)]
        self._b = [self._stack(layers.b_of, slots, layer, slices) for layer in range(layers.num_layers)]

    @staticmethod
    def _stack(
        weight_of: Callable[[int, int, int], Tensor], slots: range, layer: int, slices: range
    ) -> list[Tensor]:
        return [torch.stack([weight_of(slot, layer, index) for slot in slots]) for index in slices]

    def __call__(self, layer: int) -> None:
        x = self._layers.x_of(layer).index_select(0, self._order)
        deltas = []
        for a, b in zip(self._a[layer], self._b[layer], strict=True):
            v = F.grouped_mm(x, a.transpose(1, 2), offs=self._ends).mul_(0.5)
            deltas.append(F.grouped_mm(v, b, offs=self._ends))
        self._layers.y_of(layer).index_add_(0, self._order, torch.cat(deltas, dim=1))
