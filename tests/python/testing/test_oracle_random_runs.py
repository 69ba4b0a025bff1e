"""The real scheduler against the oracle: random arrivals, aborts, stops, priorities and deadlines; adapters
opened, brought in and taken off, failing and drained; copies between the tiers that take their time or fail.
With and without a plan that is made while another runs.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from executor.scheduler_run import SchedulerRun
from executor.states import make_state
from lora_serve.common.errors import CapacityError
from lora_serve.testing.oracle_adapters import make_oracle_adapter
from lora_serve.testing.oracle_executor import OracleExecutor, OracleOptions, Outcome
from lora_serve.testing.oracle_tokens import oracle_tokens

VOCAB = 1000
PAGE_SIZE = 4
MAX_MODEL_LEN = 48


@dataclass(frozen=True)
class Machine:
    """What a run is made on. Slowness, losses and failures are probabilities, per step."""

    num_pages: int
    chunk: int
    max_loras: int
    num_host_pages: int = 0
    write_policy: str = "write_through"
    slowness: float = 0.0
    failures: float = 0.0
    adapter_memory_bytes: int = 0
    """Adapters have 1 to 3 bytes; 0 = no limit."""
    load_failures: float = 0.0
    losses: float = 0.0
    """An adapter leaves the host."""
    read_slowness: float = 0.0
    adapter_time_slice_steps: int = 0
    scheduling_policy: str = "fair"
    max_queued_requests: int = 0
    max_queued_tokens: int = 0
    max_requests_per_adapter: int = 0
    deadlines: float = 0.0
    """Part of the requests that have one."""


@dataclass
class RandomRun:
    """One seeded run; `check` compares every request with the same request alone."""

    seed: int
    machine: Machine
    overlap: bool
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    live_adapters: list[int] = field(default_factory=list)
    drained: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    may_be_lost: list[int] = field(default_factory=list)
    """Live adapters; a plan was made since they were opened, as in the engine before the next poll."""
    seen: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        machine = self.machine
        oracle = OracleExecutor(
            OracleOptions(
                num_device_pages=machine.num_pages,
                page_size=PAGE_SIZE,
                max_num_seqs=8,
                max_model_len=MAX_MODEL_LEN,
                vocab_size=VOCAB,
                num_host_pages=machine.num_host_pages,
                adapter_memory_bytes=machine.adapter_memory_bytes,
            )
        )
        oracle.copy_outcome = lambda _: self.end_copy()
        oracle.load_fails = lambda _: self.rng.random() < machine.load_failures
        oracle.lora.is_read = lambda _: self.end_read()
        self.run = SchedulerRun(
            oracle,
            max_in_flight=2 if self.overlap else 1,
            write_policy=machine.write_policy,
            page_size=PAGE_SIZE,
            max_num_seqs=8,
            max_num_batched_tokens=machine.chunk,
            max_loras=machine.max_loras,
            adapter_memory_bytes=machine.adapter_memory_bytes,
            adapter_time_slice_steps=machine.adapter_time_slice_steps,
            scheduling_policy=machine.scheduling_policy,
            priority_ageing_us=20_000,
            max_queued_requests=machine.max_queued_requests,
            max_queued_tokens=machine.max_queued_tokens,
            max_requests_per_adapter=machine.max_requests_per_adapter,
        )
        self.run.before_failed = self.abort_requests_of
        self.shared = [[self.rng.randrange(VOCAB) for _ in range(40)] for _ in range(3)]
        self.next_adapter = 1

    def end_copy(self) -> Outcome:
        if self.rng.random() < self.machine.slowness:
            return Outcome.UNDER_WAY
        return Outcome.FAILED if self.rng.random() < self.machine.failures else Outcome.DONE

    def end_read(self) -> bool:
        is_read = self.rng.random() >= self.machine.read_slowness
        self.seen["read again"] += is_read
        return is_read

    # --- Operations ---------------------------------------------------------------------------------------

    def open_adapter(self) -> None:
        adapter_id, num_bytes = self.next_adapter, self.rng.randint(1, 3)
        self.next_adapter += 1
        self.run.executor.lora.add(adapter_id, make_oracle_adapter("", "", num_bytes=num_bytes))
        try:
            self.run.scheduler.open_adapter(
                adapter_id,
                digest_seed=adapter_id,
                size_bytes=num_bytes,
                weight=self.rng.choice([0.5, 1.0, 4.0]),
                is_pinned=self.rng.random() < 0.1,
                is_staged=True,
            )
        except CapacityError:
            self.seen["refused adapter"] += 1
            self.run.executor.lora.remove(adapter_id)
        else:
            self.live_adapters.append(adapter_id)

    def pin(self, adapter_id: int) -> None:
        try:
            self.run.scheduler.set_adapter_pinned(adapter_id, self.rng.random() < 0.3)
            self.run.scheduler.set_adapter_weight(adapter_id, self.rng.choice([0.5, 1.0, 4.0]))
        except CapacityError:
            self.seen["refused pin"] += 1

    def drain_adapter(self, adapter_id: int) -> None:
        self.live_adapters.remove(adapter_id)
        self.run.scheduler.drain_adapter(adapter_id)
        self.drained.add(adapter_id)

    def add_request(self) -> None:
        rng, request_id = self.rng, len(self.run.states) + 1
        head = rng.choice(self.shared)[: rng.randint(0, 40)]
        prompt = (head + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))])[: MAX_MODEL_LEN - 16]
        adapter_id, max_tokens = rng.choice([0, *self.live_adapters]), rng.randint(1, 16)
        state = make_state(prompt, vocab_size=VOCAB, prompt_logprobs=0 if rng.random() < 0.1 else None)
        fields = {"priority": rng.choice([0, 0, 0, -1, 2]), "arrival_us": self.run.now_us}
        if rng.random() < self.machine.deadlines:
            fields["deadline_us"] = self.run.now_us + rng.randint(0, 40_000)
        try:
            self.run.add(request_id, state, max_tokens, adapter_id, **fields)
        except CapacityError:
            self.seen["refused request"] += 1
            return
        self.asked[request_id] = (adapter_id, max_tokens)
        if rng.random() < 0.2:
            self.run.stop_after[request_id] = rng.randint(1, max_tokens)

    def abort(self, request_id: int) -> None:
        if self.run.abort(request_id):
            self.aborted.add(request_id)

    def abort_requests_of(self, adapter_ids: list[int]) -> None:
        """Before the scheduler hears that these loads have failed."""
        for request_id, (owner, _) in self.asked.items():
            if owner in adapter_ids:
                self.abort(request_id)

    def step(self) -> None:
        if self.may_be_lost and self.rng.random() < self.machine.losses:
            self.run.executor.lora.lose(self.rng.choice(self.may_be_lost))
        result = self.run.step()
        self.num_steps += 1
        for adapter_id in result.failed_adapter_ids if result else ():
            self.failed.add(adapter_id)
            if adapter_id in self.live_adapters:
                self.drain_adapter(adapter_id)
        stats = self.run.scheduler.stats()
        accounted = stats.num_free_pages + stats.num_tree_pages + stats.num_private_pages
        assert accounted == stats.num_device_pages
        self.may_be_lost = list(self.live_adapters)
        used_host_pages = sum(adapter.num_host_pages for adapter in stats.adapters)
        assert stats.num_free_host_pages + used_host_pages == self.machine.num_host_pages

    def operate(self) -> None:
        """One random operation; arrivals stop while much is queued, so that the run stays about as full."""
        choice = self.rng.random()
        if choice < 0.3 and self.run.scheduler.counters().num_queued_requests < 20:
            self.add_request()
        elif choice < 0.33 and self.asked:
            self.abort(self.rng.choice(list(self.asked)[-30:]))
        elif choice < 0.36 and len(self.live_adapters) < 6:
            self.open_adapter()
        elif choice < 0.38 and self.live_adapters:
            self.drain_adapter(self.rng.choice(self.live_adapters))
        elif choice < 0.39 and self.live_adapters:
            self.pin(self.rng.choice(self.live_adapters))
        else:
            self.step()

    # --- The end ------------------------------------------------------------------------------------------

    def check(self) -> None:
        for adapter_id in list(self.live_adapters):
            self.drain_adapter(adapter_id)
        last_step = self.num_steps + 5000
        while self.run.scheduler.has_work:
            assert self.num_steps < last_step, "work is left that nothing moves on"
            self.step()
        while self.run.scheduler.stats().num_transfers:
            self.run.report()
        assert not self.run.in_flight
        assert self.run.ended == set(self.asked), "every request has ended"
        expired = set(self.run.expired)
        assert len(expired) == len(self.run.expired)
        assert not expired & self.aborted
        for request_id in self.asked:
            self.check_request(request_id, is_expired=request_id in expired)
        assert set(self.run.drained) == self.drained
        assert len(self.run.drained) == len(self.drained)
        self.check_counts(len(expired))

    def check_request(self, request_id: int, *, is_expired: bool) -> None:
        adapter_id, max_tokens = self.asked[request_id]
        state, output = self.run.states[request_id], self.run.outputs[request_id]
        num_tokens = self.run.stop_after.get(request_id, max_tokens)
        if request_id in self.aborted:
            num_tokens = len(output)
        elif is_expired:
            num_tokens = 0
        prompt = state.prompt_token_ids.tolist()
        assert output == oracle_tokens(adapter_id, prompt, num_tokens, VOCAB), request_id
        assert len(state.output_token_ids) - len(output) in ((0, 1) if self.overlap else (0,)), request_id
        if output:
            assert state.missing_prompt_logprobs() == [], request_id

    def check_counts(self, num_expired: int) -> None:
        stats = self.run.scheduler.stats()
        assert [adapter.adapter_id for adapter in stats.adapters] == [0]
        assert stats.num_private_pages == 0
        assert stats.num_tree_pages == stats.adapters[0].num_tree_pages
        now = (stats.num_queued_requests, stats.num_queued_tokens, stats.num_running_requests)
        assert now == (0, 0, 0)
        assert (stats.num_resident_adapters, stats.num_loading_adapters, stats.num_adapter_bytes) == (0, 0, 0)
        assert stats.total_expired_requests == num_expired
        assert stats.total_aborted_requests == len(self.aborted)
        assert stats.total_finished_requests == len(self.asked) - num_expired - len(self.aborted)
        assert stats.total_rejected_requests == self.seen["refused request"]
        assert stats.total_failed_adapter_loads == len(self.failed)


def _run_steps(run: RandomRun, num_steps: int) -> RandomRun:
    try:
        while run.num_steps < num_steps:
            run.operate()
        run.check()
    except BaseException as error:
        raise AssertionError(f"{run.seed=} {run.machine=} {run.overlap=}, step {run.num_steps}") from error
    stats = run.run.scheduler.stats()
    assert stats.total_hit_tokens > 0
    assert run.machine.num_pages >= 40 or stats.total_preemptions > 0
    return run


overlap_or_not = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])


@overlap_or_not
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
def test_random_requests_get_the_tokens_that_they_get_alone(num_pages, chunk, max_loras, overlap):
    machine = Machine(num_pages, chunk, max_loras, load_failures=0.3)
    run = _run_steps(RandomRun(num_pages, machine, overlap), num_steps=1000)
    assert run.failed


@overlap_or_not
@pytest.mark.parametrize(
    "tiers",
    [
        {"num_host_pages": 40},
        {"num_host_pages": 100, "write_policy": "off"},
        {"num_host_pages": 100, "write_policy": "write_back", "slowness": 0.5},
        {"num_host_pages": 100, "slowness": 0.8, "failures": 0.3},
        {"num_host_pages": 15, "slowness": 0.3, "failures": 0.1},
    ],
    ids=str,
)
def test_random_requests_get_the_tokens_that_they_get_alone_with_a_host_tier(tiers, overlap):
    run = _run_steps(RandomRun(7, Machine(14, 24, 2, **tiers), overlap), num_steps=1000)
    assert run.run.scheduler.stats().total_host_hit_tokens > 0 or run.machine.write_policy == "off"


EVERYTHING = Machine(
    18,
    24,
    3,
    num_host_pages=30,
    slowness=0.3,
    failures=0.05,
    adapter_memory_bytes=5,
    load_failures=0.2,
    max_queued_requests=15,
    max_queued_tokens=200,
    max_requests_per_adapter=9,
    deadlines=0.3,
)


@overlap_or_not
@pytest.mark.parametrize("losses", [0.0, 0.3], ids=["all on the host", "losses"])
@pytest.mark.parametrize("adapter_time_slice_steps", [0, 3])
@pytest.mark.parametrize("policy", ["fair", "fcfs", "lpm"])
def test_random_requests_with_everything_that_can_happen_to_them(
    policy, adapter_time_slice_steps, losses, overlap
):
    machine = replace(
        EVERYTHING,
        scheduling_policy=policy,
        adapter_time_slice_steps=adapter_time_slice_steps,
        losses=losses,
        read_slowness=0.5,
    )
    met: Counter[str] = Counter()
    for seed in range(3):
        run = _run_steps(RandomRun(seed, machine, overlap), num_steps=500)
        stats = run.run.scheduler.stats()
        met.update({name: getattr(stats, name) for name in dir(stats) if name.startswith("total_")})
        met.update(run.seen)
    # The runs were worth their name.
    assert met["total_finished_requests"] > 200
    for name in (
        "total_adapter_evictions",
        "total_failed_adapter_loads",
        "total_expired_requests",
        "total_aborted_requests",
        "total_host_hit_tokens",
        "refused request",
    ):
        assert met[name] > 3, (name, met)
    assert (met["read again"] > 3) == (losses > 0)
