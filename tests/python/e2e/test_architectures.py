"""Every architecture with every kind of engine answers as transformers + peft, however its steps are run.

Random models of two layers, adapters of different ranks, modules and layers, on embed_tokens and lm_head as
well. Mixed batches, chunks, prefix hits, preemption, a host tier, with and without overlap; on CUDA eagerly
and from graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.executor.decode_graphs import DecodeGraphs
from lora_serve.executor.kv_tensors import page_num_bytes
from lora_serve.executor.prefill_graphs import PrefillGraphs
from lora_serve.llm import LLM
from lora_serve.models.config import read_model_config
from lora_serve.testing.adapters import ALL_PROJECTIONS, make_random_adapter
from support.engine_kinds import GRAPH_SIZES, GRAPHS, EngineKind
from support.expected_answers import ExpectedAnswers
from support.tiny_checkpoint import VOCAB_SIZE, make_tiny_checkpoint

PAGE_SIZE = 4
NUM_OUTPUT_TOKENS = 12
PLAIN = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
WITH_LOGPROBS = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, logprobs=0)
# Name to architecture, options, and a window for attention that takes any.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"extra_config": {"attention_bias": True, "mlp_bias": True}}, {}),
    "mistral": ("MistralForCausalLM", {}, {"sliding_window": 9}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"tie_word_embeddings": True},
        {"sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"num_kv_heads": 4}, {}),
}
LINEAR: dict[str, dict[str, Any]] = {
    "rank-1": {"rank": 1, "target_modules": ["q_proj", "down_proj"], "alpha": 2},
    "rank-5": {"rank": 5, "target_modules": ["k_proj", "o_proj", "up_proj"], "alpha": -7},
    "rank-16": {"rank": 16, "target_modules": ALL_PROJECTIONS, "use_rslora": True, "alpha": 4},
    "rank-64": {"rank": 64, "target_modules": ALL_PROJECTIONS, "layers": [1]},
}
ALL = {
    **LINEAR,
    "outside": {"rank": 6, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "head": {"rank": 3, "target_modules": ["lm_head"]},
}
LINEAR_NAMES: list[str | None] = [None, *LINEAR, "rank-5", "rank-16", None]
ALL_NAMES: list[str | None] = [None, *ALL, "outside"]


@dataclass(frozen=True)
class Setup:
    """One model with its adapters on disk, the engine that serves them, and what they answer."""

    model: Path
    adapters: dict[str, Path]
    engine: EngineKind
    expected: ExpectedAnswers


@pytest.fixture(scope="module", params=ARCHITECTURES)
def setup(
    request: pytest.FixtureRequest, any_engine: EngineKind, tmp_path_factory: pytest.TempPathFactory
) -> Setup:
    architecture, options, window = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model"
    if any_engine.has_windows:
        options = {**options, **window}
    make_tiny_checkpoint(model, architecture, **options)
    adapters = {
        # What bfloat16 holds, float16 and float32 hold, too: nothing is rounded when it is loaded.
        name: make_random_adapter(
            folder / name, model, seed=seed, scale=0.8, dtype=torch.bfloat16, **adapter_options
        )
        for seed, (name, adapter_options) in enumerate(ALL.items())
    }
    return Setup(model, adapters, any_engine, ExpectedAnswers(model, adapters, any_engine))


@pytest.fixture
def prefills_from_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the steps that were run from prefill graphs."""
    sizes: list[int] = []
    run = PrefillGraphs.run

    def counted(graphs: PrefillGraphs, step: Any, attention_plan: Any) -> Any:
        sizes.append(len(step.token_ids))
        return run(graphs, step, attention_plan)

    monkeypatch.setattr(PrefillGraphs, "run", counted)
    return sizes


