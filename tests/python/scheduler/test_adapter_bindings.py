"""Residency, overlap, limits and counts through the binding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_serve.common.errors import AdapterNotFoundError, CapacityError, InvalidArgumentError
from lora_serve.scheduler import (
    ExecutionEvent,
    ExecutionPlan,
    NewRequest,
    Scheduler,
    SchedulerCounters,
    SchedulerOptions,
)


def make_scheduler(**options: Any) -> Scheduler:
    defaults = {"num_device_pages": 32, "page_size": 4, "max_model_len": 32, "max_num_batched_tokens": 128}
    return Scheduler(SchedulerOptions(**{**defaults, **options}))


def make_request(request_id: int, adapter_id: int = 0, **fields: Any) -> NewRequest:
    defaults: dict[str, Any] = {"prompt_token_ids": [5, 6, 7, 8, 9, 10], "max_tokens": 3}
    return NewRequest(request_id=request_id, adapter_id=adapter_id, **{**defaults, **fields})


def event_of(plan: ExecutionPlan, **fields: Any) -> ExecutionEvent:
    defaults: dict[str, Any] = {
        "plan_id": plan.plan_id,
        "sampled_token_ids": np.where(plan.samples_token == 1, 7, -1),
        "is_finished": np.zeros(len(plan.request_ids), dtype=np.uint8),
        "loaded_adapter_ids": plan.load_adapter_ids,
    }
    return ExecutionEvent(**{**defaults, **fields})


def run(scheduler: Scheduler, now_us: int = 0) -> list[ExecutionPlan]:
    plans = []
    while scheduler.has_work:
        plan = scheduler.next_plan(now_us)
        assert not plan.is_empty
        plans.append(plan)
        scheduler.advance(event_of(plan))
        now_us += 1000
    return plans


def test_adapters_beyond_the_memory_are_loaded_on_demand_and_evicted() -> None:
    scheduler = make_scheduler(adapter_memory_bytes=10)
    assert scheduler.open_adapter(1, digest_seed=1, size_bytes=6)
    assert not scheduler.open_adapter(2, digest_seed=2, size_bytes=5)
    [first] = run(scheduler)
    assert first.load_adapter_ids.tolist() == [1]
    scheduler.add_request(make_request(1, adapter_id=2))
    plans = run(scheduler, 10_000)
    assert plans[0].evicted_adapter_ids.tolist() == [1]
    assert plans[0].load_adapter_ids.tolist() == [2]
    stats = {adapter.adapter_id: adapter for adapter in scheduler.stats().adapters}
    assert [(stats[i].num_loads, stats[i].num_evictions, stats[i].size_bytes) for i in (1, 2)] == [
        (1, 1, 6),
        (1, 0, 5),
    ]
    assert (stats[2].num_started_requests, stats[2].num_scheduled_tokens) == (1, 8)
    assert stats[2].total_queue_us > 0
    assert not any(
        adapter.is_pinned or adapter.is_closed or adapter.load_failed for adapter in stats.values()
    )


def test_pins_and_weights_are_checked() -> None:
    scheduler = make_scheduler(adapter_memory_bytes=10)
    scheduler.open_adapter(1, digest_seed=1, size_bytes=6, weight=1000.0, is_pinned=True)
    with pytest.raises(CapacityError):
        scheduler.open_adapter(2, digest_seed=2, size_bytes=5)
    with pytest.raises(InvalidArgumentError, match="weight"):
        scheduler.open_adapter(2, digest_seed=2, size_bytes=1, weight=0.0)
    scheduler.set_adapter_pinned(1, False)
    scheduler.open_adapter(2, digest_seed=2, size_bytes=5)
    with pytest.raises(CapacityError):
        scheduler.set_adapter_pinned(1, True)
    assert not scheduler.stats().adapters[1].is_pinned
    scheduler.set_adapter_weight(2, 0.5)
    with pytest.raises(InvalidArgumentError, match="weight"):
        scheduler.set_adapter_weight(2, 1001.0)
    for call in (lambda: scheduler.set_adapter_pinned(9, True), lambda: scheduler.set_adapter_weight(9, 1.0)):
        with pytest.raises(AdapterNotFoundError):
            call()


def test_plan_made_before_the_token_is_known_says_so() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request(1, max_tokens=2))
    first = scheduler.next_plan(0)
    second = scheduler.next_plan(1)
    assert second.token_ids.tolist() == [-1]
    assert second.num_computed_tokens.tolist() == [6]
    with pytest.raises(InvalidArgumentError, match="plan"):
        scheduler.advance(event_of(second))
    scheduler.advance(event_of(first))
    assert scheduler.next_plan(2).is_empty, "max_tokens ends the request with the second plan"
    scheduler.advance(event_of(second))
    assert not scheduler.has_work
    assert scheduler.counters().total_finished_requests == 1


def test_loads_are_reported_with_a_later_plan_or_without_one() -> None:
    scheduler = make_scheduler()
    scheduler.open_adapter(1, digest_seed=1, size_bytes=6)
    scheduler.open_adapter(2, digest_seed=1, size_bytes=6)
    scheduler.add_request(make_request(1))
    scheduler.add_request(make_request(2, adapter_id=1))
    plan = scheduler.next_plan(0)
    assert plan.load_adapter_ids.tolist() == [1, 2]
    scheduler.advance(event_of(plan, loaded_adapter_ids=[]))
    assert scheduler.counters().num_loading_adapters == 2
    plan = scheduler.next_plan(1)
    assert plan.request_ids.tolist() == [1]
    scheduler.advance(event_of(plan, loaded_adapter_ids=[2]))
    scheduler.advance(ExecutionEvent(plan_id=-1, loaded_adapter_ids=[1]))
    assert scheduler.next_plan(2).request_ids.tolist() == [1, 2]
    with pytest.raises(InvalidArgumentError, match="load of adapter 1"):
        scheduler.advance(ExecutionEvent(plan_id=-1, loaded_adapter_ids=[1]))


def test_deadline_and_priority_reach_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.next_plan(1000)
    scheduler.add_request(make_request(1, priority=1, arrival_us=1000))
    scheduler.add_request(make_request(2, priority=-1, arrival_us=1000))
    scheduler.add_request(make_request(3, priority=5, arrival_us=1000, deadline_us=2000))
    plan = scheduler.next_plan(1500)
    assert plan.request_ids.tolist() == [2]
    assert plan.expired_request_ids.tolist() == []
    scheduler.advance(event_of(plan))
    plan = scheduler.next_plan(2001)
    assert plan.expired_request_ids.tolist() == [3]
    scheduler.advance(event_of(plan))
    assert not scheduler.abort(3)
    counters = scheduler.counters()
    assert (counters.total_expired_requests, counters.total_started_requests) == (1, 1)
    assert counters.total_queue_us == 500


@pytest.mark.parametrize(
    ("limit", "most"),
    [("max_queued_requests", 2), ("max_queued_tokens", 12), ("max_requests_per_adapter", 2)],
)
def test_limits_refuse_with_a_capacity_error(limit: str, most: int) -> None:
    scheduler = make_scheduler(**{limit: most})
    scheduler.add_request(make_request(1))
    scheduler.add_request(make_request(2))
    with pytest.raises(CapacityError, match=f"{limit} is {most}"):
        scheduler.add_request(make_request(3))
    counters = scheduler.counters()
    assert (counters.num_queued_requests, counters.num_queued_tokens) == (2, 12)
    assert counters.total_rejected_requests == 1


def test_counters_are_those_of_the_stats() -> None:
    scheduler = make_scheduler()
    scheduler.open_adapter(1, digest_seed=1, size_bytes=6)
    for request_id in range(4):
        scheduler.add_request(make_request(request_id, adapter_id=request_id % 2))
    plans = run(scheduler)
    counters, stats = scheduler.counters(), scheduler.stats()
    names = [name for name in dir(SchedulerCounters) if name.startswith(("num_", "total_"))]
    assert len(names) > 20
    assert isinstance(stats, SchedulerCounters)
    assert {name: getattr(counters, name) for name in names} == {name: getattr(stats, name) for name in names}
    assert counters.total_plans == len(plans)
    assert counters.total_prefill_rows + counters.total_decode_rows == sum(len(p.request_ids) for p in plans)
    assert counters.total_step_adapters == sum(len(set(p.adapter_slots.tolist()) - {-1}) for p in plans)
    assert (counters.total_finished_requests, counters.num_resident_adapters) == (4, 1)
    assert counters.num_adapter_bytes == 6


def test_new_options_are_read_back_and_policies_are_names() -> None:
    options = SchedulerOptions(
        num_device_pages=16,
        adapter_memory_bytes=2**40,
        max_loading_adapters=3,
        adapter_patience_us=4,
        adapter_time_slice_steps=5,
        adapter_pause_us=6,
        scheduling_policy="lpm",
        priority_ageing_us=7,
        max_queued_requests=8,
        max_queued_tokens=9,
        max_requests_per_adapter=10,
        padded_batch_sizes=[1, 2, 4],
    )
    assert (options.adapter_memory_bytes, options.max_loading_adapters) == (2**40, 3)
    assert (options.adapter_patience_us, options.adapter_time_slice_steps, options.adapter_pause_us) == (
        4,
        5,
        6,
    )
    assert (options.scheduling_policy, options.priority_ageing_us) == ("lpm", 7)
    assert (options.max_queued_requests, options.max_queued_tokens) == (8, 9)
    assert (options.max_requests_per_adapter, options.padded_batch_sizes) == (10, [1, 2, 4])
    for policy in ("fair", "fcfs", "lpm"):
        assert SchedulerOptions(num_device_pages=16, scheduling_policy=policy).scheduling_policy == policy
    with pytest.raises(InvalidArgumentError, match="scheduling_policy is 'lifo'; expected one of 'fair', "):
        SchedulerOptions(num_device_pages=16, scheduling_policy="lifo")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("adapter_memory_bytes", -1),
        ("max_loading_adapters", 0),
        ("adapter_patience_us", -1),
        ("adapter_time_slice_steps", -1),
        ("adapter_pause_us", -1),
        ("priority_ageing_us", 0),
        ("max_queued_requests", -1),
        ("max_queued_tokens", -1),
        ("max_requests_per_adapter", -1),
        ("padded_batch_sizes", [2, 2]),
    ],
)
def test_options_out_of_range_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=option):
        make_scheduler(**{option: value})


def test_adapters_to_stage_and_those_that_wait_come_in_the_order_of_their_turns() -> None:
    scheduler = make_scheduler(adapter_memory_bytes=10)
    for adapter_id in (1, 2, 3, 4, 5):
        scheduler.open_adapter(adapter_id, digest_seed=adapter_id, size_bytes=5)
    run(scheduler)
    assert scheduler.adapters_to_stage() == []
    for adapter_id in (4, 3, 5, 1):
        scheduler.add_request(make_request(adapter_id, adapter_id=adapter_id))
    assert scheduler.adapters_to_stage() == [4, 3], "the device holds two; 1 is there"
    assert scheduler.waiting_adapters([1, 2, 3, 4, 5, 99]) == [4, 3, 5, 1]
    assert scheduler.waiting_adapters(()) == []
    scheduler.set_adapter_staged(3, is_staged=True)
    assert scheduler.adapters_to_stage() == [4]
    assert scheduler.waiting_adapters([4, 3]) == [3, 4]
    run(scheduler)
    assert scheduler.adapters_to_stage() == scheduler.waiting_adapters([1, 2, 3, 4, 5]) == []
