"""Many layers of one shape, as in a model: what one call reads has left the caches at the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.kernels.device_tables import DeviceLayerTable, DeviceTables, ModulePlace
from lora_serve.kernels.lora_metadata import LoRAMetadata, build_lora_metadata

ROTATED_BYTES = 110 << 20
MOST_DECODES = 128
MAX_LORAS = 64
"""As the engine's default: most of a step's places for adapters are empty, and cost what they cost there."""
_MOST_LAYERS = 480

Shape = tuple[int, tuple[int, ...]]
"""Input features, and the widths of the slices."""


@dataclass
class Layers:
    """Several layers of one shape, whose adapters have modules on all slices; and one step on them.

    Rows of a decode (T <= 128) take their adapters in turn, so that those of one adapter are never
    neighbours, and are the same for all layers. In a prefill an adapter's tokens lie together, and there may
    be several copies of the rows, which a cache does not keep either.
    """

    in_features: int
    output_slices: tuple[int, ...]
    lora_rank: int
    max_rank: int
    num_adapters: int
    num_layers: int
    arena: Tensor
    tables: DeviceTables
    xs: list[Tensor]
    ys: list[Tensor]
    metadata: LoRAMetadata
    rows_of_slot: list[Tensor]

    @property
    def x(self) -> Tensor:
        """[T, H]: the first layer's input."""
        return self.xs[0]

    @property
    def y(self) -> Tensor:
        """[T, O]: the first layer's output."""
        return self.ys[0]

    def x_of(self, layer: int) -> Tensor:
        return self.xs[layer % len(self.xs)]

    def y_of(self, layer: int) -> Tensor:
        return self.ys[layer % len(self.ys)]

    def table(self, layer: int) -> DeviceLayerTable:
        """Where the layer's weights lie."""
        return self.tables.layers[layer]

    def a_of(self, slot: int, layer: int, index: int) -> Tensor:
        """[R, H] of an adapter and a slice."""
        start = int(self.table(layer).a_offset[slot, index])
        return self.arena[start:][: self.lora_rank * self.in_features].view(self.lora_rank, self.in_features)

    def b_of(self, slot: int, layer: int, index: int) -> Tensor:
        """[R, O_s] of an adapter and a slice."""
        start, width = int(self.table(layer).b_offset[slot, index]), self.output_slices[index]
        return self.arena[start:][: self.lora_rank * width].view(self.lora_rank, width)


def make_layers(
    shape: Shape,
    num_rows: int,
    num_adapters: int,
    lora_rank: int,
    max_rank: int,
    on: str,
    *,
    rotated_bytes: int = ROTATED_BYTES,
    rows_in_cache: bool = False,
) -> Layers:
    """Random weights and inputs; as many layers as hold `rotated_bytes` of weights.

    With `rows_in_cache` the rows of a prefill are the same for all layers, too: where the cache holds them, a
    layer finds them there, as it does in a model, whose kernels before have just written them.
    """
    in_features, output_slices = shape
    dtype = torch.bfloat16 if on == "cuda" else torch.float32
    of_layer = lora_rank * sum(in_features + width for width in output_slices) * num_adapters
    wanted = max(-(-rotated_bytes // (of_layer * dtype.itemsize)), 8)
    num_layers = min(wanted, _MOST_LAYERS) if on == "cuda" else 2
    arena = torch.empty(num_layers * of_layer, dtype=dtype, device=on).normal_(std=0.05)
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
    tokens = torch.arange(num_rows, dtype=torch.int32)
    is_decode = num_rows <= MOST_DECODES
    mapping = tokens % num_adapters if is_decode else tokens * num_adapters // num_rows
    x = torch.randn(num_rows, in_features, dtype=dtype, device=on)
    y = torch.zeros(num_rows, sum(output_slices), dtype=dtype, device=on)
    num_copies = 1
    if not (is_decode or rows_in_cache) and on == "cuda":
        num_copies = min(-(-ROTATED_BYTES // min(x.nbytes, y.nbytes)), num_layers)
    return Layers(
        in_features,
        output_slices,
        lora_rank,
        max_rank,
        num_adapters,
        num_layers,
        arena,
        tables,
        [x, *(x.clone() for _ in range(num_copies - 1))],
        [y, *(y.clone() for _ in range(num_copies - 1))],
        build_lora_metadata(mapping, MAX_LORAS if on == "cuda" else num_adapters, device=torch.device(on)),
        [(mapping == slot).nonzero()[:, 0].to(on) for slot in range(num_adapters)],
    )
