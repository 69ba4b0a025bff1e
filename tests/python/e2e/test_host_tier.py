"""The host tier holds what the device cannot: conversations go on, preempted requests recover."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.executor.kv_tensors import page_num_bytes
from lora_serve.llm import LLM
from lora_serve.models.config import read_model_config
from lora_serve.testing.adapters import make_random_adapter
from support.engine_kinds import EngineKind
from support.tiny_checkpoint import NUM_BYTES, make_tiny_checkpoint

PAGE_SIZE = 8
NUM_CLIENTS = 8
NUM_TURNS = 6
MAX_MODEL_LEN = 256
ADAPTERS = ("a", "b")
NAMES = [None, "a", "b", None, "a", "b", "a", None]
"""The adapter of each client."""
ENOUGH_PAGES = 512
"""On either tier: more than everything that a test computes."""


@dataclass(frozen=True)
class Turn:
    """One client's turn."""

    prompt: list[int]
    completion: list[int]
    num_cached_tokens: int

    @property
    def num_reusable_tokens(self) -> int:
        """Whole pages of what has KV: the last token was sampled and never read."""
        return (len(self.prompt) + len(self.completion) - 1) // PAGE_SIZE * PAGE_SIZE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("host-tier")
    make_tiny_checkpoint(path / "model")
    for seed, name in enumerate(ADAPTERS):
        make_random_adapter(path / name, path / "model", rank=4, seed=seed, scale=0.5)
    return path


def make_llm(
    folder: Path, engine: EngineKind, num_device_pages: int, num_host_pages: int = 0, **options: object
) -> LLM:
    page_gb = page_num_bytes(read_model_config(folder / "model"), PAGE_SIZE) / 2**30
    defaults = {"max_num_seqs": NUM_CLIENTS, "max_num_batched_tokens": 64, "max_model_len": MAX_MODEL_LEN}
    llm = LLM(
        str(folder / "model"),
        page_size=PAGE_SIZE,
        num_device_pages=num_device_pages,
        kv_host_memory_gb=num_host_pages * page_gb,
        **engine.options_with(**{**defaults, **options}),
    )
    for name in ADAPTERS:
        llm.load_lora_adapter(name, str(folder / name))
    return llm


def user_tokens(client: int, turn: int) -> list[int]:
    """What a client says: of different lengths, with a first page that no other client has."""
    length = 9 + (5 * client + 3 * turn) % 11
    return [(31 * client + 7 * turn + 3 * position) % NUM_BYTES for position in range(length)]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def converse(llm: LLM) -> list[list[Turn]]:
    """[turn][client]: all clients speak in every turn; each prompt is the client's whole conversation."""
    history: list[list[int]] = [[] for _ in range(NUM_CLIENTS)]
    turns = []
    for turn in range(NUM_TURNS):
        prompts = [history[client] + user_tokens(client, turn) for client in range(NUM_CLIENTS)]
        params = [greedy(5 + (client + turn) % 6) for client in range(NUM_CLIENTS)]
        outputs = llm.generate(prompts, params, lora_request=NAMES)
        turns.append(
            [
                Turn(p, o.outputs[0].token_ids, o.num_cached_tokens)
                for p, o in zip(prompts, outputs, strict=True)
            ]
        )
        history = [one.prompt + one.completion for one in turns[-1]]
    return turns


@pytest.fixture(scope="module")
def expected(folder: Path, exact_engine: EngineKind) -> list[list[Turn]]:
    """The conversations with a device pool that holds everything."""
    with make_llm(folder, exact_engine, ENOUGH_PAGES) as llm:
        turns = converse(llm)
        assert llm.stats().total_evicted_pages == 0
    return turns


