"""What adapters cost in layers of Qwen3-8B without attention: microseconds a layer, beside the base model.

Six of the engine's own layers run one after the other (norm, qkv, rotary and store, o, norm, gate_up, silu,
down; attention hands its queries on). Their weights are 2.3 GB, which no cache keeps. Whatever the layers
choose is measured, with all that one kernel does to the next. Steps of up to 128 tokens stand for decodes,
whose rows take the adapters in turn; larger ones for prefills, where an adapter's tokens lie together.

- base, ours: steps without adapters, and with
- ours_shrink_in_line: the shrink runs neither ahead of the base product nor on a second stream. No other
  kernel is launched early then, so base_not_early stands beside it

Each provider is one CUDA graph. Those of one number of tokens are checked against torch and replayed in turn,
so that what the GPU's clock does comes to all of them. `extra_us` is the time over base; `floor_us` is what
the bytes of A and B of the adapters take at the rate of a large copy in the same run. Ahead of a run, several
processes may compile side by side, each with --compile-only and its --rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from kernel_bench import copy_rate_gb_per_s, driver_version, triton_version
from rotating_layers import MAX_LORAS, MOST_DECODES
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows
from timing import percentiles

from lora_serve.kernels import LoRALayerTable, LoRAMetadata, _triton, build_lora_metadata, cuda_lora, lora_ops
from lora_serve.kernels.device_tables import DeviceTables, ModulePlace
from lora_serve.layers import KVLayer, StepContext, compute_cos_sin, ops
from lora_serve.models.config import ModelConfig, read_model_config
from lora_serve.models.decoder_layer import DecoderLayer
from lora_serve.models.shapes import write_model_shape

NUM_LAYERS, PAGE_SIZE, LARGEST_ERROR = 6, 16, 0.1
ROWS = (1, 8, 32, 128, 256, 512, 4096, 16384)
ADAPTERS = {"1xr64": (1, 64), "8xr64": (8, 64), "32xr64": (32, 64)}
ADAPTERS |= {"8xr16": (8, 16), "32xr16": (32, 16), "64xr16": (64, 16)}


def make_config(is_smallest: bool) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        config = read_model_config(write_model_shape("qwen3-8b", Path(folder)))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return replace(config, **sizes, dtype=torch.float32) if is_smallest else config


def make_layers(config: ModelConfig, device: torch.device) -> list[DecoderLayer]:
    """Random weights, whose outputs are about as large as their inputs."""
    no_attention = SimpleNamespace(attend=lambda query, *_: query)
    layers = [DecoderLayer(config, index, no_attention, device) for index in range(NUM_LAYERS)]
    for linear in (linear for layer in layers for linear in layer.packed_linears()):
        linear.weight.normal_(std=linear.in_features**-0.5)
    return layers


class Adapters:
    """Adapters of one rank, with modules on all slices of all layers; there are places for `max_loras`."""

    def __init__(
        self, layers: list[DecoderLayer], num_adapters: int, lora_rank: int, max_loras: int = MAX_LORAS
    ) -> None:
        self.num_adapters, self.max_loras = num_adapters, max_loras
        self.columns = {"adapters": num_adapters, "lora_rank": lora_rank, "max_loras": max_loras}
        self._linears = [linear for layer in layers for linear in layer.packed_linears()]
        weight, num_slices = self._linears[0].weight, [len(linear.output_slices) for linear in self._linears]
        self._tables = DeviceTables(num_slices, max_loras, weight.device, max_rank=lora_rank)
        end = 0
        for slot in range(num_adapters):
            modules = []
            for index, linear in enumerate(self._linears):
                for slice_index, width in enumerate(linear.output_slices):
                    b_offset = end + lora_rank * linear.in_features
                    modules.append(ModulePlace(index, slice_index, end, b_offset, lora_rank, 0.5))
                    end = b_offset + lora_rank * width
            self._tables.rows[slot].copy_(self._tables.make_row(modules))
        self.arena = torch.empty(end, dtype=weight.dtype, device=weight.device).normal_(std=0.05)

    def bind(self) -> None:
        """Make them the layers' adapters."""
        for index, linear in enumerate(self._linears):
            linear.lora_table.bind(self.arena, self._tables, index)


