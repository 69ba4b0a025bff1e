"""The border between Python and the C++ core: arrays, conversions, errors. Policy is tested in tests/cpp."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest

from lora_serve.common.errors import (
    AdapterNotFoundError,
    InternalError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
)
from lora_serve.scheduler import (
    AdapterState,
    ExecutionEvent,
    ExecutionPlan,
    NewRequest,
    Scheduler,
    SchedulerOptions,
)

ARRAY_DTYPES = {
    "request_ids": np.int64,
    "page_table_rows": np.int32,
    "num_scheduled_tokens": np.int32,
    "num_computed_tokens": np.int32,
    "num_cached_tokens": np.int32,
    "adapter_slots": np.int32,
    "samples_token": np.uint8,
    "token_ids": np.int32,
    "delta_rows": np.int32,
    "delta_starts": np.int32,
    "delta_offsets": np.int32,
    "delta_pages": np.int32,
    "load_adapter_ids": np.int64,
    "load_adapter_slots": np.int32,
    "drained_adapter_ids": np.int64,
    "transfer_ids": np.int64,
    "transfer_kinds": np.int8,
    "transfer_offsets": np.int32,
    "transfer_source_pages": np.int32,
    "transfer_destination_pages": np.int32,
}
OFFSETS = ("delta_offsets", "transfer_offsets")


@pytest.fixture
def scheduler() -> Scheduler:
    options = SchedulerOptions(num_device_pages=16, page_size=4, max_model_len=32, max_num_batched_tokens=128)
    return Scheduler(options)


@pytest.fixture
def tiered_scheduler() -> Scheduler:
    options = SchedulerOptions(
        num_device_pages=16, page_size=4, max_model_len=32, max_num_batched_tokens=128, num_host_pages=8
    )
    return Scheduler(options)


def make_request(request_id: int, adapter_id: int = 0, **fields: Any) -> NewRequest:
    return NewRequest(
        **{
            "request_id": request_id,
            "adapter_id": adapter_id,
            "prompt_token_ids": [5, 6, 7, 8, 9, 10],
            "max_tokens": 3,
            **fields,
        }
    )


def event_of(plan: ExecutionPlan, token: int = 7, **fields: Any) -> ExecutionEvent:
    return ExecutionEvent(
        **{
            "plan_id": plan.plan_id,
            "sampled_token_ids": np.where(plan.samples_token == 1, token, -1),
            "is_finished": np.zeros(len(plan.request_ids), dtype=np.uint8),
            "loaded_adapter_ids": plan.load_adapter_ids,
            **fields,
        }
    )


def test_a_request_runs_to_its_end_with_its_adapter(scheduler: Scheduler) -> None:
    scheduler.open_adapter(adapter_id=4, digest_seed=2**64 - 1, size_bytes=2**40)
    scheduler.add_request(make_request(11, adapter_id=4))
    scheduler.add_request(make_request(12, adapter_id=0))
    plan = scheduler.next_plan(0)
    assert plan.load_adapter_ids.tolist() == [4]
    assert plan.load_adapter_slots.tolist() == [0]
    assert plan.request_ids.tolist() == [12], "the adapter's request waits for its load"
    scheduler.advance(event_of(plan))
    plan = scheduler.next_plan(1)
    assert plan.request_ids.tolist() == [12, 11]
    assert plan.adapter_slots.tolist() == [-1, 0]
    assert plan.token_ids.tolist() == [7, 5, 6, 7, 8, 9, 10]
    assert plan.num_computed_tokens.tolist() == [6, 0]
    assert plan.samples_token.tolist() == [1, 1]
    scheduler.advance(event_of(plan, is_finished=np.array([False, True])))
    scheduler.drain_adapter(4)
    plan = scheduler.next_plan(2)
    assert plan.request_ids.tolist() == [12]
    assert plan.drained_adapter_ids.tolist() == [4]
    scheduler.advance(event_of(plan))
    scheduler.check_invariants()
    assert not scheduler.has_work
    assert [adapter.adapter_id for adapter in scheduler.stats().adapters] == [0]


@pytest.mark.parametrize("name", ARRAY_DTYPES)
def test_plan_arrays_are_read_only_views_of_one_dtype(tiered_scheduler: Scheduler, name: str) -> None:
    scheduler = tiered_scheduler
    scheduler.add_request(make_request(1))
    scheduler.advance(event_of(scheduler.next_plan(0)))
    scheduler.open_adapter(adapter_id=4, digest_seed=0, size_bytes=0)
    scheduler.open_adapter(adapter_id=5, digest_seed=0, size_bytes=0)
    scheduler.drain_adapter(5)
    scheduler.add_request(make_request(2))
    plan = scheduler.next_plan(0)
    array = getattr(plan, name)
    assert array.dtype == ARRAY_DTYPES[name]
    assert array.ndim == 1
    assert array.size > 0
    assert array.base is plan, "the view keeps the plan alive"
    assert not array.flags.writeable
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    again = getattr(plan, name)
    assert again.__array_interface__["data"] == array.__array_interface__["data"], "a copy was made"


def test_plan_arrays_survive_later_plans(scheduler: Scheduler) -> None:
    scheduler.add_request(make_request(1))
    plan = scheduler.next_plan(0)
    token_ids, delta_pages = plan.token_ids, plan.delta_pages
    expected_pages = delta_pages.tolist()
    scheduler.advance(event_of(plan))
    del plan
    for step in range(1, 3):
        later = scheduler.next_plan(step)
        scheduler.advance(event_of(later))
    del later
    gc.collect()
    assert token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert delta_pages.tolist() == expected_pages


def test_empty_plan_has_empty_arrays_and_takes_no_advance(scheduler: Scheduler) -> None:
    plan = scheduler.next_plan(0)
    assert plan.is_empty
    assert not plan.has_rows
    assert plan.plan_id == -1
    for name, dtype in ARRAY_DTYPES.items():
        array = getattr(plan, name)
        assert array.dtype == dtype
        assert array.tolist() == ([0] if name in OFFSETS else [])
    with pytest.raises(InvalidArgumentError, match="no plan is outstanding"):
        scheduler.advance(ExecutionEvent(plan_id=0))


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, 3],
        (1, 2, 3),
        np.array([1, 2, 3], dtype=np.int32),
        np.array([1, 2, 3], dtype=np.int64),
        np.array([1, 2, 3], dtype=np.uint16),
        np.array([1, 2, 3], dtype=">i4"),
        np.array([1, 9, 2, 9, 3, 9], dtype=np.int32)[::2],
    ],
    ids=["list", "tuple", "int32", "int64", "uint16", "big endian", "strided"],
)
def test_prompt_token_ids_of_any_integer_kind_are_taken(scheduler: Scheduler, prompt: Any) -> None:
    scheduler.add_request(make_request(1, prompt_token_ids=prompt))
    assert scheduler.next_plan(0).token_ids.tolist() == [1, 2, 3]


def test_prompt_is_copied_when_the_request_is_made(scheduler: Scheduler) -> None:
    prompt = np.array([1, 2, 3], dtype=np.int32)
    request = make_request(1, prompt_token_ids=prompt)
    prompt[:] = 99
    scheduler.add_request(request)
    assert scheduler.next_plan(0).token_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1.0, 2.0], "the dtype float64"),
        (np.array([1.5], dtype=np.float32), "the dtype float32"),
        ([2**31], "the value 2147483648 at 0"),
        (np.array([5, -(2**40)]), "the value -1099511627776 at 1"),
        (np.array([2**63], dtype=np.uint64), "the dtype uint64"),
        ([[1, 2], [3, 4]], "2 dimensions"),
        ("abc", "0 dimensions"),
        (7, "0 dimensions"),
        (None, "0 dimensions"),
        (["a", "b"], "the dtype <U1"),
    ],
)
def test_prompt_token_ids_that_are_not_int32_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_request(1, prompt_token_ids=prompt)


def test_request_without_an_adapter_id_is_refused() -> None:
    with pytest.raises(TypeError):
        NewRequest(request_id=1, prompt_token_ids=[1], max_tokens=1)  # type: ignore[call-arg]


def test_errors_are_the_classes_of_common_errors(scheduler: Scheduler) -> None:
    with pytest.raises(InvalidArgumentError, match="num_device_pages is 1; expected at least 8"):
        Scheduler(SchedulerOptions(num_device_pages=1, page_size=4, max_model_len=32))
    with pytest.raises(AdapterNotFoundError, match="adapter 3 is not open"):
        scheduler.add_request(make_request(1, adapter_id=3))
    with pytest.raises(AdapterNotFoundError, match="adapter 0 cannot be drained"):
        scheduler.drain_adapter(0)
    scheduler.add_request(make_request(1))
    with pytest.raises(InvalidArgumentError, match="request 1 is live already"):
        scheduler.add_request(make_request(1))
    scheduler.next_plan(0)
    scheduler.next_plan(1)
    with pytest.raises(InternalError, match="outstanding"):
        scheduler.next_plan(2)
    assert issubclass(AdapterNotFoundError, NotFoundError)
    assert issubclass(InternalError, LoraServeError)


def test_event_that_does_not_answer_the_plan_is_refused_and_changes_nothing(scheduler: Scheduler) -> None:
    scheduler.add_request(make_request(1))
    plan = scheduler.next_plan(0)
    with pytest.raises(InvalidArgumentError, match="2 entries in sampled_token_ids; expected one a row"):
        scheduler.advance(event_of(plan, sampled_token_ids=[1, 2]))
    with pytest.raises(InvalidArgumentError, match="0 entries in is_finished"):
        scheduler.advance(event_of(plan, is_finished=[]))
    with pytest.raises(InvalidArgumentError, match="the event of plan 9 came while plan 0"):
        scheduler.advance(event_of(plan, plan_id=9))
    with pytest.raises(InvalidArgumentError, match="the load of adapter 3"):
        scheduler.advance(event_of(plan, failed_adapter_ids=[3]))
    with pytest.raises(InvalidArgumentError, match="is_finished has the value 256"):
        event_of(plan, is_finished=[256])
    scheduler.check_invariants()
    scheduler.advance(event_of(plan))
    assert scheduler.next_plan(1).num_computed_tokens.tolist() == [6]


def test_failed_load_is_shown_and_its_requests_wait_for_the_caller(scheduler: Scheduler) -> None:
    scheduler.open_adapter(adapter_id=4, digest_seed=0, size_bytes=0)
    scheduler.add_request(make_request(1, adapter_id=4))
    plan = scheduler.next_plan(0)
    assert scheduler.stats().adapters[1].state == AdapterState.LOADING
    scheduler.advance(event_of(plan, loaded_adapter_ids=(), failed_adapter_ids=plan.load_adapter_ids))
    adapter = scheduler.stats().adapters[1]
    assert (adapter.adapter_id, adapter.load_failed, adapter.num_waiting_requests) == (4, True, 1)
    assert scheduler.next_plan(1).is_empty
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    scheduler.drain_adapter(4)
    assert scheduler.next_plan(2).drained_adapter_ids.tolist() == [4]


def test_stats_count_pages_and_hits(scheduler: Scheduler) -> None:
    for request_id in range(2):
        scheduler.add_request(make_request(request_id, max_tokens=1))
        plan = scheduler.next_plan(request_id)
        assert scheduler.stats().num_running_requests == 1
        scheduler.advance(event_of(plan))
    stats = scheduler.stats()
    assert (stats.total_queried_tokens, stats.total_hit_tokens) == (12, 4)
    assert (stats.num_device_pages, stats.num_free_pages, stats.num_tree_pages) == (16, 15, 1)
    assert (stats.num_private_pages, stats.total_preemptions, stats.total_evicted_pages) == (0, 0, 0)
    assert (stats.num_waiting_requests, stats.num_preempted_requests) == (0, 0)
    assert (stats.adapters[0].adapter_slot, stats.adapters[0].num_tree_pages) == (-1, 1)


def test_copies_are_planned_and_reported_with_or_without_a_plan(tiered_scheduler: Scheduler) -> None:
    scheduler = tiered_scheduler
    scheduler.add_request(make_request(1, max_tokens=9))
    first = scheduler.next_plan(0)
    scheduler.advance(event_of(first))
    plan = scheduler.next_plan(1)
    assert plan.transfer_ids.tolist() == [0]
    assert plan.transfer_kinds.tolist() == [0]
    assert plan.transfer_offsets.tolist() == [0, 1]
    assert plan.transfer_source_pages.tolist() == first.delta_pages.tolist()[:1], "its full page"
    assert len(plan.transfer_destination_pages) == 1
    stats = scheduler.stats()
    assert (stats.num_transfers, stats.num_host_pages, stats.num_free_host_pages) == (1, 8, 7)
    assert (stats.total_evicted_host_pages, stats.total_host_hit_tokens) == (0, 0)
    adapter = stats.adapters[0]
    assert (adapter.num_host_pages, adapter.num_hit_tokens, adapter.num_missed_tokens) == (1, 0, 6)
    with pytest.raises(InvalidArgumentError, match="copy 1 in completed_transfer_ids"):
        scheduler.advance(event_of(plan, completed_transfer_ids=[1]))
    with pytest.raises(InvalidArgumentError, match="copy 0 in failed_transfer_ids for the second time"):
        scheduler.advance(event_of(plan, completed_transfer_ids=[0], failed_transfer_ids=[0]))
    with pytest.raises(InvalidArgumentError, match="1 entries in sampled_token_ids; expected none"):
        scheduler.advance(event_of(plan, plan_id=-1, completed_transfer_ids=[0]))
    scheduler.advance(ExecutionEvent(plan_id=-1, completed_transfer_ids=np.array([0])))
    assert scheduler.stats().num_transfers == 0
    scheduler.advance(event_of(plan))
    scheduler.check_invariants()


def test_write_policies_are_names(scheduler: Scheduler) -> None:
    def options(**fields: Any) -> SchedulerOptions:
        return SchedulerOptions(num_device_pages=16, page_size=4, max_model_len=32, **fields)

    for name in ("write_through", "write_back", "off"):
        assert options(write_policy=name).write_policy == name
    assert scheduler.options.write_policy == "write_through"
    with pytest.raises(InvalidArgumentError, match="write_policy is 'on'; expected one of 'write_through', "):
        options(write_policy="on")
    with pytest.raises(InvalidArgumentError, match="num_host_pages is -1; expected at least 0"):
        Scheduler(options(num_host_pages=-1))
    with pytest.raises(InvalidArgumentError, match="write_back_watermark_pages is -1"):
        Scheduler(options(write_back_watermark_pages=-1))


def test_options_are_read_back(scheduler: Scheduler) -> None:
    options = scheduler.options
    assert (options.page_size, options.num_device_pages, options.max_model_len) == (4, 16, 32)
    assert (options.max_num_seqs, options.max_num_batched_tokens, options.max_loras) == (128, 128, 64)
    assert options.enable_prefix_caching
    assert (options.num_host_pages, options.write_back_watermark_pages) == (0, 0)
    tiered = SchedulerOptions(num_device_pages=16, num_host_pages=9, write_back_watermark_pages=5)
    assert (tiered.num_host_pages, tiered.write_back_watermark_pages) == (9, 5)


def test_schedulers_on_two_threads_do_not_disturb_each_other() -> None:
    # next_plan and advance release the interpreter lock: they must not touch Python objects.
    def run_steps(outputs: list[list[int]]) -> None:
        own = Scheduler(SchedulerOptions(num_device_pages=64, page_size=4, max_model_len=256))
        own.add_request(make_request(1, max_tokens=200))
        while own.has_work:
            plan = own.next_plan(0)
            outputs.append(plan.num_computed_tokens.tolist())
            own.advance(event_of(plan))

    results: list[list[list[int]]] = [[], []]
    threads = [threading.Thread(target=run_steps, args=(outputs,)) for outputs in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == [[0], *[[position] for position in range(6, 205)]]
