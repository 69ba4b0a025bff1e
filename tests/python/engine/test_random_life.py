from __future__ import annotations

import random

import pytest

from lora_serve.common.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    CapacityError,
    InternalError,
    InvalidArgumentError,
    QueueTimeoutError,
)
from lora_serve.testing.oracle_executor import Outcome

from .core_driver import CoreDriver

pytestmark = pytest.mark.usefixtures("async_scheduling")
NAMES = ("a", "b", "c", "d")
OUTCOMES_OF_OPERATIONS = (
    AdapterConflictError,
    AdapterNotFoundError,
    CapacityError,
    InternalError,
    InvalidArgumentError,
    type(None),
)


class RandomLife:
    """Random requests and adapter operations on pools that are too small for them."""

    def __init__(self, seed, **options):
        self.rng = random.Random(seed)
        self.driver = CoreDriver(
            num_device_pages=18, max_num_seqs=4, max_num_batched_tokens=24, max_loras=2, **options
        )
        self.driver.files.is_read = lambda adapter_id: self.rng.random() < 0.3
        self.num_failed_copies = 0
        self.num_refused = 0
        self.driver.executor.copy_outcome = self.end_copy
        self.driver.executor.load_fails = lambda adapter_id: self.rng.random() < 0.04
        self.requests = []
        self.ended_by_reader = set()
        self.operations = []

    def end_copy(self, transfer_id):
        """Most copies take a step or two, and some fail."""
        outcome = self.rng.choices(list(Outcome), [20, 20, 2])[0]
        self.num_failed_copies += outcome is Outcome.FAILED
        return outcome

    def act(self):
        rng, core = self.rng, self.driver.core
        kinds = {"step": 50, "add": 20, "abort": 4, "finish": 3, "load": 15, "unload": 6}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if kind == "step":
            held = self.driver.files.snapshot()
            if held and rng.random() < 0.2:
                self.driver.files.lose(rng.choice(held).adapter_id)
            self.driver.step(rng.randint(1, 4))
        elif kind == "add":
            self.add(rng.choice([None, *NAMES]))
        elif kind == "abort" and self.requests:
            core.abort(rng.choice(self.requests))
        elif kind == "finish" and self.requests:
            request = rng.choice(self.requests)
            if core.finish_request(request):
                self.ended_by_reader.add(request)
        elif kind == "load":
            self.load(rng.choice(NAMES), rng.choice(["/v1", "/v2", "/v3", "/bad"]))
        elif kind == "unload":
            self.operations.append(core.unload_adapter(rng.choice(NAMES), force=rng.random() < 0.3))

    def load(self, name, path):
        rng = self.rng
        options = {
            "load_inplace": rng.random() < 0.6,
            "pinned": rng.random() < 0.15,
            "weight": rng.choice([0.5, 1.0, 1.0, 3.0]),
        }
        self.operations.append(self.driver.core.load_adapter(name, path, **options))
        if rng.random() < 0.7:
            self.driver.wait_for_reads()

    def add(self, name):
        rng = self.rng
        prompt = list(range(start := rng.randint(0, 3), start + rng.randint(1, 30)))
        serving = {info.name for info in self.driver.core.adapters() if info.is_serving}
        fields = {"priority": rng.choice([0, 0, 0, -1, 2]), "max_tokens": rng.randint(1, 30)}
        if rng.random() < 0.15:
            fields["queue_timeout_s"] = rng.uniform(0.001, 0.05)
        try:
            self.requests.append(self.driver.add(name, prompt, **fields))
        except AdapterNotFoundError:
            assert name not in serving
        except CapacityError:
            self.num_refused += 1
        else:
            assert name is None or name in serving

    def check_request(self, request):
        """It has ended exactly once (the driver sees to that), as its end says; give its reason."""
        driver = self.driver
        if request in self.ended_by_reader:
            assert request not in driver.finish
            reason = "ended by its reader"
        elif driver.finish[request][0] == "length":
            driver.assert_complete(request)
            return "length"
        else:
            error = driver.errors.get(request)
            assert driver.finish[request][0] == "abort"
            if isinstance(error, QueueTimeoutError):
                assert driver.outputs[request] == []
            elif error is not None:
                assert "could not be brought to the device" in str(error)
            reason = type(error).__name__
        assert driver.outputs[request] == driver.expected(request)[: len(driver.outputs[request])]
        return reason