class Step:
    """A step of so many tokens."""

    def __init__(self, layers: list[DecoderLayer], config: ModelConfig, num_tokens: int) -> None:
        device, self.is_decode = layers[0].input_layernorm.weight.device, num_tokens <= MOST_DECODES
        self._layers, self.num_tokens = layers, num_tokens
        self._positions = torch.arange(num_tokens, device=device)
        self._slot_mapping = self._positions * (PAGE_SIZE if self.is_decode else 1)
        self._cos_sin = compute_cos_sin(config.rope, config.head_dim, num_tokens, device)
        num_pages = num_tokens if self.is_decode else -(-num_tokens // PAGE_SIZE)
        shape = (num_pages, NUM_LAYERS, 2, PAGE_SIZE, config.num_kv_heads, config.head_dim)
        self._pages = torch.zeros(shape, dtype=config.dtype, device=device)
        self._kv_layers = [
            KVLayer(self._pages[:, layer, 0], self._pages[:, layer, 1]) for layer in range(NUM_LAYERS)
        ]
        self._start = torch.randn(num_tokens, config.hidden_size, dtype=config.dtype, device=device)
        self.residual = self._start.clone()
        self._in_torch: dict[Adapters | None, tuple[Tensor, Tensor]] = {}

    def context(self, adapters: Adapters | None) -> StepContext:
        if adapters is None:
            return StepContext(self._positions, self._slot_mapping, None)
        tokens, count = torch.arange(self.num_tokens), adapters.num_adapters
        slots = tokens % count if self.is_decode else tokens * count // self.num_tokens
        lora = build_lora_metadata(slots, adapters.max_loras, device=self._positions.device)
        return StepContext(self._positions, self._slot_mapping, lora)

    def restart(self) -> None:
        self.residual.copy_(self._start)

    def run(self, ctx: StepContext, adapters: Adapters | None) -> Tensor:
        """Go on with the residual stream; what is still to be added to it."""
        if adapters is not None:
            adapters.bind()
        added = None
        for layer, kv_layer in zip(self._layers, self._kv_layers, strict=True):
            query = layer.begin(added, self.residual, self._cos_sin, ctx, kv_layer)
            attended = layer.self_attn.attend(query, kv_layer, None)
            added = layer.finish(attended, self.residual, ctx)
        return torch.zeros_like(self.residual) if added is None else added

    def spoil(self) -> None:
        """Restart, with NaN in all pages: whoever stores nothing is found out."""
        self.restart()
        self._pages.fill_(float("nan"))

    def outcome(self, result: Tensor) -> tuple[Tensor, Tensor]:
        """What a run gives of each token, fp32: the residual stream, and all keys and values."""
        slots, page = self._slot_mapping % PAGE_SIZE, self._slot_mapping // PAGE_SIZE
        stored = self._pages[page, :, :, slots].flatten(1)
        return (result + self.residual).float(), stored.float()

    def outcome_in_torch(self, adapters: Adapters | None) -> tuple[Tensor, Tensor]:
        """What a run from the start must give."""
        if adapters not in self._in_torch:
            self.spoil()
            with ops.torch_ops_only(), patch.object(lora_ops, "lora_implementation", lambda _: TorchLoop):
                result = self.run(self.context(adapters), adapters)
            self._in_torch[adapters] = self.outcome(result)
        return self._in_torch[adapters]


class TorchLoop:
    """In place of the engine's LoRA operators: adapters and slices one by one."""

    @staticmethod
    def add_linear(y: Tensor, x: Tensor, table: LoRALayerTable, metadata: LoRAMetadata) -> None:
        for slot in table.installed_slots:
            rows = (metadata.token_lora_mapping == slot).nonzero()[:, 0]
            modules = [module for module in table.get(slot) or () if module is not None]
            deltas = [(x[rows] @ module.a.t()).mul_(module.scaling) @ module.b for module in modules]
            y.index_add_(0, rows, torch.cat(deltas, dim=1))


class Variant:
    """A provider on a step, its graph, and the times of a layer in the graph's replays."""

    def __init__(self, step: Step, provider: str, adapters: Adapters | None) -> None:
        self.provider, self.adapters, self._step = provider, adapters, step
        self._ctx = step.context(adapters)  # a graph keeps addresses, not the tensors
        self.times_us: list[float] = []

    @property
    def is_cuda(self) -> bool:
        return self._step.residual.is_cuda

    def run(self) -> Tensor:
        is_early = self.provider in ("base", "ours")
        _triton.set_early_launches(is_early)
        with patch.object(cuda_lora, "_MOST_ASIDE", cuda_lora._MOST_ASIDE if is_early else 0):
            return self._step.run(self._ctx, self.adapters)

    def capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self.run()

    def error_of(self, result: Tensor) -> float:
        """The largest error of a token, as a share of what the adapters change in it."""
        outcome = self._step.outcome(result)
        expected, base = (self._step.outcome_in_torch(adapters) for adapters in (self.adapters, None))
        errors = [
            (ours - theirs).norm(dim=1) / (theirs - without).norm(dim=1)
            for ours, theirs, without in zip(outcome, expected, base, strict=True)
        ]
        return torch.cat(errors).max().item()  # NaN where there is one

    def check(self, result: Tensor) -> None:
        """Raise where rounding does not explain a token's result, beside what the adapters change in it."""
        if self.adapters is not None and not (error := self.error_of(result)) <= LARGEST_ERROR:
            raise RuntimeError(f"{self.provider} is off by {error} of what the adapters change")

    def time(self) -> None:
        """Add one time. The replay before keeps the device busy while the other is handed over."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.times_us.append(start.elapsed_time(end) * 1e3 / NUM_LAYERS)


def measure(step: Step, variants: list[Variant], gb_per_s: float, repetitions: int) -> list[dict[str, Any]]:
    """The rows of one number of tokens, printed."""
    for variant in variants:
        variant.capture()
        step.spoil()
        variant.graph.replay()
        variant.check(variant.result)
    for _ in range(repetitions):
        for variant in variants:
            variant.time()
    base_us = percentiles(variants[0].times_us)[1]
    rows = []
    for variant in variants:
        p20, p50, p80 = percentiles(variant.times_us)
        adapters = variant.adapters
        num_bytes = adapters.arena.nbytes / NUM_LAYERS if adapters else 0
        times = {"us_per_layer": p50, "extra_us": p50 - base_us, "floor_us": num_bytes / gb_per_s / 1e3}
        times |= {"p20_us": p20, "p80_us": p80}
        row: dict[str, Any] = {"provider": variant.provider, "tokens": step.num_tokens}
        row |= adapters.columns if adapters else {"adapters": 0, "lora_rank": 0, "max_loras": 0}
        row |= {name: round(us, 2) for name, us in times.items()}
        row |= {"copy_gb_per_s": round(gb_per_s), "triton": triton_version(), "driver": driver_version()}
        print(*(f"{key} {value}" for key, value in list(row.items())[:10]), sep="  ", flush=True)
        rows.append(row)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--smallest", action="store_true", help="one tiny run on the CPU that writes nothing")
    parser.add_argument("--dry-run", action="store_true", help="print, write no results")
    parser.add_argument("--compile-only", action="store_true", help="compile and check, time nothing")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="tokens of the steps")
    parser.add_argument(
        "--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS), help="and rank"
    )
    parser.add_argument(
        "--max-loras", type=int, default=MAX_LORAS, help="places for adapters, as the engine's"
    )
    parser.add_argument("--repetitions", type=int, default=20, help="of each graph")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smallest:
        sys.exit("this benchmark needs a GPU; --smallest runs on the CPU")
    wanted = [(3, 2)] if options.smallest else [ADAPTERS[name] for name in options.adapters]
    if options.max_loras < (most := max(count for count, _ in wanted)):
        parser.error(f"--max-loras is {options.max_loras}, expected {most} or more for --adapters")
    is_timed = not options.smallest and not options.compile_only
    gb_per_s = copy_rate_gb_per_s() if is_timed else 0.0
    config = make_config(options.smallest)
    layers = make_layers(config, torch.device("cpu" if options.smallest else "cuda"))
    all_adapters = [Adapters(layers, *numbers, options.max_loras) for numbers in wanted]
    rows = []
    for num_tokens in [5] if options.smallest else options.rows:
        step = Step(layers, config, num_tokens)
        variants = [Variant(step, provider, None) for provider in ("base", "base_not_early")]
        for adapters in (adapters for adapters in all_adapters if adapters.num_adapters <= num_tokens):
            variants += [Variant(step, provider, adapters) for provider in ("ours", "ours_shrink_in_line")]
        for variant in variants:
            step.spoil()
            result = variant.run()  # compiles; a capture must not
            if not is_timed:
                variant.check(result)
        if is_timed:
            rows += measure(step, variants, gb_per_s, options.repetitions)
    if rows and not options.dry_run:
        print(f"appended to {append_rows('lora_layers', rows)}")


if __name__ == "__main__":
    main()
