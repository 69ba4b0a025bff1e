"""Adapters are replaced and requests aborted while others run: everyone gets what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.messages import EngineRequest, LoadAdapterResult
from lora_serve.llm import LLM
from lora_serve.testing.adapters import make_random_adapter
from support.engine_kinds import EngineKind
from support.expected_answers import ExpectedAnswers
from support.tiny_checkpoint import NUM_BYTES, make_tiny_checkpoint

PAGE_SIZE = 4
NUM_STEPS = 2000
LONGEST_READ_S = 60.0
CONTENTS = ("old", "new", "other")
PROMPTS = [np.random.default_rng(seed).integers(0, NUM_BYTES, 9 + 5 * seed).tolist() for seed in range(6)]


@dataclass(frozen=True)
class Setup:
    """A model, adapters, the engine that serves them, and what they answer."""

    folder: Path
    engine: EngineKind
    expected: ExpectedAnswers


@pytest.fixture(scope="module")
def setup(fast_engine: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("in-flight")
    model = make_tiny_checkpoint(folder / "model")
    adapters = {
        name: make_random_adapter(folder / name, model, rank=3 + 5 * seed, seed=seed, scale=0.8)
        for seed, name in enumerate(CONTENTS)
    }
    return Setup(folder, fast_engine, ExpectedAnswers(model, adapters, fast_engine))


class Run:
    """Requests that run step by step, and what each has got."""

    def __init__(self, llm: LLM) -> None:
        self.core = llm._core
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str | None] = {}

    def add(self, prompt: list[int], name: str | None, num_tokens: int) -> int:
        number = len(self.tokens)
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        request = EngineRequest(
            request_id=number, prompt_token_ids=prompt, sampling_params=params, lora_name=name
        )
        self.tokens[number] = []
        self.core.add_request(request)
        return number

    def step_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(NUM_STEPS):
            if condition():
                return
            for output in self.core.step():
                self.tokens[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.ends[output.request_id] = output.finish_reason
            if self.core.is_stalled:
                self.core.wait_for_news(0.03)
        raise AssertionError("the condition did not come")

    def step_until_loaded(self, load: Future[LoadAdapterResult]) -> None:
        """Hold the requests while the adapter is being read: how far they get is not up to its reader."""

        def is_read() -> bool:
            if load.done() or len(self.core.adapters()) > num_generations:
                return True
            self.core.wait_for_news(LONGEST_READ_S)
            return False

        num_generations = len(self.core.adapters())
        self.step_until(is_read)
        self.step_until(load.done)

    def step_until_all_have(self, num_tokens: int) -> None:
        self.step_until(lambda: all(len(tokens) >= num_tokens for tokens in self.tokens.values()))

    def finish(self) -> None:
        self.step_until(lambda: len(self.ends) == len(self.tokens))
        self.core.settle()


@pytest.fixture(params=[True, False], ids=["overlap", "no overlap"])
def llm(setup: Setup, request: pytest.FixtureRequest) -> Iterator[LLM]:
    options = {
        "async_scheduling": request.param,
        "page_size": PAGE_SIZE,
        "max_model_len": 96,
        "num_device_pages": 256,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 48,
    }
    with LLM(str(setup.folder / "model"), **setup.engine.options_with(**options)) as llm:
        llm.load_lora_adapter("changing", str(setup.folder / "old"))
        llm.load_lora_adapter("other", str(setup.folder / "other"))
        before = llm.stats()
        yield llm
        stats = llm.stats()
        assert stats.num_private_pages == stats.num_running_requests == stats.num_waiting_requests == 0
        assert stats.num_free_pages + stats.num_tree_pages == before.num_free_pages + before.num_tree_pages


@pytest.mark.parametrize("name", [None, "other"])
def test_requests_keep_the_content_that_they_began_with(setup: Setup, llm: LLM, name: str | None) -> None:
    """The same prompts before and after: nothing of the old content's pages may be used again."""
    run = Run(llm)
    before = {run.add(prompt, "changing", 40): prompt for prompt in PROMPTS[:3]}
    beside = {run.add(prompt, name, 50): prompt for prompt in PROMPTS[:3]}
    run.step_until_all_have(5)
    replaced = run.core.load_adapter("changing", str(setup.folder / "new"), load_inplace=True)
    run.step_until_loaded(replaced)
    assert replaced.result().adapter_id not in (0, 1, 2)
    assert len(run.ends) == 0, "the requests were over before the adapter was replaced: make them longer"
    after = {run.add(prompt, "changing", 24): prompt for prompt in PROMPTS[:3]}
    run.finish()

    assert set(run.ends.values()) == {"length"}
    for content, group in (("old", before), ("new", after), (name, beside)):
        for number, prompt in group.items():
            setup.expected.check_tokens(content, prompt, run.tokens[number])
    firsts, seconds = ([run.tokens[number][:24] for number in group] for group in (before, after))
    assert all(first != second for first, second in zip(firsts, seconds, strict=True))


@pytest.mark.parametrize("num_between", [1, 2, 5])
def test_aborts_leave_the_others_as_they_are(setup: Setup, llm: LLM, num_between: int) -> None:
    names = [None, "changing", "other", "changing", None, "other"]
    contents = {"changing": "old", "other": "other", None: None}
    run = Run(llm)
    numbers = [run.add(prompt, name, 30) for prompt, name in zip(PROMPTS * 2, names * 2, strict=True)]
    doomed = numbers[1::2]
    for count, number in enumerate(doomed):
        run.step_until(lambda number=number, least=count * num_between: len(run.tokens[number]) >= least)
        assert run.core.abort(number)
    newcomer = run.add(PROMPTS[0], "other", 12)
    run.finish()

    for number in (*numbers, newcomer):
        assert run.ends[number] == ("abort" if number in doomed else "length")
        if run.tokens[number]:
            name = "other" if number == newcomer else names[number % 6]
            prompt = PROMPTS[0] if number == newcomer else PROMPTS[number % 6]
            setup.expected.check_tokens(contents[name], prompt, run.tokens[number])


def test_unloading_with_force_leaves_the_others_as_they_are(setup: Setup, llm: LLM) -> None:
    run = Run(llm)
    numbers = [run.add(prompt, name, 40) for prompt in PROMPTS[:3] for name in ("changing", "other", None)]
    run.step_until_all_have(4)
    unloaded = run.core.unload_adapter("changing", force=True)
    run.step_until(unloaded.done)
    loaded = run.core.load_adapter("changing", str(setup.folder / "new"))
    run.step_until(loaded.done)
    again = [run.add(prompt, "changing", 20) for prompt in PROMPTS[:3]]
    run.finish()

    for position, number in enumerate(numbers):
        content = ("old", "other", None)[position % 3]
        assert run.ends[number] == ("abort" if content == "old" else "length")
        setup.expected.check_tokens(content, PROMPTS[position // 3], run.tokens[number])
    for prompt, number in zip(PROMPTS[:3], again, strict=True):
        setup.expected.check_tokens("new", prompt, run.tokens[number])