TWO_ADAPTERS = {"lora_memory_gb": 2 * 1024 / 2**30}
MACHINES = {
    "device only": {},
    "write_through": {"num_host_pages": 30},
    "write_back": {"num_host_pages": 30, "kv_write_policy": "write_back"},
    "off": {"num_host_pages": 9, "kv_write_policy": "off"},
    "two adapters": {**TWO_ADAPTERS},
    "two adapters, write_through": {**TWO_ADAPTERS, "num_host_pages": 30},
    "two adapters, short slices": {
        **TWO_ADAPTERS,
        "adapter_patience_ms": 3,
        "adapter_time_slice_steps": 2,
        "adapter_pause_ms": 5,
        "num_host_pages": 9,
        "kv_write_policy": "write_back",
    },
    "two adapters, fcfs": {
        **TWO_ADAPTERS,
        "scheduling_policy": "fcfs",
        "num_host_pages": 30,
    },
    "two adapters, lpm, limits": {
        **TWO_ADAPTERS,
        "scheduling_policy": "lpm",
        "max_queued_requests": 3,
        "max_queued_tokens": 60,
        "max_requests_per_adapter": 5,
    },
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_that_of_a_run_alone_and_nothing_is_left_behind(seed, machine):
    life = RandomLife(seed, **MACHINES[machine])
    driver = life.driver
    driver.files.contents["/bad"] = "bad"
    for _ in range(800):
        life.act()
        adapter_ids = [info.adapter_id for info in driver.core.adapters()]
        assert [held.adapter_id for held in driver.files.snapshot()] == adapter_ids
    driver.run()

    reasons = [life.check_request(request) for request in life.requests]
    for operation in life.operations:
        assert isinstance(operation.exception(timeout=0), OUTCOMES_OF_OPERATIONS)
    # The run was worth its name.
    assert reasons.count("length") > 20
    assert sum(operation.exception() is None for operation in life.operations) > 10

    for name in {info.name for info in driver.core.adapters() if info.is_serving}:
        driver.unload(name)
    driver.run()
    assert driver.core.adapters() == []
    assert driver.files.snapshot() == []
    driver.assert_pages_free()
    driver.executor.copy_outcome = lambda transfer_id: Outcome.DONE
    driver.step()  # Reports the copies that nobody waits for, and may begin the last ones.
    driver.run()
    stats = driver.core.stats()
    assert stats.num_transfers == 0
    assert (stats.num_resident_adapters, stats.num_adapters_being_read, stats.num_adapter_bytes) == (0, 0, 0)
    assert stats.total_rejected_requests == life.num_refused
    assert stats.total_expired_requests == reasons.count("QueueTimeoutError")
    base = driver.core._scheduler.stats().adapters[0]
    assert stats.num_free_host_pages + base.num_host_pages == stats.num_host_pages


def test_random_lives_meet_what_they_are_for():
    """What the seeds above must have met, or they prove little."""
    num_host_hits = num_failed_copies = num_generations = 0
    reasons = []
    totals = dict.fromkeys(
        (
            "total_preemptions",
            "total_adapter_evictions",
            "total_expired_requests",
            "total_rejected_requests",
            "total_adapter_pauses",
            "total_failed_adapter_loads",
        ),
        0,
    )
    for seed in range(3):
        for machine in ("write_through", "two adapters", "two adapters, lpm, limits"):
            life = RandomLife(seed, **MACHINES[machine])
            for _ in range(800):
                life.act()
            life.driver.run()
            stats = life.driver.core.stats()
            for name in totals:
                totals[name] += getattr(stats, name)
            num_generations += life.driver.core._registry._next_adapter_id - 1
            num_host_hits += stats.total_host_hit_tokens
            num_failed_copies += life.num_failed_copies
            reasons += [life.check_request(request) for request in life.requests]
    assert all(totals.values()), totals
    assert num_host_hits > 50
    assert num_failed_copies > 5
    assert num_generations > 60
    assert {"length", "NoneType", "QueueTimeoutError", "ended by its reader"} <= set(reasons)
