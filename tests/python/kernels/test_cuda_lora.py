"""The seam of the layers on CUDA: the shrink beside the base product, and what is left to the next kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import signed
from kernels.lora_cases import MAX_LORAS, has_same_bits
from kernels.triton_lora_cases import tables_on_device
from lora_serve.kernels import (
    LoRALayerTable,
    LoRAMetadata,
    _triton,
    build_lora_metadata,
    cuda_linear,
    cuda_lora,
)
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.kernels.lora_delta import FEW_TOKENS, MOST_TOKENS_BESIDE
from lora_serve.kernels.lora_rotary_store import lora_norm_rotary_store
from lora_serve.kernels.lora_silu_mul import lora_silu_mul
from lora_serve.kernels.lora_weights import LoRASliceWeights
from lora_serve.kernels.rms_norm import add_rms_norm, rms_norm
from lora_serve.kernels.silu_mul import silu_mul
from lora_serve.kernels.skinny_linear import skinny_linear

pytestmark = pytest.mark.gpu

SIZE = 2048
NUM_LAYERS = 4
DeltaGoes = Literal["to the output", "to the next kernel", "to the residual stream"]
NUM_TOKENS = [1, 3, 16, FEW_TOKENS, FEW_TOKENS + 1, 100, MOST_TOKENS_BESIDE, 300, 700]


class Layers:
    """Gated layers after each other: each reads what the one before has written, with adapters in all."""

    def __init__(
        self, dtype: torch.dtype, num_adapters: int, output_slices: tuple[int, ...] = (SIZE, SIZE)
    ) -> None:
        self.weights = [
            signed("cuda", dtype, sum(output_slices), SIZE, seed=layer, scale=SIZE**-0.5)
            for layer in range(NUM_LAYERS)
        ]
        self.norm = torch.ones(SIZE, dtype=dtype, device="cuda")
        self.wide_norm = torch.ones(2 * SIZE, dtype=dtype, device="cuda")
        self.tables = [LoRALayerTable(output_slices, SIZE) for _ in range(NUM_LAYERS)]
        self._num_adapters = num_adapters
        self._install(dtype, num_adapters)

    def _install(self, dtype: torch.dtype, num_adapters: int) -> None:
        for layer, table in enumerate(self.tables):
            installed = {}
            for slot in range(num_adapters):
                rank = (64, 8, 33)[slot % 3]
                a = signed("cpu", dtype, rank, SIZE, seed=100 * layer + slot, scale=SIZE**-0.5)
                seed, scale = 1000 + 100 * layer + slot, rank**-0.5
                installed[slot] = tuple(
                    LoRASliceWeights(a, signed("cpu", dtype, rank, width, seed=seed, scale=scale), scaling)
                    for width, scaling in zip(table.output_slices, (0.5, -1.5, 2.0), strict=False)
                )
            install_weights({table: installed})
            arena, tables = tables_on_device(table, "cuda")
            tables.max_rank = 64
            table.arena, table.tables = arena, tables
            views = tables.layers[0]
            table.a_offset, table.b_offset = views.a_offset, views.b_offset
            table.lora_rank, table.scaling = views.lora_rank, views.scaling

    def move_adapters(self) -> None:
        """Each slot gets the adapter of the one before it, the first the last one's."""
        for table in self.tables:
            rows = table.tables.rows[: self._num_adapters]
            rows.copy_(rows.roll(1, 0))

    def run(self, x: Tensor, metadata: LoRAMetadata, delta_goes: DeltaGoes) -> Tensor:
        for weight, table in zip(self.weights, self.tables, strict=True):
            if delta_goes == "to the residual stream":
                residual = x.repeat(1, 2)
                y = cuda_lora.linear_into(residual, x, weight, None, table, metadata)
                x = silu_mul(add_rms_norm(y, residual, self.wide_norm, 1e-6))
            else:
                y, delta = cuda_lora.linear(x, weight, None, table, metadata)
                if delta_goes == "to the next kernel":
                    x = lora_silu_mul(y, delta)
                else:
                    cuda_lora.add_delta(y, delta)
                    x = silu_mul(y)
            x = rms_norm(x, self.norm, 1e-6)  # Launched early, as in a model, and keeps x from vanishing.
        return x


