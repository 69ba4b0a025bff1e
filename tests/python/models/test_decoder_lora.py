"""Adapters on the whole decoder against transformers' model with the deltas merged into its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_serve.kernels import LoRASliceWeights
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.layers import LoRAKind
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


def install(model: DecoderModel, adapters: dict[int, dict]) -> None:
    weights: dict = {}
    for name, target in model.lora_targets().items():
        of_table = weights.setdefault(target.table, {})
        for slot, adapter in adapters.items():
            of_slot = of_table.setdefault(slot, [None] * target.table.num_slices)
            of_slot[target.slice_index] = adapter.get(name)
    install_weights(weights)


def merged(reference, adapter: dict):
    model = copy.deepcopy(reference)
    for name, module in adapter.items():
        weight = model.get_submodule(name).weight
        weight.data += module.scaling * (module.b.T @ module.a)
    return model


def test_lora_targets_are_the_linears_and_the_embedding_of_transformers(path: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(path)
    expected: dict = {}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = LoRAKind.LOGITS if name == "lm_head" else LoRAKind.LINEAR
            expected[name] = (module.in_features, module.out_features, kind)
        elif isinstance(module, torch.nn.Embedding):
            expected[name] = (module.num_embeddings, module.embedding_dim, LoRAKind.EMBEDDING)
    targets = load_model(path).lora_targets()
    assert {name: (t.in_features, t.out_features, t.kind) for name, t in targets.items()} == expected
    assert len(expected) == 16
    order = list(targets)
    assert (order[0], order[-1]) == ("model.embed_tokens", "lm_head")


def test_fused_lora_targets_cover_the_packed_projections_of_every_layer(path: str) -> None:
    model = load_model(path)
    fused = model.fused_lora_targets()
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert fused[f"{attention}.qkv_proj"] == tuple(f"{attention}.{x}_proj" for x in "qkv")
    assert fused[f"{mlp}.gate_up_proj"] == (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    assert len(fused) == 4
    targets = model.lora_targets()
    for path_of_fused, members in fused.items():
        assert path_of_fused not in targets
        assert [targets[member].slice_index for member in members] == list(range(len(members)))
        assert {id(targets[member].table) for member in members} == {id(targets[members[0]].table)}
        assert len(members) == targets[members[0]].table.num_slices


def test_adapters_and_base_mixed_over_steps_equal_merged_weights(path: str) -> None:
    model, base = load_model(path), AutoModelForCausalLM.from_pretrained(path).eval()
    adapters = {
        3: make_adapter(
            model, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 5, 1
        ),
        0: make_adapter(model, ("v_proj", "up_proj"), 8, 2),
    }
    install(model, adapters)
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
        context = sequences.step(chunks, list(slots.values()))
        hidden = sequences.run(model, ids, context, kv_layers)
        # All tokens are rows of logits here, so that the step's own grouping is theirs.
        for name, part in zip(slots, model.compute_logits(hidden, context.lora).split(num), strict=True):
            found[name].append(part)
        position += num

    for name, slot in slots.items():
        with torch.no_grad():
            expected = references[slot](tokens[name][None]).logits[0]
        torch.testing.assert_close(torch.cat(found[name]), expected, atol=1e-4, rtol=0)
    assert (torch.cat(found["a"]) - torch.cat(found["b"])).abs().max() > 0.5
