"""Sampled tokens follow the reference's distribution, and a seed gives the same tokens again.

The first two tokens of many answers are compared: the first comes from a step that reads the prompt, the
second from a step of single tokens. In fp32 the distribution is that of transformers + peft. In 16 bits it
differs a little from batch to batch, and equal logits are common, so that no single distribution says what a
cut keeps: there every draw has its own, made of the log-probabilities that came with it. (How near those are
to the reference's is tested with the architectures.) The engine's seed is fixed, so
that a test cannot fail by chance now and then.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.llm import LLM
from lora_serve.testing.adapters import make_random_adapter
from support.engine_kinds import EngineKind
from support.expected_answers import ExpectedAnswers
from support.tiny_checkpoint import make_tiny_checkpoint

PROMPT = [84, 104, 101, 32, 99, 97, 116]
ADAPTERS = [None, "a"]
NUM_ANSWERS = 768
LEAST_EXPECTED = 5.0
"""Of a cell of the test; rarer tokens are counted together."""
# Parameters, and others that the test must be able to tell from them.
PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top_k": ({"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_k": 4}),
    "temperature": ({"temperature": 0.7}, {"temperature": 1.0}),
    "top_p": ({"temperature": 1.3, "top_p": 0.6}, {"temperature": 1.3, "top_p": 0.8}),
    "min_p": ({"temperature": 1.5, "min_p": 0.15}, {"temperature": 1.0, "min_p": 0.15}),
}
NUM_KEPT, NUM_LOGPROBS = 16, 20
"""Where log-probabilities make the distribution: most tokens that may be drawn, and those that are known.

