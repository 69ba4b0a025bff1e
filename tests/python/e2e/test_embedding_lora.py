"""Adapters on embed_tokens and lm_head, saved by peft, answer as transformers + peft do.

Alone, mixed with others and the base model in one batch, in chunks, with prefix hits, after preemption; for a
model whose embedding and lm_head share one matrix and for one with two.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_serve.common.outputs import RequestOutput
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.llm import LLM
from lora_serve.testing.models import make_random_model
from support.engine_kinds import EngineKind
from support.reference import Reference, assert_parity

VOCAB_SIZE = 256
NUM_OUTPUT_TOKENS = 12
PAGE_SIZE = 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, logprobs=0)
WITH_PROMPT = SamplingParams(
    temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0
)
# Rank, lora_alpha, target modules.
ADAPTERS: dict[str, tuple[int, float, list[str]]] = {
    "embedding": (3, 5.0, ["embed_tokens"]),
    "head": (5, -4.0, ["lm_head"]),
    "both": (1, 1.5, ["embed_tokens", "lm_head"]),
    "everywhere": (6, 7.0, ["embed_tokens", "lm_head", "q_proj", "v_proj", "down_proj"]),
    "linear": (7, 5.0, ["k_proj", "up_proj"]),
}
NAMES: list[str | None] = [None, *ADAPTERS]
PROMPTS = {
    name: np.random.default_rng(seed).integers(0, VOCAB_SIZE, 21 + seed).tolist()
    for seed, name in enumerate(NAMES)
}


@dataclass(frozen=True)
class Setup:
    """One model, its adapters on disk, and what transformers + peft make of each."""

    model: str
    adapters: dict[str, Path]
    references: dict[str | None, Reference]
    engine: EngineKind


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def setup(request, exact_engine: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("embedding_lora")
    model = str(folder / "model")
    make_random_model(model, "Qwen3ForCausalLM", vocab_size=VOCAB_SIZE, tie_word_embeddings=request.param)
    with warnings.catch_warnings():
        # peft warns of what merging tied modules would do; nothing is merged.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        adapters = {
            name: save_adapter(model, folder / name, *options, seed)
            for seed, (name, options) in enumerate(ADAPTERS.items())
        }
        references = {
            name: Reference(model, adapters.get(name) if name else None, device=exact_engine.device)
            for name in NAMES
        }
    return Setup(model, adapters, references, exact_engine)


def save_adapter(model: str, path: Path, lora_rank: int, alpha: float, modules: list[str], seed: int) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(r=lora_rank, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                size = 0.1 if "lora_embedding_" in name else 1.2 * parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    adapted.save_pretrained(path, save_embedding_layers=False)
    return path


def make_llm(setup: Setup, **options: object) -> LLM:
    defaults = {"page_size": PAGE_SIZE, "max_model_len": 64}
    llm = LLM(setup.model, **setup.engine.options_with(**{**defaults, **options}))
    for name, path in setup.adapters.items():
        llm.load_lora_adapter(name, str(path))
    return llm


@pytest.fixture
def roomy_llm(setup: Setup) -> Iterator[LLM]:
    with make_llm(setup, num_device_pages=256, max_num_seqs=16, max_num_batched_tokens=512) as llm:
        yield llm


def check(outputs: list[RequestOutput], names: list[str | None], setup: Setup) -> None:
    for output, name in zip(outputs, names, strict=True):
        completion = output.outputs[0]
        assert len(completion.token_ids) == NUM_OUTPUT_TOKENS
        steps = zip(completion.token_ids, completion.logprobs, strict=True)
        logprobs = [step[token].logprob for token, step in steps]
        prompt, answer = list(output.prompt_token_ids), list(completion.token_ids)
        assert_parity(setup.references[name], prompt, answer, logprobs, f"adapter {name or 'base'}")


def test_every_adapter_changes_the_answer(setup: Setup) -> None:
    """Without this, an engine that ignores an adapter could agree with a reference that does, too."""
    prompt = PROMPTS[None]
    base = setup.references[None].score(prompt, prompt).logprobs
    for name in ADAPTERS:
        assert np.abs(setup.references[name].score(prompt, prompt).logprobs - base).max() > 0.05, name


def test_parity_alone(setup: Setup, roomy_llm: LLM) -> None:
    for name in NAMES:
        check(roomy_llm.generate([PROMPTS[name]], GREEDY, lora_request=name), [name], setup)


@pytest.mark.parametrize("max_num_batched_tokens", [16, 256], ids=["chunks", "whole prompts"])
def test_parity_mixed_batch(setup: Setup, max_num_batched_tokens: int) -> None:
    """Chunks: steps in which only some rows sample, so that rows of logits are not the step's rows."""
    names = [*NAMES, "head", None, "both", "everywhere"]
    with make_llm(
        setup, num_device_pages=256, max_num_seqs=16, max_num_batched_tokens=max_num_batched_tokens
    ) as llm:
        outputs = llm.generate([PROMPTS[name] for name in names], GREEDY, lora_request=names)
    check(outputs, names, setup)


def test_parity_with_prefix_hits(setup: Setup, roomy_llm: LLM) -> None:
    prompts = [PROMPTS[None]] * len(NAMES)
    first = roomy_llm.generate(prompts, GREEDY, lora_request=NAMES)
    second = roomy_llm.generate(prompts, GREEDY, lora_request=NAMES)
    assert [output.num_cached_tokens for output in first] == [0] * len(NAMES)
    assert [output.num_cached_tokens for output in second] == [20] * len(NAMES)
    check(second, NAMES, setup)


def test_parity_after_preemption(setup: Setup) -> None:
    with make_llm(setup, num_device_pages=20, max_num_seqs=8, max_num_batched_tokens=32) as llm:
        outputs = llm.generate([PROMPTS[name] for name in NAMES], GREEDY, lora_request=NAMES)
        assert llm.stats().total_preemptions > 0
    check(outputs, NAMES, setup)


def test_prompt_logprobs_are_those_of_the_adapters_lm_head(setup: Setup) -> None:
    with make_llm(setup, num_device_pages=256, max_num_seqs=16, max_num_batched_tokens=16) as llm:
        outputs = llm.generate([PROMPTS[name] for name in NAMES], WITH_PROMPT, lora_request=NAMES)
    for output, name in zip(outputs, NAMES, strict=True):
        prompt = list(output.prompt_token_ids)
        expected = setup.references[name].score(prompt[:1], prompt[1:]).logprobs
        entries = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        found = np.array([entry[token].logprob for token, entry in entries])
        assert np.abs(found - expected).max() < 1e-4, name
    check(outputs, NAMES, setup)