def steps_of(num_tokens: int, num_adapters: int) -> LoRAMetadata:
    """Adapters and none in turn; a step of one token has an adapter."""
    slots = torch.arange(1, num_tokens + 1, dtype=torch.int32) % (num_adapters + 1) - 1
    return build_lora_metadata(slots, MAX_LORAS, device=torch.device("cuda"))


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None, **options: object) -> Tensor:
    return skinny_linear(x, weight, bias, launch=options["launch"])


@pytest.fixture(autouse=True)
def _early_launches_again():
    yield
    _triton.set_early_launches(True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("delta_goes", get_args(DeltaGoes))
def test_layers_that_run_beside_each_other_give_what_they_give_one_by_one(
    monkeypatch, dtype, num_tokens, delta_goes
):
    layers, metadata = Layers(dtype, num_adapters=5), steps_of(num_tokens, 5)
    inputs = [signed("cuda", dtype, num_tokens, SIZE, seed=seed) for seed in (7, 8)]

    def run(x: Tensor) -> Tensor:
        return layers.run(x, metadata, delta_goes)

    with monkeypatch.context() as patch:  # The same kernels, none of which begins before the last one's end.
        patch.setattr(cuda_linear, "launches_early", lambda x: True)
        patch.setattr(cuda_linear, "skinny_linear", one_by_one)
        _triton.set_early_launches(False)
        expected = [run(x) for x in inputs]
        _triton.set_early_launches(True)
    assert all(y.isfinite().all() and y.float().std() > 0.5 for y in expected)
    assert not has_same_bits(*expected)

    with torch.cuda.stream(torch.cuda.Stream()):
        eager = [run(x) for x in inputs]
    torch.cuda.synchronize()
    x = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)

    assert all(map(has_same_bits, eager, expected))
    for _ in range(25):
        for values, result in zip(
            inputs, expected, strict=True
        ):  # What the last replay left is wrong for this.
            x.copy_(values)
            graph.replay()
            assert has_same_bits(y, result)
    assert torch._C._get_sm_carveout_experimental() is None, "what one product leaves is for that one alone"


def capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of what is run, and where its replays leave the result."""
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def take_over(metadata: LoRAMetadata, other: LoRAMetadata) -> None:
    """What a graph reads becomes that of another step."""
    for name in (
        "token_lora_mapping",
        "token_indices_sorted_by_lora_ids",
        "num_tokens_per_lora",
        "lora_token_start_loc",
        "active_lora_ids",
        "lora_tiles",
    ):
        getattr(metadata, name).copy_(getattr(other, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5, FEW_TOKENS, 100, 300, 700])
@pytest.mark.parametrize("delta_goes", get_args(DeltaGoes))
def test_one_graph_serves_every_mix_of_adapters(dtype, num_tokens, delta_goes):
    layers, metadata = Layers(dtype, num_adapters=5), steps_of(num_tokens, 5)
    x = signed("cuda", dtype, num_tokens, SIZE, seed=7)
    graph, y = capture(partial(layers.run, x, metadata, delta_goes))
    results = []
    for are_moved in (False, True):
        if are_moved:
            layers.move_adapters()
        for num_adapters in (0, 1, 3, 5):
            other = steps_of(num_tokens, num_adapters)
            take_over(metadata, other)
            graph.replay()
            results.append(layers.run(x, other, delta_goes))
            assert has_same_bits(y, results[-1])
    assert has_same_bits(results[0], results[4]), "no adapter in the step"
    assert not any(map(has_same_bits, results[1:4], results[5:]))


class Attentions:
    """Projections to queries, keys and values after each other: the next one reads the queries."""

    HEADS, KV_HEADS, HEAD_DIM, PAGES, PAGE_SIZE = 16, 4, 128, 20, 16

    def __init__(self, dtype: torch.dtype, num_tokens: int) -> None:
        heads, kv_heads, dim = self.HEADS, self.KV_HEADS, self.HEAD_DIM
        self._layers = Layers(dtype, 5, (heads * dim, kv_heads * dim, kv_heads * dim))
        self.metadata = steps_of(num_tokens, 5)
        self._head_norm = torch.ones(dim, dtype=dtype, device="cuda")
        self._cos_sin = signed("cuda", torch.float32, 4096, dim, seed=5)
        self.x = torch.zeros(num_tokens, SIZE, dtype=dtype, device="cuda")
        self.positions, self.slot_mapping = torch.zeros(2, num_tokens, dtype=torch.int64, device="cuda")
        shape = (NUM_LAYERS, 2, self.PAGES, self.PAGE_SIZE, kv_heads, dim)
        self.pages = torch.zeros(shape, dtype=dtype, device="cuda")

    def prepare(self, seed: int) -> None:
        """Another step: the last things that are written ahead of it."""
        num_tokens, generator = len(self.x), torch.Generator().manual_seed(seed)
        places = torch.randperm(self.PAGES * self.PAGE_SIZE, generator=generator)[:num_tokens]
        values = signed("cuda", self.x.dtype, num_tokens, SIZE, seed=seed)
        positions = torch.randint(0, 4096, (num_tokens,), generator=generator).cuda()
        self.pages.zero_()
        self.x.copy_(values)
        self.slot_mapping.copy_(places.cuda())
        self.positions.copy_(positions)

    def run(self, metadata: LoRAMetadata | None = None) -> Tensor:
        x, metadata = self.x, self.metadata if metadata is None else metadata
        for weight, table, pages in zip(self._layers.weights, self._layers.tables, self.pages, strict=True):
            qkv, delta = cuda_lora.linear(x, weight, None, table, metadata)
            places = (self.positions, self._cos_sin, self.slot_mapping, *pages)
            query = lora_norm_rotary_store(qkv, delta, *places, self._head_norm, self._head_norm, 1e-6)
            x = rms_norm(query.reshape(len(x), SIZE), self._layers.norm, 1e-6)
        return x


@pytest.mark.parametrize("num_tokens", [FEW_TOKENS + 1, 128, MOST_TOKENS_BESIDE, 300])
def test_rotary_kernels_that_begin_early_see_the_step_that_was_prepared_last(num_tokens):
    attentions, seeds = Attentions(torch.bfloat16, num_tokens), (7, 8)
    _triton.set_early_launches(False)
    expected = []
    for seed in seeds:
        attentions.prepare(seed)
        expected.append((attentions.run().clone(), attentions.pages.clone()))
    _triton.set_early_launches(True)
    assert not any(map(has_same_bits, *expected))

    graph, x = capture(attentions.run)
    for _ in range(25):
        for seed, (result, pages) in zip(seeds, expected, strict=True):
            attentions.prepare(seed)
            graph.replay()
            assert has_same_bits(x, result)
            assert has_same_bits(attentions.pages, pages)


@pytest.mark.parametrize("num_tokens", [FEW_TOKENS + 1, 128, 300])
def test_one_graph_of_rotary_kernels_serves_every_mix_of_adapters(num_tokens):
    attentions = Attentions(torch.bfloat16, num_tokens)
    attentions.prepare(7)
    graph, x = capture(attentions.run)
    results = []
    for num_adapters in (0, 1, 3, 5):
        other = steps_of(num_tokens, num_adapters)
        attentions.prepare(7)
        results.append(attentions.run(other))
        pages = attentions.pages.clone()
        take_over(attentions.metadata, other)
        attentions.prepare(7)
        graph.replay()
        assert has_same_bits(x, results[-1])
        assert has_same_bits(attentions.pages, pages)
    assert not any(map(has_same_bits, results, results[1:]))