More are known, because tokens as good as the last one that is kept are kept, too.
"""


@dataclass(frozen=True)
class Draw:
    """One token that was drawn.

    Attributes
    ----------
    context
        What came before it, the same for all draws that are counted together.
    token
        Which.
    logprobs
        The model's log-probabilities there: all tokens', or the best ones'.
    """

    context: tuple[int, ...]
    token: int
    logprobs: dict[int, float]


@dataclass(frozen=True)
class Setup:
    """A model with an adapter, and what both expect."""

    folder: Path
    engine: EngineKind
    expected: ExpectedAnswers


@pytest.fixture(scope="module")
def setup(fast_engine: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("sampling")
    model = make_tiny_checkpoint(folder / "model")
    adapters = {"a": make_random_adapter(folder / "a", model, rank=8, scale=0.8)}
    return Setup(folder, fast_engine, ExpectedAnswers(model, adapters, fast_engine))


def make_llm(setup: Setup, **options: Any) -> LLM:
    defaults = {
        "page_size": 4,
        "max_model_len": 64,
        "num_device_pages": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "seed": 12,
    }
    if setup.engine.has_graphs:
        defaults["cuda_graph_sizes"] = [1, 8, 64]
    llm = LLM(str(setup.folder / "model"), **setup.engine.options_with(**{**defaults, **options}))
    llm.load_lora_adapter("a", str(setup.folder / "a"))
    return llm


@pytest.fixture(scope="module")
def llm(setup: Setup) -> Iterator[LLM]:
    with make_llm(setup) as llm:
        yield llm


def cut(logprobs: dict[int, float], fields: dict[str, Any]) -> dict[int, float]:
    """What may be drawn and how probable it is, by the definitions of the parameters."""
    best = max(logprobs.values())
    weights = {token: math.exp((one - best) / fields["temperature"]) for token, one in logprobs.items()}
    weights = {token: one for token, one in weights.items() if one >= fields.get("min_p", 0.0)}
    if "top_k" in fields:
        last = sorted(weights.values(), reverse=True)[: fields["top_k"]][-1]
        weights = {token: one for token, one in weights.items() if one >= last}
    if "top_p" in fields:
        enough, reached = fields["top_p"] * sum(weights.values()), 0.0
        for last in sorted(weights.values(), reverse=True):
            reached += last
            if reached >= enough:
                break
        weights = {token: one for token, one in weights.items() if one >= last}
    total = sum(weights.values())
    return {token: one / total for token, one in weights.items()}


def chi_square(draws: list[Draw], fields: dict[str, Any]) -> float:
    """How many standard deviations the statistic is above what it is where `fields` are obeyed."""
    observed: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    expected: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    cuts: dict[int, dict[int, float]] = {}
    for draw in draws:
        key = id(draw.logprobs)  # The reference's are shared by many draws.
        if key not in cuts:
            cuts[key] = cut(draw.logprobs, fields)
        if draw.token not in cuts[key]:
            return math.inf
        observed[draw.context][draw.token] += 1
        sums = expected[draw.context]
        for token, prob in cuts[key].items():
            sums[token] = sums.get(token, 0.0) + prob
    statistic, freedom = 0.0, 0
    for context, sums in expected.items():
        cells = [(0.0, 0.0)]  # Observed and expected; the rare ones fill up one after the other.
        for token, count in sorted(sums.items(), key=lambda item: item[1]):
            if cells[-1][1] >= LEAST_EXPECTED:
                cells.append((0.0, 0.0))
            cells[-1] = (cells[-1][0] + observed[context][token], cells[-1][1] + count)
        if len(cells) > 1:
            statistic += sum((o - e) ** 2 / e for o, e in cells)
            freedom += len(cells) - 1
    assert freedom >= 4, "too few cells: the distribution is too sharp to test"
    # The cube root is normal to a good approximation.  Source: Wilson, Hilferty, PNAS 17 (1931).
    width = 2 / (9 * freedom)
    return (math.cbrt(statistic / freedom) - (1 - width)) / math.sqrt(width)


def draw_answers(
    setup: Setup, llm: LLM, fields: dict[str, Any], seeds: list[int | None]
) -> dict[str | None, list[Draw]]:
    """Two draws of each seed, from base and adapter, which are served side by side."""
    num_logprobs = None if setup.engine.is_exact else NUM_LOGPROBS
    params = [
        SamplingParams(max_tokens=2, ignore_eos=True, seed=seed, logprobs=num_logprobs, **fields)
        for seed in seeds
        for _ in ADAPTERS
    ]
    outputs = llm.generate([PROMPT] * len(params), params, lora_request=ADAPTERS * len(seeds))
    known: dict[tuple[str | None, tuple[int, ...]], dict[int, float]] = {}

    def logprobs_of_reference(name: str | None, context: tuple[int, ...]) -> dict[int, float]:
        if (name, context) not in known:
            row = setup.expected.logprobs(name, [*PROMPT, *context])[-1]
            known[name, context] = dict(enumerate(row.tolist()))
        return known[name, context]

    draws: dict[str | None, list[Draw]] = {name: [] for name in ADAPTERS}
    for output in outputs:
        [answer] = output.outputs
        for position, token in enumerate(answer.token_ids):
            context = tuple(answer.token_ids[:position])
            if answer.logprobs is None:
                logprobs = logprobs_of_reference(output.lora_name, context)
            else:
                logprobs = {other: entry.logprob for other, entry in answer.logprobs[position].items()}
                best = sorted(logprobs.values(), reverse=True)
                assert best[NUM_KEPT - 1] > best[NUM_LOGPROBS - 1], "more equals than are known"
            draws[output.lora_name].append(Draw(context, token, logprobs))
    return draws


@pytest.mark.parametrize("whose_seeds", ["engine", "request"])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_answers_follow_the_distribution(setup: Setup, llm: LLM, kind: str, whose_seeds: str) -> None:
    fields, similar = PARAMETERS[kind]
    if not setup.engine.is_exact:
        fields, similar = ({"top_k": NUM_KEPT, **one} for one in (fields, similar))
    # Clients choose seeds that follow one another.
    seeds = [None if whose_seeds == "engine" else n for n in range(NUM_ANSWERS)]
    for name, draws in draw_answers(setup, llm, fields, seeds).items():
        assert len(draws) == 2 * NUM_ANSWERS
        assert abs(chi_square(draws, fields)) < 4, name
        assert chi_square(draws, similar) > 4, name


def answers_of_seeds(llm: LLM, order: list[int]) -> list[list[int]]:
    """By request, whatever the order in which they come."""
    seeds = [0, 1, 2, 3, -5, 2**40]
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.1, top_p=0.95, seed=seeds[n])
        for n in order
    ]
    outputs = llm.generate([PROMPT] * len(order), params, lora_request=[ADAPTERS[n % 2] for n in order])
    found = {n: output.outputs[0].token_ids for n, output in zip(order, outputs, strict=True)}
    return [found[n] for n in sorted(order)]


def test_seeds_give_the_same_tokens_again(setup: Setup) -> None:
    """The same steps, in the same engine and in another: not one bit may differ, in 16 bits either."""
    in_order = list(range(6))
    found = []
    for seed in (1, 2):  # The engine's seed has no part in it.
        with make_llm(setup, seed=seed) as llm:
            found.append([answers_of_seeds(llm, in_order) for _ in range(3)])
    assert found[0] == found[1]
    assert found[0][1] == found[0][2]
    assert len({tuple(tokens) for tokens in found[0][0]}) == 6


def test_seeds_do_not_depend_on_the_batch(setup: Setup, llm: LLM) -> None:
    """Alone, in another order, without overlap. In 16 bits a batch of another size is rounded otherwise."""
    if not setup.engine.is_exact:
        pytest.skip("needs logits that do not depend on the batch's size")
    together = answers_of_seeds(llm, [0, 1, 2, 3, 4, 5])
    alone = [answers_of_seeds(llm, [n])[0] for n in range(6)]
    assert together == alone == answers_of_seeds(llm, [5, 2, 4, 0, 3, 1])
    with make_llm(setup, async_scheduling=False) as other:
        assert answers_of_seeds(other, [3, 1, 2, 5, 0, 4]) == together
