"""The oracle's copies between the tiers: right ones change nothing, wrong ones are seen."""

from __future__ import annotations

import numpy as np
import pytest

from executor.hand_made_run import HandMadeRun
from executor.plans import PlanStandIn
from executor.run_plan import run_plan
from executor.states import make_state
from lora_serve.common.errors import InternalError
from lora_serve.testing.oracle_executor import OracleExecutor, OracleOptions, Outcome
from lora_serve.testing.oracle_tokens import oracle_tokens

VOCAB = 1000
WRITE_BACK, LOAD_BACK = 0, 1


def _oracle(outcome: Outcome = Outcome.DONE) -> OracleExecutor:
    oracle = OracleExecutor(
        OracleOptions(num_device_pages=20, page_size=4, max_num_seqs=8, max_model_len=64, num_host_pages=10)
    )
    oracle.copy_outcome = lambda transfer_id: outcome
    return oracle


def _state(length: int, seed: int = 0):
    prompt = np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
    return make_state(prompt, vocab_size=VOCAB)


def _copy(oracle: OracleExecutor, *transfers: tuple[int, int, list[int], list[int]]):
    return run_plan(oracle, PlanStandIn(transfers=list(transfers)))


def _run_with_pages_on_host(oracle: OracleExecutor, adapter_id: int = 0) -> HandMadeRun:
    """A request of 13 tokens, eight of them in host pages 3 and 1 and no longer on the device."""
    if adapter_id:
        run_plan(oracle, PlanStandIn(loads=[(adapter_id, 2)]))
    run = HandMadeRun(oracle, _state(13), [0, 4, 2, 5], slot=2 if adapter_id else -1)
    run.step(8)
    _copy(oracle, (0, WRITE_BACK, [0, 4], [3, 1]))
    HandMadeRun(oracle, _state(8, seed=5), [0, 4], row=1).step(8)
    return run


@pytest.mark.parametrize("adapter_id", [0, 9])
def test_pages_copied_out_and_back_give_the_tokens_of_the_request_alone(adapter_id):
    oracle = _oracle()
    run = _run_with_pages_on_host(oracle, adapter_id)

    result = _copy(oracle, (1, LOAD_BACK, [3, 1], [7, 6]))
    run.preempt([7, 6, 5, 8, 9], num_kept=8)
    run.finish([5], num_output=6)

    assert (result.completed_transfer_ids, result.failed_transfer_ids) == ([1], {})
    assert run.state.output_token_ids == oracle_tokens(
        adapter_id, run.state.prompt_token_ids.tolist(), 6, VOCAB
    )


def test_copy_in_a_wrong_order_is_reported():
    oracle = _oracle()
    run = _run_with_pages_on_host(oracle)
    _copy(oracle, (1, LOAD_BACK, [1, 3], [7, 6]))
    run.preempt([7, 6, 5, 8], num_kept=8)

    with pytest.raises(InternalError, match="holds position 4"):
        run.step(5)


def test_copy_from_another_requests_page_changes_the_token():
    oracle = _oracle()
    run = _run_with_pages_on_host(oracle)
    _copy(oracle, (1, WRITE_BACK, [0, 4], [5, 6]))
    _copy(oracle, (2, LOAD_BACK, [3, 6], [7, 8]))
    run.preempt([7, 8, 5, 9], num_kept=8)

    run.finish([5], num_output=3)

    assert run.state.output_token_ids != oracle_tokens(0, run.state.prompt_token_ids.tolist(), 3, VOCAB)


def test_failed_copy_leaves_nothing_to_read():
    oracle = _oracle()
    run = _run_with_pages_on_host(oracle)
    oracle.copy_outcome = lambda transfer_id: Outcome.FAILED

    result = _copy(oracle, (1, LOAD_BACK, [3, 1], [7, 6]))
    run.preempt([7, 6, 5, 8], num_kept=8)

    assert result.completed_transfer_ids == []
    assert list(result.failed_transfer_ids) == [1]
    with pytest.raises(InternalError, match="never written"):
        run.step(5)


def test_copies_end_when_the_test_says_so_in_any_order():
    oracle = _oracle(Outcome.UNDER_WAY)
    HandMadeRun(oracle, _state(8), [0, 1]).step(8)

    started = _copy(oracle, (0, WRITE_BACK, [0], [0]), (1, WRITE_BACK, [1], [1]))
    oracle.copy_outcome = lambda transfer_id: Outcome.DONE if transfer_id else Outcome.UNDER_WAY
    first = oracle.report()
    oracle.copy_outcome = lambda transfer_id: Outcome.DONE
    second = run_plan(oracle, PlanStandIn(loads=[(3, 0)]))

    assert started.completed_transfer_ids == []
    assert (first.plan_id, first.completed_transfer_ids) == (-1, [1])
    assert second.completed_transfer_ids == [0]
    assert oracle.report().completed_transfer_ids == []


# --- What may not be touched while it is copied -----------------------------------------------------------


def test_row_that_reads_a_page_before_it_has_arrived_is_reported():
    oracle = _oracle()
    run = _run_with_pages_on_host(oracle)
    oracle.copy_outcome = lambda transfer_id: Outcome.UNDER_WAY
    _copy(oracle, (1, LOAD_BACK, [3, 1], [7, 6]))
    run.preempt([7, 6, 5, 8], num_kept=8)

    with pytest.raises(InternalError, match="a row reads device page 7 before the copy to it is done"):
        run.step(5)


@pytest.mark.parametrize("pages", [[4, 0], [7, 6]], ids=["source of a write-back", "destination"])
def test_row_that_writes_a_page_while_it_is_copied_is_reported(pages):
    oracle = _oracle()
    _run_with_pages_on_host(oracle)
    oracle.copy_outcome = lambda transfer_id: Outcome.UNDER_WAY
    _copy(oracle, (1, WRITE_BACK, [0, 4], [5, 6]), (2, LOAD_BACK, [3, 1], [7, 6]))

    with pytest.raises(InternalError, match=r"a row writes device page [47] while it is copied"):
        HandMadeRun(oracle, _state(3), pages, row=2).step(3)


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        ((2, WRITE_BACK, [0], [5]), "writes what another copy touches"),
        ((2, WRITE_BACK, [0], [3]), "writes what another copy touches"),
        ((2, LOAD_BACK, [3], [0]), "writes what another copy touches"),
        ((2, LOAD_BACK, [5], [9]), "reads what another copy writes"),
        ((2, WRITE_BACK, [0, 4], [7, 7]), "has source pages"),
        ((2, WRITE_BACK, [2], [7]), "reads device page 2, which is not full"),
        ((2, LOAD_BACK, [9], [12]), "reads host page 9, which is not full"),
        ((1, WRITE_BACK, [0], [7]), "is under way already"),
        ((2, WRITE_BACK, [], []), "copies nothing"),
    ],
)
def test_copy_that_disturbs_another_or_copies_no_whole_page_is_reported(transfer, message):
    oracle = _oracle()
    run = _run_with_pages_on_host(oracle)
    run.preempt([10, 11, 2])
    run.step(10)  # leaves page 2 with two tokens
    oracle.copy_outcome = lambda transfer_id: Outcome.UNDER_WAY
    _copy(oracle, (0, LOAD_BACK, [3, 1], [15, 16]), (1, WRITE_BACK, [0, 4], [5, 6]))

    with pytest.raises(InternalError, match=message):
        _copy(oracle, transfer)
