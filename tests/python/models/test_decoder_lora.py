"""Adapters on the whole decoder against transformers' model with the deltas merged into its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_serve.kernels import LoRASliceWeights
from lora_serve.models import DecoderModel, load_model
from lora_serve.testing.models import make_random_model
from support.paged_sequences import PagedSequences

ARCHITECTURE = "Qwen3ForCausalLM"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    make_random_model(directory, ARCHITECTURE, seed=3)
    return str(directory)


def make_adapter(model: DecoderModel, suffixes: tuple[str, ...], rank: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, target in model.lora_targets().items():
        if name.endswith(suffixes):
            a = torch.randn(rank, target.in_features, generator=generator) * target.in_features**-0.5
            b = torch.randn(rank, target.out_features, generator=generator) * rank**-0.5
            modules[name] = LoRASliceWeights(a, b, 0.7)
    return modules


def install(model: DecoderModel, slot: int, adapter: dict) -> None:
    weights: dict = {}
    for name, target in model.lora_targets().items():
        empty = [None] * target.table.num_slices
        weights.setdefault(target.table, empty)[target.slice_index] = adapter.get(name)
    for table, slices in weights.items():
        table.install(slot, tuple(slices))


def merged(reference, adapter: dict):
    model = copy.deepcopy(reference)
    for name, module in adapter.items():
        weight = model.get_submodule(name).weight
        weight.data += module.scaling * (module.b.T @ module.a)
    return model


def test_lora_targets_are_the_linear_modules_of_transformers(path: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(path)
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in reference.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    targets = load_model(path).lora_targets()
    assert {name: (t.in_features, t.out_features) for name, t in targets.items()} == linears
    assert len(linears) == 14


def test_adapters_and_base_mixed_over_steps_equal_merged_weights(path: str) -> None:
    model, base = load_model(path), AutoModelForCausalLM.from_pretrained(path).eval()
    adapters = {
        3: make_adapter(
            model, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 5, 1
        ),
        0: make_adapter(model, ("v_proj", "up_proj"), 8, 2),
    }
    for slot, adapter in adapters.items():
        install(model, slot, adapter)
    references = {-1: base, **{slot: merged(base, adapter) for slot, adapter in adapters.items()}}
    slots = {"a": 3, "b": -1, "c": 0, "d": 3}
    generator = torch.Generator().manual_seed(7)
    tokens = {name: torch.randint(0, 256, (20,), generator=generator) for name in slots}
    tokens["b"] = tokens["a"]
    sequences = PagedSequences(page_size=4)
    kv_layers = sequences.make_kv_layers(model.config)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in slots}
    position = 0

    for num in (7, 1, 1, 11):
        chunks = [(name, num) for name in slots]
        ids = torch.cat([tokens[name][position : position + num] for name in slots])
        hidden = model.forward(ids, sequences.step(chunks, list(slots.values())), kv_layers)
        for name, part in zip(slots, model.compute_logits(hidden).split(num), strict=True):
            found[name].append(part)
        position += num

    for name, slot in slots.items():
        with torch.no_grad():
            expected = references[slot](tokens[name][None]).logits[0]
        torch.testing.assert_close(torch.cat(found[name]), expected, atol=1e-4, rtol=0)
    assert (torch.cat(found["a"]) - torch.cat(found["b"])).abs().max() > 0.5
