from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_serve.common.errors import InternalError
from lora_serve.executor.input_batch import InputBatch, build_input_batch
from lora_serve.executor.page_table import PageTable

from .plans import PlanStandIn

PAGE_SIZE = 4


def _build(plan: PlanStandIn, max_num_seqs: int = 4, max_pages: int = 8) -> InputBatch:
    table = PageTable(max_num_seqs, max_pages, 1000)
    table.apply_deltas(plan)
    return build_input_batch(plan, table, page_size=PAGE_SIZE, device=torch.device("cpu"))


def _row(page_table_row: int, computed: int, scheduled: int, adapter_slot: int = -1) -> dict:
    return {
        "page_table_row": page_table_row,
        "num_computed_tokens": computed,
        "num_scheduled_tokens": scheduled,
        "adapter_slot": adapter_slot,
    }


def test_mixed_step_gets_positions_slots_and_metadata():
    plan = PlanStandIn(
        rows=[_row(2, 7, 1, 5), _row(0, 8, 1), _row(3, 3, 6, 0)],
        tokens=[70, 80, 13, 14, 15, 16, 17, 18],
        deltas=[(2, 0, [9, 4]), (0, 0, [1, 2, 900]), (3, 0, [30, 20, 10])],
    )

    batch = _build(plan)

    context, attention = batch.context, batch.attention
    assert batch.token_ids.tolist() == [70, 80, 13, 14, 15, 16, 17, 18]
    assert context.positions.tolist() == [7, 8, 3, 4, 5, 6, 7, 8]
    chunk = [30 * 4 + 3, 20 * 4, 20 * 4 + 1, 20 * 4 + 2, 20 * 4 + 3, 10 * 4]
    assert context.slot_mapping.tolist() == [4 * 4 + 3, 900 * 4, *chunk]
    assert attention.query_start_loc.tolist() == [0, 1, 2, 8]
    assert attention.num_computed_tokens.tolist() == [7, 8, 3]
    assert attention.seq_lens.tolist() == [8, 9, 9]
    assert attention.host_query_lens == [1, 1, 6]
    assert attention.host_seq_lens == [8, 9, 9]
    assert attention.page_table.shape == (3, 3)
    assert attention.page_table[1:].tolist() == [[1, 2, 900], [30, 20, 10]]
    assert attention.page_table[0, :2].tolist() == [9, 4]
    assert context.lora.token_lora_mapping.tolist() == [5, -1, 0, 0, 0, 0, 0, 0]
    assert context.lora.token_indices_sorted_by_lora_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert context.lora.active_lora_ids.tolist() == [-1, 0, 5, -1]
    assert context.lora.num_tokens_per_lora.tolist() == [1, 6, 1, 0]
    assert context.lora.lora_token_start_loc.tolist() == [0, 1, 7, 8, 8]
    assert not context.lora.no_adapter
    assert batch.query_start_loc.tolist() == [0, 1, 2, 8]
    assert {t.dtype for t in (batch.token_ids, context.positions, context.slot_mapping)} == {torch.int64}
    int32_tensors = (
        attention.query_start_loc,
        attention.num_computed_tokens,
        attention.seq_lens,
        attention.page_table,
    )
    assert {t.dtype for t in int32_tensors} == {torch.int32}


@pytest.mark.parametrize("seed", range(5))
def test_slot_mapping_equals_a_token_by_token_loop(seed):
    rng = np.random.default_rng(seed)
    pages = rng.permutation(200).reshape(10, 20)
    rows = [_row(r, int(rng.integers(0, 60)), int(rng.integers(1, 20))) for r in rng.permutation(10)]
    num_tokens = sum(row["num_scheduled_tokens"] for row in rows)
    plan = PlanStandIn(
        rows=rows,
        tokens=rng.integers(0, 99, num_tokens).tolist(),
        deltas=[(r, 0, pages[r].tolist()) for r in range(10)],
    )

    batch = _build(plan, max_num_seqs=10, max_pages=20)

    expected = []
    for row in rows:
        start = row["num_computed_tokens"]
        for position in range(start, start + row["num_scheduled_tokens"]):
            page = pages[row["page_table_row"]][position // PAGE_SIZE]
            expected.append((position, page * PAGE_SIZE + position % PAGE_SIZE))
    assert batch.context.positions.tolist() == [position for position, _ in expected]
    assert batch.context.slot_mapping.tolist() == [slot for _, slot in expected]


def test_step_without_adapters_says_so():
    batch = _build(PlanStandIn(rows=[_row(0, 0, 2)], tokens=[1, 2], deltas=[(0, 0, [3])]))

    assert batch.context.lora.no_adapter


def test_batch_keeps_no_view_of_the_plan():
    plan = PlanStandIn(rows=[_row(0, 0, 2)], tokens=[1, 2], deltas=[(0, 0, [3])])
    batch = _build(plan)

    for value in vars(plan).values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = True
            np.add(value, 1, out=value, casting="unsafe")
    attention = batch.attention
    assert batch.token_ids.tolist() == [1, 2]
    assert attention.num_computed_tokens.tolist() == [0]
    assert attention.page_table.tolist() == [[3]]
    assert batch.context.lora.token_lora_mapping.tolist() == [-1, -1]


def test_token_that_only_the_executor_knows_stays_open_in_memory_of_its_own():
    plan = PlanStandIn(
        rows=[_row(0, 3, 1), _row(1, 0, 2)], tokens=[-1, 8, 9], deltas=[(0, 0, [3]), (1, 0, [4])]
    )
    batch = _build(plan)

    assert batch.token_ids.tolist() == [-1, 8, 9]
    batch.token_ids[0] = 7
    assert batch.context.lora.token_lora_mapping.tolist() == [-1, -1, -1]
    assert batch.context.positions.tolist() == [3, 0, 1]


@pytest.mark.parametrize(
    ("rows", "tokens", "message"),
    [
        ([_row(0, 0, 3)], [1, 2], "schedules 3 tokens but gives 2"),
        ([_row(0, 0, 2)], [1, -2], "has token id -2"),
        ([_row(0, 7, 2)], [1, 1], "has 2 pages but the plan's tokens need 3"),
        ([_row(1, 0, 1)], [1], "row 1 has 0 pages"),
    ],
    ids=["token count", "unknown token", "missing page", "row never filled"],
)
def test_impossible_plan_is_an_internal_error(rows, tokens, message):
    with pytest.raises(InternalError, match=message):
        _build(PlanStandIn(rows=rows, tokens=tokens, deltas=[(0, 0, [3, 4])]))
