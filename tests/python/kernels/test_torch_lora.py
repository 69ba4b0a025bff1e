"""When the torch implementation pads and batches, and what padding must not read."""

from __future__ import annotations

import pytest
import torch

from kernels.lora_cases import LoRACase, has_same_bits, make_case
from lora_serve.kernels import (
    LoRALayerTable,
    LoRASliceWeights,
    add_lora_linear,
    build_lora_metadata,
    torch_lora,
)
from lora_serve.kernels.lora_builder import install_weights


def count_modules(monkeypatch: pytest.MonkeyPatch, case: LoRACase) -> int:
    """Products of single modules while a layer runs: 0 where all are in one."""
    seen = []
    modules = torch_lora._modules

    def count(layer):
        for module in modules(layer):
            seen.append(module)
            yield module

    with monkeypatch.context() as patch:
        patch.setattr(torch_lora, "_modules", count)
        add_lora_linear(case.y, case.x, case.table, case.metadata)
    return len(seen)


def test_decode_step_of_many_adapters_is_one_product(monkeypatch):
    case = make_case([0, 1, 2, 3, 4, 5, 6, 7, 0, 1], dict.fromkeys(range(8), (8, 8, 8)))
    assert count_modules(monkeypatch, case) == 0


def test_large_rank_beside_small_ones_on_a_wide_layer_is_a_product_each(monkeypatch):
    ranks: dict[int, tuple[int | None, ...]] = {0: (256,), **dict.fromkeys(range(1, 8), (1,))}
    case = make_case(list(range(8)) * 2, ranks, output_slices=(4096,), in_features=4096)
    assert count_modules(monkeypatch, case) == 16


def test_infinite_weights_of_a_neighbour_reach_nobody_else():
    """Adapters whose ranks differ are padded side by side: NaN times 0 would be NaN."""
    table = LoRALayerTable((3, 2), 4)
    bad = torch.full((5, 4), float("inf")), torch.full((5, 3), float("nan")), torch.full((5, 2), float("inf"))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, generator=generator), torch.randn(2, 3, generator=generator)
    install_weights(
        {
            table: {
                0: (LoRASliceWeights(bad[0], bad[1], 1.0), LoRASliceWeights(bad[0], bad[2], 1.0)),
                1: (LoRASliceWeights(a, b, 1.0), None),
            }
        }
    )
    x, y = torch.randn(4, 4, generator=generator), torch.randn(4, 5, generator=generator)
    alone, together = y.clone(), y.clone()
    add_lora_linear(alone, x, table, build_lora_metadata(torch.tensor([-1, 1, 1, -1]), 2))
    add_lora_linear(together, x, table, build_lora_metadata(torch.tensor([0, 1, 1, 0]), 2))
    torch.testing.assert_close(together[1:3], alone[1:3])
    assert has_same_bits(together[1:3, 3:], y[1:3, 3:])
    assert together[0].isfinite().logical_not().all()
