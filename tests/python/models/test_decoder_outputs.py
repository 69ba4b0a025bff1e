"""Steps that name the tokens whose hidden states are wanted: the last layer leaves the others out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_serve.kernels import build_lora_metadata
from lora_serve.layers.step_context import StepOutputs
from lora_serve.models import DecoderModel, load_model
from lora_serve.testing.models import make_random_model
from models.test_decoder_lora import install, make_adapter
from support.paged_sequences import PagedSequences

CHUNKS, SLOTS = [("a", 7), ("b", 1), ("c", 5)], [3, -1, 6]
LAST_TOKENS = [6, 7, 12]


@pytest.fixture
def model(tmp_path: Path) -> DecoderModel:
    make_random_model(tmp_path, "Qwen3ForCausalLM", seed=3)
    model = load_model(str(tmp_path))
    suffixes = ("q_proj", "o_proj", "up_proj", "down_proj")
    install(model, {slot: make_adapter(model, suffixes, 4, seed=slot) for slot in (3, 6)})
    return model


def run(model: DecoderModel, slots: list[int] | None, outputs: StepOutputs | None):
    """One step over three rows, then one over the first of them; hidden states of both, and the KV pages."""
    sequences = PagedSequences(4)
    kv_layers = sequences.make_kv_layers(model.config)
    for layer in kv_layers:
        layer.k.zero_()
        layer.v.zero_()
    ids = torch.randint(0, 256, (13,), generator=torch.Generator().manual_seed(5))
    context = replace(sequences.step(CHUNKS, slots), outputs=outputs)
    first = sequences.run(model, ids, context, kv_layers)
    second = sequences.run(model, ids[:2], sequences.step([("a", 2)], slots and slots[:1]), kv_layers)
    return first, second, [pages for layer in kv_layers for pages in (layer.k, layer.v)]


@pytest.mark.parametrize("slots", [None, SLOTS], ids=["base", "adapters"])
def test_wanted_tokens_get_the_hidden_states_that_they_have_among_all(
    model: DecoderModel, slots: list[int] | None
) -> None:
    lora = None if slots is None else build_lora_metadata(torch.tensor(slots), max_loras=8)
    all_tokens, next_step, pages = run(model, slots, None)

    wanted, next_step_after, pages_after = run(model, slots, StepOutputs(torch.tensor(LAST_TOKENS), lora))

    assert wanted.shape == (3, model.config.hidden_size)
    torch.testing.assert_close(wanted, all_tokens[LAST_TOKENS], atol=1e-5, rtol=0)
    assert torch.equal(next_step_after, next_step)
    assert all(torch.equal(one, other) for one, other in zip(pages, pages_after, strict=True))


def test_adapters_of_the_wanted_tokens_are_those_of_their_own_grouping(model: DecoderModel) -> None:
    other = build_lora_metadata(torch.tensor(SLOTS[::-1]), max_loras=8)
    all_tokens, _, _ = run(model, SLOTS, None)

    wanted, _, _ = run(model, SLOTS, StepOutputs(torch.tensor(LAST_TOKENS), other))

    difference = (wanted - all_tokens[LAST_TOKENS]).abs().amax(dim=1)
    assert difference[0] > 1e-3
    assert difference[1] < 1e-5
    assert difference[2] > 1e-3


def test_a_step_that_wants_no_token_still_stores_keys_and_values(model: DecoderModel) -> None:
    _, next_step, pages = run(model, SLOTS, None)

    nothing, next_step_after, pages_after = run(model, SLOTS, StepOutputs(torch.tensor([]).long(), None))

    assert nothing.shape == (0, model.config.hidden_size)
    assert torch.equal(next_step_after, next_step)
    assert all(torch.equal(one, other) for one, other in zip(pages, pages_after, strict=True))