@pytest.fixture
def replayed_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Padded sizes of the decode steps that were replayed from graphs."""
    replayed: list[int] = []
    replay = DecodeGraphs.replay

    def counted(graphs: DecodeGraphs, step: Any) -> torch.Tensor:
        replayed.append(len(step.page_table_rows))
        return replay(graphs, step)

    monkeypatch.setattr(DecodeGraphs, "replay", counted)
    return replayed


def options_of(kind: EngineKind, **options: Any) -> dict[str, Any]:
    defaults = {
        "page_size": PAGE_SIZE,
        "max_model_len": 80,
        "num_device_pages": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
    }
    return kind.options_with(**{**defaults, **options})


def make_llm(setup: Setup, *, num_host_pages: int = 0, **options: Any) -> LLM:
    page_gb = page_num_bytes(read_model_config(setup.model), PAGE_SIZE) / 2**30
    host_gb = num_host_pages * page_gb
    llm = LLM(str(setup.model), **options_of(setup.engine, kv_host_memory_gb=host_gb, **options))
    for name, path in setup.adapters.items():
        llm.load_lora_adapter(name, str(path))
    return llm


def prompts(seed: int, num: int) -> list[list[int]]:
    """Of 18 to 41 tokens; the first three pages are the same in all."""
    start = np.random.default_rng(seed).integers(0, VOCAB_SIZE, 12)
    rests = [np.random.default_rng((seed, n)).integers(0, VOCAB_SIZE, 6 + 7 * n % 24) for n in range(num)]
    return [np.concatenate([start, rest]).tolist() for rest in rests]


SCENARIOS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "whole prompts without overlap": {"async_scheduling": False},
    "chunks": {"max_num_batched_tokens": 16},
    "few pages": {"num_device_pages": 24},
    "few pages without overlap": {"num_device_pages": 24, "async_scheduling": False},
    "few pages and a host tier": {"num_device_pages": 24, "num_host_pages": 512},
    "few pages and a host tier that is written late": {
        "num_device_pages": 24,
        "num_host_pages": 512,
        "kv_write_policy": "write_back",
    },
}


@pytest.fixture(params=SCENARIOS)
def llm(setup: Setup, request: pytest.FixtureRequest) -> Iterator[LLM]:
    options = SCENARIOS[request.param]
    with make_llm(setup, **options) as llm:
        yield llm
        stats = llm.stats()
        assert stats.num_private_pages == stats.num_running_requests == stats.num_waiting_requests == 0
        assert (stats.total_preemptions > 0) == ("num_device_pages" in options)
        assert (stats.total_host_hit_tokens > 0) == ("num_host_pages" in options)
        assert stats.total_hit_tokens > 0


def test_answers_are_those_of_transformers_and_peft(
    setup: Setup, llm: LLM, replayed_sizes: list[int], prefills_from_graphs: list[int]
) -> None:
    """Base alone, base with adapters, with some on the embedding; then again, from the prefix cache."""
    batches = [[None] * 8, LINEAR_NAMES, ALL_NAMES]
    outputs, names = [], []
    for params in (PLAIN, WITH_LOGPROBS):
        for seed, batch in enumerate(batches):
            outputs += llm.generate(prompts(seed, len(batch)), params, lora_request=batch)
            names += batch
    setup.expected.check(outputs, names)
    assert set(replayed_sizes) <= set(GRAPH_SIZES)
    assert (len(replayed_sizes) > 10) == setup.engine.has_graphs
    assert (len(prefills_from_graphs) > 2) == setup.engine.has_graphs


def test_every_adapter_changes_the_answer(setup: Setup) -> None:
    """Without this, an engine that ignores an adapter could agree with a reference that does, too."""
    prompt = prompts(0, 1)[0]
    base = setup.expected.logprobs(None, prompt)
    for name in ALL:
        assert np.abs(setup.expected.logprobs(name, prompt) - base).max() > 0.2, name


@pytest.mark.parametrize("options", SCENARIOS.values(), ids=SCENARIOS)
@pytest.mark.parametrize("kind", [kind.values[0] for kind in GRAPHS], ids=lambda kind: kind.name)
def test_every_scenario_is_one_that_an_engine_with_graphs_takes(
    kind: EngineKind, options: dict[str, Any]
) -> None:
    """Where there is no GPU, none of them runs."""
    fields = options_of(kind, **{name: value for name, value in options.items() if name != "num_host_pages"})
    assert EngineConfig(model="m", **fields).chosen_prefill_graph_sizes
