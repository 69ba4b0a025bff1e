"""The same answers whether a step is planned while the one before runs, or after it; with a real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.messages import EngineRequest
from lora_serve.executor.kv_tensors import page_num_bytes
from lora_serve.llm import LLM
from lora_serve.models.config import read_model_config
from lora_serve.testing.adapters import make_random_adapter
from support.engine_kinds import EngineKind
from support.tiny_checkpoint import NUM_BYTES, make_tiny_checkpoint

PAGE_SIZE = 4
ADAPTERS = ("a", "b", "c")
NAMES = [None, "a", "b", "c", "a", None, "c", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("overlap")
    make_tiny_checkpoint(path / "model")
    for seed, name in enumerate(ADAPTERS):
        make_random_adapter(path / name, path / "model", rank=4, seed=seed, scale=0.5)
    return path


def make_llm(
    folder: Path, engine: EngineKind, *, overlap: bool, num_host_pages: int = 0, **options: Any
) -> LLM:
    page_gb = page_num_bytes(read_model_config(folder / "model"), PAGE_SIZE) / 2**30
    defaults = {"num_device_pages": 128, "max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 80}
    llm = LLM(
        str(folder / "model"),
        page_size=PAGE_SIZE,
        async_scheduling=overlap,
        kv_host_memory_gb=num_host_pages * page_gb,
        **engine.options_with(**{**defaults, **options}),
    )
    for name in ADAPTERS:
        llm.load_lora_adapter(name, str(folder / name))
    return llm


def prompt(number: int) -> list[int]:
    """Of 1 to 34 tokens; some begin alike."""
    return [(7 * (number % 3) + 3 * position) % NUM_BYTES for position in range(1 + 11 * number % 34)]


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy with penalties": {
        "temperature": 0,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.9,
        "presence_penalty": 0.5,
    },
    "seeded": {"temperature": 1.2, "top_p": 0.95, "top_k": 40, "seed": 5},
    "seeded with penalties": {"temperature": 0.9, "min_p": 0.02, "seed": -3, "repetition_penalty": 1.2},
    "without a seed": {"temperature": 1.0},
    "several answers": {"temperature": 1.0, "n": 3, "seed": 11},
    "late stop": {"temperature": 0, "min_tokens": 5, "ignore_eos": True},
    "log probabilities": {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
}
MACHINES: dict[str, dict[str, Any]] = {
    "room for all": {},
    "few pages": {"num_device_pages": 20},
    "few pages and a host tier": {"num_device_pages": 20, "num_host_pages": 200},
    "room for one adapter": {"lora_memory_gb": 60_000 / 2**30},
}


def answers(llm: LLM, fields: dict[str, Any]) -> list[Any]:
    """What every request got, twice over: the second time with prefix hits."""
    params = [
        SamplingParams(**{"max_tokens": 6 + 5 * (n % 7), "ignore_eos": True, **fields}) for n in range(8)
    ]
    outputs = [
        output
        for _ in range(2)
        for output in llm.generate([prompt(number) for number in range(8)], params, lora_request=NAMES)
    ]
    return [
        (answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason)
        for output in outputs
        for answer in output.outputs
    ]


@pytest.fixture(scope="module", params=MACHINES)
def both(folder: Path, exact_engine: EngineKind, request: pytest.FixtureRequest) -> Iterator[tuple[LLM, LLM]]:
    """The same machine with and without overlap; the machines are what they say."""
    options = MACHINES[request.param]
    llms = [make_llm(folder, exact_engine, overlap=overlap, **options) for overlap in (True, False)]
    yield llms[0], llms[1]
    for llm in llms:
        answers(llm, KINDS["greedy"])  # Some kinds reuse nothing, and one may have been the only one.
        stats = llm.stats()
        assert (stats.total_preemptions > 0) == ("num_device_pages" in options)
        assert (stats.total_adapter_evictions > 0) == ("lora_memory_gb" in options)
        assert (stats.total_host_hit_tokens > 0) == ("num_host_pages" in options)
        llm.close()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_with_and_without_overlap(both: tuple[LLM, LLM], kind: str) -> None:
    with_overlap, without = (answers(llm, KINDS[kind]) for llm in both)
    assert with_overlap == without
    assert len({tuple(tokens) for tokens, *_ in without}) > 4
    for llm in both:
        stats = llm.stats()
        assert stats.num_private_pages == stats.num_running_requests == stats.num_waiting_requests == 0


@pytest.mark.parametrize("how", ["stop token", "stop string"])
def test_ends_that_are_known_late_are_the_same_with_and_without_overlap(
    folder: Path, exact_engine: EngineKind, how: str
) -> None:
    got = {}
    with make_llm(folder, exact_engine, overlap=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        whole = [
            output.outputs[0]
            for output in llm.generate([prompt(n) for n in range(8)], params, lora_request=NAMES)
        ]
    stops = [
        {"stop_token_ids": [answer.token_ids[3 + n]]}
        if how == "stop token"
        else {"stop": answer.text[4 + n :][:2]}
        for n, answer in enumerate(whole)
    ]
    for overlap in (True, False):
        with make_llm(folder, exact_engine, overlap=overlap, num_device_pages=20) as llm:
            got[overlap] = [
                (output.outputs[0].token_ids, output.outputs[0].text, output.outputs[0].stop_reason)
                for output in llm.generate(
                    [prompt(n) for n in range(8)],
                    [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **stop) for stop in stops],
                    lora_request=NAMES,
                )
            ]
            assert llm.stats().num_private_pages == 0
    assert got[True] == got[False]
    assert all(reason is not None for *_, reason in got[True])


def test_log_probabilities_are_the_same_with_and_without_overlap(
    folder: Path, exact_engine: EngineKind
) -> None:
    got: dict[bool, list[list[float]]] = {}
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    for overlap in (True, False):
        with make_llm(folder, exact_engine, overlap=overlap, num_device_pages=20) as llm:
            outputs = llm.generate([prompt(n) for n in range(8)], params, lora_request=NAMES)
        got[overlap] = [
            [
                entry.logprob
                for position in [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
                if position is not None
                for entry in position.values()
            ]
            for output in outputs
        ]
    for with_overlap, without in zip(got[True], got[False], strict=True):
        assert len(without) >= 18
        assert with_overlap == pytest.approx(without, abs=1e-5)


@pytest.mark.parametrize("overlap", [True, False])
def test_aborts_at_any_moment_leave_the_others_as_they_are(
    folder: Path, exact_engine: EngineKind, overlap: bool
) -> None:
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=20, ignore_eos=True, repetition_penalty=1.1)
    kept = [0, 2, 5, 7]
    with make_llm(folder, exact_engine, overlap=overlap, num_device_pages=20) as llm:
        expected = [
            llm.generate(prompt(n), params, lora_request=NAMES[n])[0].outputs[0].token_ids for n in kept
        ]
        core = llm._core
        for number in range(8):
            core.add_request(
                EngineRequest(
                    request_id=1000 + number,
                    prompt_token_ids=prompt(number),
                    sampling_params=params,
                    lora_name=NAMES[number],
                )
            )
        tokens: dict[int, list[int]] = {1000 + number: [] for number in range(8)}
        doomed = [1000 + number for number in range(8) if number not in kept]
        for step in range(500):
            if step % 4 == 3 and doomed:
                core.abort(doomed.pop())
            for output in core.step():
                tokens[output.request_id] += output.new_token_ids
            if not core.has_work:
                break
        assert [tokens[1000 + number] for number in kept] == expected
        assert core.stats().num_private_pages == 0