@pytest.fixture(scope="module")
def quarter_of_pages(expected: list[list[Turn]]) -> int:
    """A quarter of the pages that the conversations fill in the end."""
    last = expected[-1]
    working_set = sum(-(-(len(turn.prompt) + len(turn.completion)) // PAGE_SIZE) for turn in last)
    longest = max(-(-(len(turn.prompt) + len(turn.completion)) // PAGE_SIZE) for turn in last)
    assert longest <= working_set // 4
    return working_set // 4


def completions(turns: list[list[Turn]]) -> list[list[list[int]]]:
    return [[one.completion for one in turn] for turn in turns]


def lost_tokens(turns: list[list[Turn]]) -> int:
    """Tokens of earlier turns that had KV, in whole pages, and did not come from the cache."""
    return sum(
        max(0, before.num_reusable_tokens - after.num_cached_tokens)
        for turn, following in itertools.pairwise(turns)
        for before, after in zip(turn, following, strict=True)
    )


def small_llm(
    folder: Path, engine: EngineKind, num_device_pages: int, num_host_pages: int, **options: object
) -> LLM:
    max_model_len = num_device_pages * PAGE_SIZE
    return make_llm(folder, engine, num_device_pages, num_host_pages, max_model_len=max_model_len, **options)


def test_conversations_go_on_from_the_host_where_the_device_holds_a_quarter(
    folder: Path, exact_engine: EngineKind, expected: list[list[Turn]], quarter_of_pages: int
) -> None:
    with small_llm(folder, exact_engine, quarter_of_pages, ENOUGH_PAGES) as llm:
        turns = converse(llm)
        stats = llm.stats()

    assert completions(turns) == completions(expected)
    for before, after in itertools.pairwise(turns):
        for client in range(NUM_CLIENTS):
            assert after[client].num_cached_tokens >= before[client].num_reusable_tokens, client
    assert stats.total_host_hit_tokens > 0
    assert stats.total_evicted_pages > 0
    assert (stats.total_evicted_host_pages, stats.num_transfers) == (0, 0)


def test_write_back_keeps_what_it_copied_ahead_of_need(
    folder: Path, exact_engine: EngineKind, expected: list[list[Turn]], quarter_of_pages: int
) -> None:
    """Pages that one step takes beyond the watermark are lost; so this promises less than write-through."""
    with small_llm(folder, exact_engine, quarter_of_pages, 0) as llm:
        without = converse(llm)
    with small_llm(folder, exact_engine, quarter_of_pages, ENOUGH_PAGES, kv_write_policy="write_back") as llm:
        turns = converse(llm)
        stats = llm.stats()

    assert completions(turns) == completions(without) == completions(expected)
    assert stats.total_host_hit_tokens > 0
    assert lost_tokens(turns) < lost_tokens(without) // 2


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("write_policy", ["write_through", "write_back", "off"])
@pytest.mark.parametrize("name", [None, "a"])
def test_preempted_request_recovers_from_the_host(
    folder: Path, exact_engine: EngineKind, name: str | None, write_policy: str, enable_prefix_caching: bool
) -> None:
    prompts = [user_tokens(client, 0) * 2 for client in range(4)]
    params = greedy(60)
    options = {"kv_write_policy": write_policy, "enable_prefix_caching": enable_prefix_caching}
    with make_llm(folder, exact_engine, ENOUGH_PAGES) as llm:
        roomy = [output.outputs[0].token_ids for output in llm.generate(prompts, params, lora_request=name)]
        assert llm.stats().total_recomputed_tokens == 0
    with small_llm(folder, exact_engine, 16, ENOUGH_PAGES, **options) as llm:
        outputs = llm.generate(prompts, params, lora_request=name)
        stats = llm.stats()

    assert [output.outputs[0].token_ids for output in outputs] == roomy
    assert stats.total_preemptions > 0
    assert stats.total_recomputed_tokens <= stats.total_preemptions * PAGE_SIZE
    assert stats.total_hit_tokens == 0  # A recovery is no hit, and the prompts share nothing.


def test_preempted_request_recomputes_more_than_pages_without_a_host_tier(
    folder: Path, exact_engine: EngineKind
) -> None:
    """Without this, the test above could pass because nothing was ever lost."""
    prompts = [user_tokens(client, 0) * 2 for client in range(4)]
    with small_llm(folder, exact_engine, 16, 0) as llm:
        llm.generate(prompts, greedy(60))
        stats = llm.stats()
    assert stats.total_recomputed_tokens > stats.total_preemptions * PAGE_SIZE
