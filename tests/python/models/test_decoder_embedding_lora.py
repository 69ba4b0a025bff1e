"""LoRA on embed_tokens and lm_head against peft's own models: tied and untied, chunks, mixed batches.

The weights are taken from peft's modules, so that nothing here depends on how adapters are stored.
"""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_serve.kernels import LoRASliceWeights, build_lora_metadata
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.models import DecoderModel, load_model
from lora_serve.testing.models import make_random_model
from support.paged_sequences import PagedSequences

SLOTS = {"embed_tokens": 3, "lm_head": 0, "both": 7, "both_and_linear": 5}
TARGETS: dict[str, tuple[int, float, list[str]]] = {
    "embed_tokens": (3, 5.0, ["embed_tokens"]),
    "lm_head": (5, -4.0, ["lm_head"]),
    "both": (1, 1.5, ["embed_tokens", "lm_head"]),
    "both_and_linear": (6, 7.0, ["embed_tokens", "lm_head", "q_proj", "down_proj"]),
}
PAGE_SIZE = 4
LEFT_OUT_ROW = 1
"""Its logits are not computed in the first step."""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, "Qwen3ForCausalLM", seed=3, tie_word_embeddings=request.param)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    references: dict[str | None, torch.nn.Module] = {None: base}
    model = load_model(str(path))
    for seed, (name, (rank, alpha, targets)) in enumerate(TARGETS.items()):
        references[name] = make_peft_model(base, rank, alpha, targets, seed)
    install(model, {slot: slice_weights(references[name]) for name, slot in SLOTS.items()})
    return model, references


def make_peft_model(
    base: torch.nn.Module, rank: int, alpha: float, targets: list[str], seed: int
) -> torch.nn.Module:
    with warnings.catch_warnings():
        # peft warns that merged weights of tied modules could not be saved; nothing is merged here.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                size = 0.1 if "lora_embedding_" in name else 1.5 * parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def slice_weights(model: torch.nn.Module) -> dict[str, LoRASliceWeights]:
    """What peft's layers hold, in the layout that the operators read."""
    modules = {}
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        if isinstance(layer, peft.tuners.lora.Embedding):
            a, b = layer.lora_embedding_A["default"].T, layer.lora_embedding_B["default"].T
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight.T
        modules[name] = LoRASliceWeights(
            a.detach().contiguous(), b.detach().contiguous(), layer.scaling["default"]
        )
    return modules


def install(model: DecoderModel, adapters: dict[int, dict[str, LoRASliceWeights]]) -> None:
    weights: dict = {}
    for name, target in model.lora_targets().items():
        of_table = weights.setdefault(target.table, {})
        for slot, modules in adapters.items():
            of_slot = of_table.setdefault(slot, [None] * target.table.num_slices)
            of_slot[target.slice_index] = modules.pop(name, None)
    assert not any(adapters.values())
    install_weights(weights)


def random_tokens(length: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


def reference_logits(reference: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return reference(input_ids=tokens[None]).logits[0]


def run_mixed(model: DecoderModel, names: list[str | None], tokens: list[Tensor]) -> list[Tensor]:
    """Run rows in chunks; give logits of last tokens, through metadata of the rows that have logits only."""
    sequences = PagedSequences(PAGE_SIZE)
    kv_layers = sequences.make_kv_layers(model.config)
    slots = [-1 if name is None else SLOTS[name] for name in names]
    found: list[list[Tensor]] = [[] for _ in names]
    position = 0
    for num in (7, 1, 1, 11):
        chunks = [(str(row), num) for row in range(len(names))]
        ids = torch.cat([row_tokens[position : position + num] for row_tokens in tokens])
        hidden = sequences.run(model, ids, sequences.step(chunks, slots), kv_layers)
        # Rows in another order than the step's, and not all of them.
        rows = [row for row in reversed(range(len(names))) if not (num == 7 and row == LEFT_OUT_ROW)]
        last = torch.tensor([row * num + num - 1 for row in rows])
        lora = build_lora_metadata(torch.tensor([slots[row] for row in rows]), 8)
        for row, logits in zip(rows, model.compute_logits(hidden[last], lora), strict=True):
            found[row].append(logits)
        position += num
    return [torch.stack(rows_of) for rows_of in found]


def test_embedding_and_lm_head_adapters_mixed_with_base_equal_peft(models) -> None:
    model, references = models
    names: list[str | None] = ["both", "lm_head", None, "embed_tokens", "both", "both_and_linear", None]
    tokens = [random_tokens(20, seed=row) for row in range(len(names))]
    tokens[2] = tokens[0]

    found = run_mixed(model, names, tokens)

    for row, name in enumerate(names):
        positions = [7, 8, 19] if row == LEFT_OUT_ROW else [6, 7, 8, 19]
        expected = reference_logits(references[name], tokens[row])[positions]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=0)
    assert (found[0] - found[2]).abs().max() > 0.5


def test_every_adapter_changes_the_logits(models) -> None:
    """Without this, two that ignore the adapter could agree."""
    _, references = models
    tokens = random_tokens(20, seed=1)
    base = reference_logits(references[None], tokens)
    for name in TARGETS:
        assert (reference_logits(references[name], tokens) - base).abs().max() > 0.1, name


def test_tied_matrix_is_changed_for_look_ups_or_for_logits_only(models) -> None:
    """LoRA on embed_tokens leaves lm_head's matrix alone, and the other way round, also where it is one."""
    model, _ = models
    tokens, num = random_tokens(9, seed=4), 9
    sequences = PagedSequences(PAGE_SIZE)
    kv_layers = sequences.make_kv_layers(model.config)
    chunks = [("base", num), ("embed_tokens", num), ("lm_head", num)]
    slots = [-1, SLOTS["embed_tokens"], SLOTS["lm_head"]]

    hidden = sequences.run(model, tokens.repeat(3), sequences.step(chunks, slots), kv_layers)

    of_base, of_embedding, of_head = hidden.clone().split(num)
    assert torch.equal(of_head, of_base)
    assert (of_embedding - of_base).abs().max() > 1e-2
    plain = model.compute_logits(of_embedding, None)
    lora = build_lora_metadata(torch.full((num,), SLOTS["embed_tokens"]), 8)
    assert torch.equal(model.compute_logits(of_embedding, lora), plain)
