from __future__ import annotations

import random

import pytest

from lora_serve.common.errors import AdapterConflictError, AdapterNotFoundError, InvalidArgumentError
from lora_serve.testing.oracle_executor import CopyOutcome

from .core_driver import CoreDriver

NAMES = ("a", "b", "c")


class RandomLife:
    """Random requests and adapter operations on pools that are too small for them."""

    def __init__(self, seed, **options):
        self.rng = random.Random(seed)
        self.driver = CoreDriver(
            num_device_pages=18, max_num_seqs=4, max_num_batched_tokens=24, max_loras=2, **options
        )
        self.num_failed_copies = 0
        self.driver.executor.copy_outcome = self.end_copy
        self.requests = []
        self.operations = []

    def end_copy(self, transfer_id):
        """Most copies take a step or two, and some fail."""
        outcome = self.rng.choices(list(CopyOutcome), [20, 20, 2])[0]
        self.num_failed_copies += outcome is CopyOutcome.FAILED
        return outcome

    def act(self):
        rng, core = self.rng, self.driver.core
        kind = rng.choices(["step", "add", "abort", "load", "unload"], [50, 20, 5, 15, 6])[0]
        if kind == "step":
            self.driver.step(rng.randint(1, 4))
        elif kind == "add":
            self.add(rng.choice([None, *NAMES]))
        elif kind == "abort" and self.requests:
            core.abort(rng.choice(self.requests))
        elif kind == "load":
            path = rng.choice(["/v1", "/v2", "/v3", "/bad"])
            inplace = rng.random() < 0.6
            self.operations.append(core.load_adapter(rng.choice(NAMES), path, load_inplace=inplace))
            if rng.random() < 0.7:
                self.driver.wait_for_reads()
        elif kind == "unload":
            self.operations.append(core.unload_adapter(rng.choice(NAMES), force=rng.random() < 0.3))

    def add(self, name):
        prompt = list(range(start := self.rng.randint(0, 3), start + self.rng.randint(1, 30)))
        serving = {info.name for info in self.driver.core.adapters() if info.is_serving}
        try:
            self.requests.append(self.driver.add(name, prompt, max_tokens=self.rng.randint(1, 30)))
        except AdapterNotFoundError:
            assert name not in serving
        else:
            assert name is None or name in serving


TIERS = [
    {},
    {"num_host_pages": 30},
    {"num_host_pages": 30, "kv_write_policy": "write_back"},
    {"num_host_pages": 9, "kv_write_policy": "off"},
]


@pytest.mark.parametrize("tiers", TIERS, ids=["device only", "write_through", "write_back", "off"])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_that_of_a_run_alone_and_nothing_is_left_behind(seed, tiers):
    life = RandomLife(seed, **tiers)
    driver = life.driver
    driver.files.contents["/bad"] = "bad"
    for _ in range(800):
        life.act()
        adapter_ids = [info.adapter_id for info in driver.core.adapters()]
        assert [held.adapter_id for held in driver.files.snapshot()] == adapter_ids
    driver.run()

    reasons = [driver.finish[request][0] for request in life.requests]
    for request, reason in zip(life.requests, reasons, strict=True):
        if reason == "length":
            driver.assert_complete(request)
        else:
            assert reason == "abort"
            assert driver.outputs[request] == driver.expected(request)[: len(driver.outputs[request])]
    assert driver.errors == {}
    for operation in life.operations:
        error = operation.exception(timeout=0)
        assert isinstance(
            error, (AdapterConflictError, AdapterNotFoundError, InvalidArgumentError, type(None))
        )
    # The run was worth its name.
    assert reasons.count("length") > 20
    assert sum(operation.exception() is None for operation in life.operations) > 10

    for name in {info.name for info in driver.core.adapters() if info.is_serving}:
        driver.unload(name)
    assert driver.core.adapters() == []
    assert driver.files.snapshot() == []
    driver.assert_pages_free()
    driver.executor.copy_outcome = lambda transfer_id: CopyOutcome.DONE
    driver.step()  # Reports the copies that nobody waits for.
    stats = driver.core.stats()
    assert stats.num_transfers == 0
    base = driver.core._scheduler.stats().adapters[0]
    assert stats.num_free_host_pages + base.num_host_pages == stats.num_host_pages


def test_random_lives_preempt_and_replace():
    """What the seeds above must have met, or they prove little."""
    num_preemptions = num_generations = num_host_hits = num_failed_copies = 0
    for seed in range(3):
        life = RandomLife(seed, num_host_pages=30)
        for _ in range(800):
            life.act()
        num_preemptions += life.driver.core.stats().total_preemptions
        num_generations += life.driver.core._registry._next_adapter_id - 1
        num_host_hits += life.driver.core.stats().total_host_hit_tokens
        num_failed_copies += life.num_failed_copies
        life.driver.run()
    assert num_preemptions > 5
    assert num_host_hits > 50
    assert num_failed_copies > 5
    assert num_generations > 20
