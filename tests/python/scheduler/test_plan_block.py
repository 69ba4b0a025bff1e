"""The block of a plan that goes to the device in one copy. What it holds is tested in tests/cpp."""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import pytest
import torch

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.kernels import build_lora_metadata
from lora_serve.kernels.lora_tiles import build_lora_tiles
from lora_serve.scheduler import ExecutionEvent, ExecutionPlan, NewRequest, Scheduler, SchedulerOptions

MAX_LORAS = 4
ROW_ARRAYS = ("page_table_rows", "num_scheduled_tokens", "num_computed_tokens", "seq_lens", "adapter_slots")
TOKEN_ARRAYS = ("token_ids", "token_lora_mapping", "token_indices_sorted_by_lora_ids")
GROUP_ARRAYS = ("active_lora_ids", "num_tokens_per_lora")
BLOCK_ARRAYS = (
    "header",
    *GROUP_ARRAYS,
    "lora_token_start_loc",
    *ROW_ARRAYS,
    "query_start_loc",
    *TOKEN_ARRAYS,
    "lora_tiles",
    "delta_rows",
    "delta_starts",
    "delta_offsets",
    "delta_pages",
)


def _scheduler(**options: Any) -> Scheduler:
    return Scheduler(
        SchedulerOptions(
            **{
                "num_device_pages": 64,
                "page_size": 4,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 24,
                "max_model_len": 32,
                "max_loras": MAX_LORAS,
                **options,
            }
        )
    )


def _request(request_id: int, num_tokens: int = 5, adapter_id: int = 0) -> NewRequest:
    return NewRequest(
        request_id=request_id,
        adapter_id=adapter_id,
        prompt_token_ids=np.arange(num_tokens) + 100 * request_id,
        max_tokens=6,
    )


def _advance(scheduler: Scheduler, plan: ExecutionPlan) -> None:
    scheduler.advance(
        ExecutionEvent(
            plan_id=plan.plan_id,
            sampled_token_ids=np.where(plan.samples_token == 1, 7, -1),
            is_finished=np.zeros(len(plan.request_ids), dtype=np.uint8),
            loaded_adapter_ids=plan.load_adapter_ids,
        )
    )


def test_layout_names_the_arrays_of_the_block():
    scheduler = _scheduler()
    scheduler.add_request(_request(1))
    plan = scheduler.next_plan(0)

    assert tuple(plan.layout) == BLOCK_ARRAYS
    for name in BLOCK_ARRAYS:
        array = getattr(plan, name)
        assert plan.block[plan.layout[name]].tolist() == array.tolist(), name
        assert plan.layout[name].start % 4 == 0, name
        assert array.dtype == np.int32
        assert np.shares_memory(array, plan.block) or array.size == 0, name
    assert plan.block.base is plan
    assert not plan.block.flags.writeable
    assert plan.header.tolist() == [1, 5, 1, 5, 1, 2, 1, 0]


def test_padded_rows_are_seen_through_the_layout_only():
    scheduler = _scheduler(padded_batch_sizes=[4, 8])
    for request_id in range(3):
        scheduler.add_request(_request(request_id))
    prefill = scheduler.next_plan(0)
    assert (prefill.num_padded_rows, prefill.num_padded_tokens) == (3, 15)
    _advance(scheduler, prefill)
    plan = scheduler.next_plan(1)

    assert (plan.num_padded_rows, plan.num_padded_tokens) == (4, 4)
    assert plan.seq_lens.tolist() == [6, 6, 6]
    expected = {
        "page_table_rows": [0, 1, 2, 8],
        "num_scheduled_tokens": [1, 1, 1, 0],
        "num_computed_tokens": [5, 5, 5, 0],
        "seq_lens": [6, 6, 6, 0],
        "adapter_slots": [-1, -1, -1, -1],
        "query_start_loc": [0, 1, 2, 3, 3],
        "token_ids": [7, 7, 7, 0],
        "token_lora_mapping": [-1, -1, -1, -1],
        "token_indices_sorted_by_lora_ids": [0, 1, 2, 3],
    }
    for name, entries in expected.items():
        assert plan.block[plan.layout[name]].tolist() == entries, name


