"""The demo's model answers as transformers + peft: alone, mixed, with prefix hits, after preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_serve.common.outputs import RequestOutput
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.demo.paths import demo_paths
from lora_serve.llm import LLM
from lora_serve.testing.adapters import make_random_adapter
from support.engine_kinds import EngineKind
from support.expected_answers import ExpectedAnswers

MODEL = str(demo_paths().model)
NUM_OUTPUT_TOKENS = 48
PAGE_SIZE = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, logprobs=0)
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GENERATED: dict[str, dict[str, object]] = {
    "rank-1": {"rank": 1, "target_modules": ["q_proj", "v_proj"], "alpha": 2},
    "rank-5": {"rank": 5, "target_modules": ["k_proj", "o_proj", "up_proj"], "alpha": 10},
    "rank-8-q-only": {"rank": 8, "target_modules": ["q_proj"], "alpha": 16},
    "rank-64-all": {"rank": 64, "target_modules": ALL_MODULES, "alpha": 64},
    "down-only": {"rank": 8, "target_modules": ["down_proj"], "alpha": 8},
    "odd-alpha": {"rank": 6, "target_modules": ALL_MODULES, "alpha": 7},
    "rslora": {"rank": 16, "target_modules": ["q_proj", "down_proj"], "alpha": 8, "use_rslora": True},
    "patterns": {
        "rank": 4,
        "target_modules": ALL_MODULES,
        "alpha": 8,
        "rank_pattern": {"q_proj": 12, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"q_proj": 5, "layers.2.self_attn.v_proj": 32},
    },
    "layers-1-and-3": {"rank": 8, "target_modules": ALL_MODULES, "alpha": 16, "layers": [1, 3]},
}
DEMO_ADAPTERS = sorted(demo_paths().adapters)
NAMES: list[str | None] = [None, *DEMO_ADAPTERS, *GENERATED]
TEXTS = {
    name: (
        f"Request {index}: the operator of the night shift wrote down every number that the machine printed, "
        f"{index * 7 + 3} of them, and asked for the password of project argon before the morning came."
    )
    for index, name in enumerate(NAMES)
}


@pytest.fixture(scope="module")
def adapter_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    paths = {name: Path(path) for name, path in demo_paths().adapters.items()}
    for seed, (name, options) in enumerate(GENERATED.items()):
        make_random_adapter(folder / name, MODEL, seed=seed, scale=0.15, **options)
        paths[name] = folder / name
    return paths


@pytest.fixture(scope="module")
def expected(adapter_paths: dict[str, Path], engine: EngineKind) -> ExpectedAnswers:
    return ExpectedAnswers(MODEL, adapter_paths, engine)


def make_llm(adapter_paths: dict[str, Path], engine: EngineKind, **options: object) -> LLM:
    defaults = {"page_size": PAGE_SIZE, "max_model_len": 256}
    llm = LLM(MODEL, **engine.options_with(**{**defaults, **options}))
    for name, path in adapter_paths.items():
        llm.load_lora_adapter(name, str(path))
    return llm


@pytest.fixture
def roomy_llm(adapter_paths: dict[str, Path], engine: EngineKind) -> Iterator[LLM]:
    options = {"num_device_pages": 512, "max_num_seqs": 32, "max_num_batched_tokens": 2048}
    with make_llm(adapter_paths, engine, **options) as llm:
        yield llm


def test_adapters_change_the_answer(adapter_paths: dict[str, Path], roomy_llm: LLM) -> None:
    """Without this, an engine that ignores every adapter could agree with a reference that does, too."""
    prompt = TEXTS[None]
    base = roomy_llm.generate([prompt], GREEDY)[0].outputs[0]
    for name in GENERATED:
        adapted = roomy_llm.generate([prompt], GREEDY, lora_request=name)[0].outputs[0]
        assert adapted.logprobs[0] != base.logprobs[0], name


def test_parity_alone(roomy_llm: LLM, expected: ExpectedAnswers) -> None:
    outputs: list[RequestOutput] = []
    for name in NAMES:
        outputs += roomy_llm.generate([TEXTS[name]], GREEDY, lora_request=name)
    expected.check(outputs, NAMES)


def test_parity_mixed_batch_with_chunked_prefill(
    adapter_paths: dict[str, Path], engine: EngineKind, expected: ExpectedAnswers
) -> None:
    names = [*NAMES, None, "argon", "rank-64-all"]
    prompts = [TEXTS[name] + (" Again." if index >= len(NAMES) else "") for index, name in enumerate(names)]
    assert len(names) >= 16
    options = {"num_device_pages": 512, "max_num_seqs": 24, "max_num_batched_tokens": 32}
    with make_llm(adapter_paths, engine, **options) as llm:
        outputs = llm.generate(prompts, GREEDY, lora_request=names)
    # With at most 32 tokens a step, every prompt below was computed in several chunks.
    assert all(len(output.prompt_token_ids) > 32 for output in outputs)
    expected.check(outputs, names)


def test_parity_with_prefix_hits(roomy_llm: LLM, expected: ExpectedAnswers) -> None:
    prompts = [TEXTS[name] for name in NAMES]
    first = roomy_llm.generate(prompts, GREEDY, lora_request=NAMES)
    second = roomy_llm.generate(prompts, GREEDY, lora_request=NAMES)
    for before, after in zip(first, second, strict=True):
        assert before.num_cached_tokens == 0
        whole_pages = (len(after.prompt_token_ids) - 1) // PAGE_SIZE * PAGE_SIZE
        assert after.num_cached_tokens == whole_pages > 0
    expected.check(second, NAMES)


def test_parity_after_preemption(
    adapter_paths: dict[str, Path], engine: EngineKind, expected: ExpectedAnswers
) -> None:
    options = {"num_device_pages": 20, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    with make_llm(adapter_paths, engine, **options) as llm:
        outputs = llm.generate([TEXTS[name] for name in NAMES], GREEDY, lora_request=NAMES)
        assert llm.stats().total_preemptions > 0
    expected.check(outputs, NAMES)
