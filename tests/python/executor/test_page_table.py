from __future__ import annotations

import numpy as np
import pytest

from lora_serve.common.errors import InternalError
from lora_serve.executor.page_table import PageTable

from .plans import PlanStandIn


def _int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_deltas_change_entries_from_their_start_on():
    table = PageTable(3, 6, 100)

    table.apply_deltas(PlanStandIn(deltas=[(0, 0, [10, 11, 12]), (2, 0, [99])]))
    table.apply_deltas(PlanStandIn(deltas=[(2, 1, [0, 50]), (0, 3, [13])]))

    assert table.rows(_int32(2, 0), _int32(3, 4)).tolist() == [[99, 0, 50, 0], [10, 11, 12, 13]]


def test_delta_in_the_middle_replaces_the_rest():
    table = PageTable(1, 6, 100)
    table.apply_deltas(PlanStandIn(deltas=[(0, 0, [1, 2, 3, 4])]))

    table.apply_deltas(PlanStandIn(deltas=[(0, 1, [8])]))

    assert table.rows(_int32(0), _int32(2)).tolist() == [[1, 8]]
    with pytest.raises(InternalError, match=r"has 2 pages but .* need 3"):
        table.rows(_int32(0), _int32(3))


def test_row_of_a_new_request_does_not_keep_the_old_length():
    table = PageTable(2, 6, 100)
    table.apply_deltas(PlanStandIn(deltas=[(1, 0, [1, 2, 3, 4])]))
    table.apply_deltas(PlanStandIn(deltas=[(1, 0, [7])]))

    with pytest.raises(InternalError, match="row 1 has 1 pages"):
        table.rows(_int32(1), _int32(4))


def test_rows_are_a_copy():
    table = PageTable(1, 2, 100)
    table.apply_deltas(PlanStandIn(deltas=[(0, 0, [5])]))
    before = table.rows(_int32(0), _int32(1))

    table.apply_deltas(PlanStandIn(deltas=[(0, 0, [6])]))

    assert before.tolist() == [[5]]


@pytest.mark.parametrize(
    "delta",
    [
        (2, 0, [1]),
        (-1, 0, [1]),
        (0, 1, [1]),
        (0, -1, [1]),
        (0, 0, [1, 2, 3]),
        (0, 0, [10]),
        (0, 0, [-1]),
    ],
    ids=["row beyond", "row below", "gap", "start below", "too long", "page beyond", "page below"],
)
def test_impossible_delta_is_an_internal_error(delta):
    table = PageTable(2, 2, 10)

    with pytest.raises(InternalError, match="plan 1 "):
        table.apply_deltas(PlanStandIn(deltas=[delta]))
