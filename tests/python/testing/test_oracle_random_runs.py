"""The real scheduler against the oracle: random arrivals, aborts, adapters opened, failing and drained, and
copies between the tiers that take their time or fail.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from executor.scheduler_run import SchedulerRun
from executor.states import make_state
from lora_serve.executor.executor import ExecutionResult
from lora_serve.scheduler import ExecutionEvent
from lora_serve.testing.oracle_executor import CopyOutcome, OracleExecutor, OracleOptions, oracle_tokens

VOCAB = 1000
PAGE_SIZE = 4
MAX_MODEL_LEN = 48


@dataclass(frozen=True)
class Tiers:
    """The host tier of a run. Slowness and failures are probabilities, per copy and step."""

    num_host_pages: int = 0
    write_policy: str = "write_through"
    slowness: float = 0.0
    failures: float = 0.0


class TieredRun(SchedulerRun):
    """Also steps when the plan is empty because everything waits for copies."""

    def step(self) -> ExecutionResult | None:
        result = super().step()
        if result is None:
            self.report_copies()
        return result

    def report_copies(self) -> None:
        """Report the copies that end now, without a plan."""
        result = self.executor.report_copies()
        if result.completed_transfer_ids or result.failed_transfer_ids:
            event = ExecutionEvent(
                plan_id=-1,
                completed_transfer_ids=result.completed_transfer_ids,
                failed_transfer_ids=list(result.failed_transfer_ids),
            )
            self.scheduler.advance(event)
            self.scheduler.check_invariants()


@dataclass
class RandomRun:
    """One seeded run; `check` compares every request with the same request alone."""

    seed: int
    num_pages: int
    chunk: int
    max_loras: int
    tiers: Tiers = Tiers()
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    live_adapters: list[int] = field(default_factory=list)
    drained: set[int] = field(default_factory=set)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.failing = {adapter_id for adapter_id in range(1, 10_000) if adapter_id % 5 == 4}
        options = OracleOptions(
            num_device_pages=self.num_pages,
            page_size=PAGE_SIZE,
            max_num_seqs=8,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB,
            failing_adapter_ids=self.failing,
            num_host_pages=self.tiers.num_host_pages,
        )
        oracle = OracleExecutor(options)
        oracle.copy_outcome = self.copy_outcome
        self.run = TieredRun(
            oracle,
            write_policy=self.tiers.write_policy,
            page_size=PAGE_SIZE,
            max_num_seqs=8,
            max_num_batched_tokens=self.chunk,
            max_loras=self.max_loras,
        )
        self.shared = [[self.rng.randrange(VOCAB) for _ in range(40)] for _ in range(3)]
        self.next_adapter = 1

    def copy_outcome(self, transfer_id: int) -> CopyOutcome:
        if self.rng.random() < self.tiers.slowness:
            return CopyOutcome.UNDER_WAY
        return CopyOutcome.FAILED if self.rng.random() < self.tiers.failures else CopyOutcome.DONE

    def open_adapter(self) -> None:
        self.run.scheduler.open_adapter(
            adapter_id=self.next_adapter, digest_seed=self.next_adapter, size_bytes=1
        )
        self.live_adapters.append(self.next_adapter)
        self.next_adapter += 1

    def drain_adapter(self, adapter_id: int) -> None:
        self.live_adapters.remove(adapter_id)
        self.run.scheduler.drain_adapter(adapter_id)
        self.drained.add(adapter_id)

    def add_request(self) -> None:
        rng, request_id = self.rng, len(self.asked) + 1
        head = rng.choice(self.shared)[: rng.randint(0, 40)]
        prompt = (head + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))])[: MAX_MODEL_LEN - 16]
        adapter_id, max_tokens = rng.choice([0, *self.live_adapters]), rng.randint(1, 16)
        state = make_state(prompt, vocab_size=VOCAB, prompt_logprobs=0 if rng.random() < 0.1 else None)
        self.run.add(request_id, state, max_tokens, adapter_id)
        self.asked[request_id] = (adapter_id, max_tokens)

    def abort(self, request_id: int) -> None:
        if self.run.scheduler.abort(request_id):
            self.aborted.add(request_id)

    def step(self) -> None:
        result = self.run.step()
        self.num_steps += result is not None
        for adapter_id in result.failed_adapter_ids if result else ():
            if adapter_id in self.live_adapters:
                self.drain_adapter(adapter_id)
            for request_id, (owner, _) in self.asked.items():
                if owner == adapter_id:
                    self.abort(request_id)
        stats = self.run.scheduler.stats()
        accounted = stats.num_free_pages + stats.num_tree_pages + stats.num_private_pages
        assert accounted == stats.num_device_pages
        used_host_pages = sum(adapter.num_host_pages for adapter in stats.adapters)
        assert stats.num_free_host_pages + used_host_pages == self.tiers.num_host_pages

    def operate(self) -> None:
        """One random operation; arrivals stop while much is queued, so that the run stays about as full."""
        choice = self.rng.random()
        if choice < 0.3 and self.run.scheduler.stats().num_waiting_requests < 20:
            self.add_request()
        elif choice < 0.33 and self.asked:
            self.abort(self.rng.randint(max(1, len(self.asked) - 30), len(self.asked)))
        elif choice < 0.36 and len(self.live_adapters) < 6:
            self.open_adapter()
        elif choice < 0.38 and self.live_adapters:
            self.drain_adapter(self.rng.choice(self.live_adapters))
        else:
            self.step()

    def check(self) -> None:
        for adapter_id in list(self.live_adapters):
            self.drain_adapter(adapter_id)
        while self.run.scheduler.has_work:
            self.step()
        while self.run.scheduler.stats().num_transfers:
            self.run.report_copies()
        for request_id, (adapter_id, max_tokens) in self.asked.items():
            state = self.run.states[request_id]
            prompt = state.prompt_token_ids.tolist()
            num_tokens = len(state.output_token_ids) if request_id in self.aborted else max_tokens
            assert state.output_token_ids == oracle_tokens(adapter_id, prompt, num_tokens, VOCAB), request_id
            if state.output_token_ids:
                assert state.missing_prompt_logprobs() == [], request_id
        assert set(self.run.drained) == self.drained
        stats = self.run.scheduler.stats()
        assert [adapter.adapter_id for adapter in stats.adapters] == [0]
        assert stats.num_private_pages == 0
        assert stats.num_tree_pages == stats.adapters[0].num_tree_pages


def _run_steps(run: RandomRun, num_steps: int) -> None:
    try:
        while run.num_steps < num_steps:
            run.operate()
        run.check()
    except BaseException as error:
        raise AssertionError(
            f"{run.seed=} {run.num_pages=} {run.chunk=} {run.max_loras=} {run.tiers=}"
        ) from error
    stats = run.run.scheduler.stats()
    assert stats.total_hit_tokens > 0
    assert run.num_pages >= 40 or stats.total_preemptions > 0
    assert run.failing & run.drained


@pytest.mark.parametrize(
    ("num_pages", "chunk", "max_loras"),
    [
        (12, 8, 1),
        (13, 9, 2),
        (14, 80, 3),
        (16, 15, 4),
        (20, 64, 3),
        (27, 21, 1),
        (40, 12, 2),
        (200, 33, 2),
    ],
)
def test_random_requests_get_the_tokens_that_they_get_alone(num_pages, chunk, max_loras):
    _run_steps(RandomRun(num_pages, num_pages, chunk, max_loras), num_steps=2500)


@pytest.mark.parametrize(
    "tiers",
    [
        Tiers(40),
        Tiers(100, "off"),
        Tiers(100, "write_back", slowness=0.5),
        Tiers(100, slowness=0.8, failures=0.3),
        Tiers(15, slowness=0.3, failures=0.1),
    ],
    ids=lambda tiers: f"{tiers.num_host_pages} pages, {tiers.write_policy}, slow {tiers.slowness}",
)
def test_random_requests_get_the_tokens_that_they_get_alone_with_a_host_tier(tiers):
    run = RandomRun(7, 14, 24, 2, tiers)
    _run_steps(run, num_steps=2000)

    assert run.run.scheduler.stats().total_host_hit_tokens > 0 or tiers.write_policy == "off"
