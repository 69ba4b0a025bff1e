from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_serve.common.errors import InternalError
from lora_serve.executor.last_tokens import LastSampledTokens

from .plans import PlanStandIn


def row(page_table_row: int, num_tokens: int = 1, samples: int = 1) -> dict:
    return {"page_table_row": page_table_row, "num_scheduled_tokens": num_tokens, "samples_token": samples}


def note(tokens: LastSampledTokens, rows: list[dict], sampled: list[int]) -> None:
    plan = PlanStandIn(rows=rows, tokens=[0] * sum(r["num_scheduled_tokens"] for r in rows))
    tokens.note(plan, np.array(sampled, dtype=np.int32))


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["tensor", "array"])
def test_unknown_tokens_are_the_last_ones_of_their_rows(make):
    tokens = LastSampledTokens(8)
    note(tokens, [row(5), row(0), row(7)], [50, 60, 70])
    note(tokens, [row(0)], [61])
    plan = PlanStandIn(rows=[row(7), row(3, 3), row(0), row(5)], tokens=[-1, 1, 2, 3, -1, -1])
    token_ids = make(plan.token_ids.tolist())

    assert tokens.fill(token_ids, plan) == []
    assert token_ids.tolist() == [70, 1, 2, 3, 61, 50]


def test_known_tokens_are_left_alone():
    tokens = LastSampledTokens(2)
    note(tokens, [row(0)], [9])
    token_ids = torch.tensor([4, 0])
    assert tokens.fill(token_ids, PlanStandIn(rows=[row(0), row(1)], tokens=[4, 0])) == []
    assert token_ids.tolist() == [4, 0]


def test_row_that_failed_gives_token_0_and_is_named():
    tokens = LastSampledTokens(4)
    note(tokens, [row(0), row(1), row(2)], [7, -1, 9])
    plan = PlanStandIn(rows=[row(2), row(1), row(0)], tokens=[-1, -1, -1])
    token_ids = torch.tensor([-1, -1, -1])

    assert tokens.fill(token_ids, plan) == [1]
    assert token_ids.tolist() == [9, 0, 7]


@pytest.mark.parametrize("has_run", [False, True], ids=["never ran", "ran a chunk of its prompt"])
def test_token_of_a_row_that_sampled_none_is_an_internal_error(has_run):
    tokens = LastSampledTokens(4)
    note(tokens, [row(3)], [1])
    if has_run:
        note(tokens, [row(3, 2, samples=0)], [-1])
    with pytest.raises(InternalError, match=r"row 1: .* page-table row \d, which has sampled none"):
        tokens.fill(
            torch.tensor([5, -1]), PlanStandIn(rows=[row(0), row(3 if has_run else 2)], tokens=[5, -1])
        )
