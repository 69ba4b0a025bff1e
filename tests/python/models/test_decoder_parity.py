"""The decoder against transformers' own models: fp32 on the CPU, the same random checkpoint."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_serve.models import load_model
from lora_serve.testing.models import make_random_model
from support.paged_sequences import PagedSequences

TOLERANCE = 1e-4
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama_tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama_biases": ("LlamaForCausalLM", {"extra_config": {"attention_bias": True, "mlp_bias": True}}),
    "llama_derived_head_dim": (
        "LlamaForCausalLM",
        {"hidden_size": 96, "num_heads": 6, "head_dim": 16, "extra_config": {"head_dim": None}},
    ),
    "llama_llama3_rope": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 256},
    ),
    "llama_linear_rope": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama_dynamic_rope": ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "mistral": ("MistralForCausalLM", {}),
    "mistral_window": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_tied_mha": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "num_kv_heads": 4}),
    "qwen2_window_on_last_layers": (
        "Qwen2ForCausalLM",
        {"sliding_window": 9, "max_window_layers": 1, "num_layers": 3},
    ),
    "qwen2_yarn_rope": ("Qwen2ForCausalLM", {"rope_scaling": YARN_ROPE, "max_position_embeddings": 128}),
    "qwen3": ("Qwen3ForCausalLM", {"num_kv_heads": 1}),
    "qwen3_biases_tied": (
        "Qwen3ForCausalLM",
        {"tie_word_embeddings": True, "extra_config": {"attention_bias": True}},
    ),
    "qwen3_window_by_layer_types": (
        "Qwen3ForCausalLM",
        {
            "sliding_window": 5,
            "num_layers": 3,
            "extra_config": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        },
    ),
    "qwen3_sharded": ("Qwen3ForCausalLM", {"num_shards": 3, "rope_parameters": {"rope_type": "default"}}),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def models(request, tmp_path_factory):
    architecture, options = request.param
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, architecture, seed=11, rope_theta=500.0, **options)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return load_model(str(path)), reference


def random_tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


def reference_logits(reference, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return reference(tokens[None]).logits[0]


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_logits_of_a_whole_prefill_equal_the_reference(models) -> None:
    model, reference = models
    tokens = random_tokens(45, seed=1)
    sequences = PagedSequences(page_size=16)

    kv_layers = sequences.make_kv_layers(model.config)

    hidden = sequences.run(model, tokens, sequences.step([("a", 45)]), kv_layers)

    logits = model.compute_logits(hidden, None)
    assert logits.dtype == torch.float32
    assert_same_logits(logits, reference_logits(reference, tokens))


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_chunks_and_decodes_of_a_mixed_batch_equal_each_sequence_alone(models, page_size: int) -> None:
    model, reference = models
    names, length = "abcd", 40
    tokens = {name: random_tokens(length, seed=ord(name)) for name in names}
    done = dict.fromkeys(names, 0)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    sequences = PagedSequences(page_size)
    kv_layers = sequences.make_kv_layers(model.config)
    steps = [
        [("a", 1), ("b", 17)],
        [("a", 1), ("b", 1), ("c", 13), ("d", 2)],
        [("c", 1), ("a", 22), ("d", 3), ("b", 5)],
        [("d", 30), ("c", 9)],
        *[[(name, 1) for name in names]] * 5,
        [("a", 11), ("b", 12), ("c", 12)],
    ]

    for chunks in steps:
        ids = torch.cat([tokens[name][done[name] : done[name] + num] for name, num in chunks])
        hidden = sequences.run(model, ids, sequences.step(chunks), kv_layers)
        for (name, num), part in zip(chunks, hidden.split([num for _, num in chunks]), strict=True):
            found[name].append(model.compute_logits(part, None))
            done[name] += num

    assert done == dict.fromkeys(names, length)
    for name in names:
        assert_same_logits(torch.cat(found[name]), reference_logits(reference, tokens[name]))


def test_random_models_have_well_separated_logits_that_depend_on_the_context(models) -> None:
    _, reference = models
    first, second = random_tokens(45, seed=2), random_tokens(45, seed=2)
    second[10] = (second[10] + 1) % 256

    logits, others = reference_logits(reference, first), reference_logits(reference, second)

    best = logits.topk(2, dim=-1).values
    assert (best[:, 0] - best[:, 1] > 1e-3).all()
    assert (logits[:10] - others[:10]).abs().max() < 1e-4
    assert (logits[10:14] - others[10:14]).abs().amax(-1).min() > 1e-2
    assert logits.argmax(-1).unique().numel() > 15