def test_caller_gives_the_memory_and_the_plan_keeps_it():
    scheduler = _scheduler()
    scheduler.add_request(_request(1))
    memory = np.full(scheduler.plan_block_size, -7, dtype=np.int32)
    num_references = sys.getrefcount(memory)

    plan = scheduler.next_plan(0, memory)
    token_ids = plan.token_ids
    assert np.shares_memory(token_ids, memory)
    assert memory[: len(plan.block)].tolist() == plan.block.tolist()
    assert set(memory[len(plan.block) :].tolist()) == {-7}
    del plan
    gc.collect()
    assert sys.getrefcount(memory) > num_references, "a view keeps the plan, and the plan the memory"
    assert token_ids.tolist() == [100, 101, 102, 103, 104]
    del token_ids
    gc.collect()
    assert sys.getrefcount(memory) == num_references


def _read_only(size: int) -> np.ndarray:
    array = np.zeros(size, dtype=np.int32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda size: np.zeros(size - 1, dtype=np.int32), r"expected at least \d+ \(PlanBlockCapacity\)"),
        (lambda size: np.zeros(size, dtype=np.int64), "dtype int64"),
        (lambda size: np.zeros(size, dtype=np.uint32), "dtype uint32"),
        (lambda size: np.zeros((1, size), dtype=np.int32), "2 dimensions"),
        (lambda size: np.zeros(2 * size, dtype=np.int32)[::2], "contiguous"),
        (_read_only, "read-only"),
    ],
    ids=["too small", "int64", "uint32", "two dimensions", "strided", "read-only"],
)
def test_memory_that_does_not_fit_is_refused_before_anything_changes(make, message):
    scheduler = _scheduler()
    scheduler.add_request(_request(1))
    with pytest.raises(InvalidArgumentError, match=message):
        scheduler.next_plan(0, make(scheduler.plan_block_size))
    with pytest.raises(TypeError):
        scheduler.next_plan(0, "memory")
    scheduler.check_invariants()
    assert scheduler.next_plan(0).plan_id == 0


@pytest.mark.parametrize(
    ("seed", "largest_prompt", "sizes"),
    [
        *((seed, 19, {}) for seed in range(4)),
        (4, 150, {"num_device_pages": 512, "max_num_batched_tokens": 300, "max_model_len": 200}),
    ],
)
def test_groups_by_adapter_equal_those_of_the_kernels_function(seed, largest_prompt, sizes):
    rng = np.random.default_rng(seed)
    scheduler = _scheduler(padded_batch_sizes=[8], **sizes)
    for adapter_id in range(1, 4):
        scheduler.open_adapter(adapter_id=adapter_id, digest_seed=0, size_bytes=0)
    _advance(scheduler, scheduler.next_plan(0))
    num_distinct = set()
    for request_id in range(40):
        scheduler.add_request(
            _request(request_id, int(rng.integers(1, largest_prompt + 1)), int(rng.integers(0, 4)))
        )
    step = 0
    while scheduler.has_work:
        step += 1
        plan = scheduler.next_plan(step)
        mapping = np.repeat(plan.adapter_slots, plan.num_scheduled_tokens)
        expected = build_lora_metadata(torch.from_numpy(mapping), MAX_LORAS)
        for name in (*TOKEN_ARRAYS[1:], *GROUP_ARRAYS, "lora_token_start_loc"):
            assert getattr(plan, name).tolist() == getattr(expected, name).tolist(), name
        slots, counts = (torch.tensor(getattr(plan, name)) for name in GROUP_ARRAYS)
        tiles = build_lora_tiles(slots, counts, plan.num_padded_tokens, MAX_LORAS + 1)
        assert plan.lora_tiles.tolist() == tiles.flatten().tolist()
        assert (plan.num_adapters == 0) == expected.no_adapter
        num_distinct.add(plan.num_adapters)
        _advance(scheduler, plan)
    assert len(num_distinct) > 1, "the steps should differ in their adapters"
