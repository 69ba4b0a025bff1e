from __future__ import annotations

import numpy as np
import pytest

from executor.hand_made_run import HandMadeRun
from executor.plans import PlanStandIn
from executor.run_plan import run_plan
from executor.scheduler_run import SchedulerRun
from executor.states import make_state
from lora.memory_setup import Line
from lora_serve.common.errors import AdapterNotFoundError, InternalError
from lora_serve.lora.host_adapters import HostNews
from lora_serve.testing.oracle_adapters import OracleAdapterStore
from lora_serve.testing.oracle_executor import OracleExecutor, OracleOptions
from lora_serve.testing.oracle_tokens import oracle_tokens

VOCAB = 1000


def _oracle(**options) -> OracleExecutor:
    defaults = {"num_device_pages": 40, "page_size": 4, "max_num_seqs": 8, "max_model_len": 64}
    return OracleExecutor(OracleOptions(**{**defaults, **options}))


def _prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def _state(prompt: list[int], **params):
    return make_state(prompt, vocab_size=VOCAB, **params)


# --- The oracle by itself ---------------------------------------------------------------------------------


def test_tokens_of_a_request_alone_are_spread_and_repeatable():
    tokens = oracle_tokens(3, _prompt(5), 2000, VOCAB)

    assert tokens == oracle_tokens(3, _prompt(5), 2000, VOCAB)
    assert tokens[:7] == oracle_tokens(3, _prompt(5), 7, VOCAB)
    assert all(0 <= token < VOCAB for token in tokens)
    assert len(set(tokens)) > 700


def test_tokens_depend_on_adapter_and_on_every_prompt_token_and_its_place():
    prompt = _prompt(6)
    swapped = [prompt[1], prompt[0], *prompt[2:]]
    changed = [*prompt[:3], prompt[3] + 1, *prompt[4:]]

    answers = [
        oracle_tokens(adapter_id, tokens, 4, VOCAB)
        for adapter_id, tokens in [(0, prompt), (1, prompt), (2, prompt), (0, swapped), (0, changed)]
    ]

    assert len({tuple(answer) for answer in answers}) == 5


@pytest.mark.parametrize("chunks", [[13], [1, 12], [4, 4, 5], [3, 3, 3, 3, 1]])
@pytest.mark.parametrize("adapter_id", [0, 9])
def test_hand_made_run_gives_the_tokens_of_the_request_alone(chunks, adapter_id):
    oracle = _oracle()
    if adapter_id:
        run_plan(oracle, PlanStandIn(loads=[(adapter_id, 2)]))
    state = _state(_prompt(13))
    run = HandMadeRun(oracle, state, [30, 2, 17, 5, 9, 0], slot=2 if adapter_id else -1)

    run.finish(chunks, num_output=6)
    run.preempt([10, 11, 12, 13, 14, 15, 16, 1])
    run.finish([8, 11], num_output=12)

    assert state.output_token_ids == oracle_tokens(adapter_id, _prompt(13), 12, VOCAB)


def test_loads_and_drains_move_adapters_between_slots():
    oracle = _oracle()
    oracle.load_fails = {6}.__contains__
    oracle.lora.add(5, oracle.lora.read("some/path"))

    loaded = run_plan(oracle, PlanStandIn(loads=[(5, 0), (6, 1)]))
    before = oracle.lora.snapshot()
    run_plan(oracle, PlanStandIn(drained=[5, 77]))

    assert loaded.loaded_adapter_ids == [5]
    assert list(loaded.failed_adapter_ids) == [6]
    assert [(entry.adapter_id, entry.adapter_slot) for entry in before] == [(5, 0)]
    assert [(entry.adapter_id, entry.adapter_slot) for entry in oracle.lora.snapshot()] == [(5, -1)]
    with pytest.raises(InternalError, match="slot 0, which holds no adapter"):
        HandMadeRun(oracle, _state([1]), [0], slot=0).step(1)


def test_logprobs_are_those_of_a_certain_model():
    oracle = _oracle()
    state = _state(_prompt(6), logprobs=2, prompt_logprobs=0)
    run = HandMadeRun(oracle, state, [0, 1, 2, 3])

    results = run.finish([4, 2], num_output=2)

    entry = results[-1].logprobs[0]
    assert (entry.token_id, entry.logprob, entry.rank) == (state.output_token_ids[1], 0.0, 1)
    assert entry.top_token_ids.tolist() == [entry.token_id]
    assert state.prompt_logprobs[0] is None
    assert [e.token_id for e in state.prompt_logprobs[1:]] == _prompt(6)[1:]


# --- Faults that it must see ------------------------------------------------------------------------------


def test_reading_a_page_that_was_never_written_is_reported():
    run = HandMadeRun(_oracle(), _state(_prompt(6)), [0, 1])
    run.preempt([0, 1], num_kept=4)

    with pytest.raises(InternalError, match="never written"):
        run.step(2)


def test_reading_another_adapters_page_is_reported():
    oracle = _oracle()
    run_plan(oracle, PlanStandIn(loads=[(7, 0)]))
    HandMadeRun(oracle, _state(_prompt(8)), [0, 1, 2], slot=0).step(8)
    run = HandMadeRun(oracle, _state(_prompt(8)), [0, 1, 2], row=1)
    run.preempt([0, 3, 4], num_kept=4)

    with pytest.raises(InternalError, match=r"position 0 of adapter 0 \(page 0\) holds .* of adapter 7"):
        run.step(4)


def test_reading_a_page_of_another_position_is_reported():
    oracle = _oracle()
    HandMadeRun(oracle, _state(_prompt(8)), [0, 1, 2]).step(8)
    run = HandMadeRun(oracle, _state(_prompt(9)), [0, 1, 2], row=1)
    run.preempt([1, 0, 3], num_kept=8)

    with pytest.raises(InternalError, match="holds position 4"):
        run.step(1)


def test_reading_another_prompts_page_changes_the_token():
    oracle = _oracle()
    HandMadeRun(oracle, _state(_prompt(8, seed=1)), [0, 1, 2]).step(8)
    state = _state(_prompt(8))
    run = HandMadeRun(oracle, state, [0, 1, 2], row=1)
    run.preempt([0, 5, 6], num_kept=4)

    run.finish([4], num_output=3)

    assert state.output_token_ids != oracle_tokens(0, _prompt(8), 3, VOCAB)


def test_two_rows_that_write_one_entry_are_reported():
    first, second = (HandMadeRun(_oracle(), _state(_prompt(3, seed)), [4], row=seed) for seed in (0, 1))
    one, two = first.plan(3), second.plan(3)
    merged = PlanStandIn(
        rows=[*one.rows, *two.rows], tokens=[*one.tokens, *two.tokens], deltas=[*one.deltas, *two.deltas]
    )

    with pytest.raises(InternalError, match="writes an entry twice"):
        run_plan(_oracle(), merged)


def test_row_that_uses_an_adapter_that_was_evicted_is_reported():
    oracle = _oracle()
    run_plan(oracle, PlanStandIn(loads=[(5, 0)]))
    HandMadeRun(oracle, _state([1]), [0], slot=0).step(1)
    run_plan(oracle, PlanStandIn(evicted=[5]))
    with pytest.raises(InternalError, match="slot 0, which holds no adapter"):
        HandMadeRun(oracle, _state([1]), [1], slot=0, row=1).step(1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"loads": [(3, 0)]}, "slot 0, which is taken"),
        ({"loads": [(1, 3)]}, "generation 1 is loaded to slot 3 but has 0"),
        ({"loads": [(3, 2)]}, "to 3072 bytes but it holds 2048"),
        ({"evicted": [3]}, "generation 3 is evicted but is in no slot"),
    ],
)
def test_plan_that_moves_adapters_wrongly_is_reported(plan, message):
    oracle = _oracle(adapter_memory_bytes=2048)
    for adapter_id in (1, 2, 3):
        oracle.lora.add(adapter_id, oracle.lora.read("some/path"))
    run_plan(oracle, PlanStandIn(loads=[(1, 0), (2, 1)]))
    with pytest.raises(InternalError, match=message):
        run_plan(oracle, PlanStandIn(**plan))


def test_row_of_an_adapter_whose_load_has_failed_runs_and_fails():
    oracle = _oracle()
    oracle.load_fails = {5}.__contains__
    result = run_plan(oracle, PlanStandIn(loads=[(5, 0), (6, 1)]))
    assert (result.loaded_adapter_ids, list(result.failed_adapter_ids)) == ([6], [5])
    row = HandMadeRun(oracle, _state([1]), [0], slot=0).step(1)
    assert "could not be brought to the device" in row.row_errors[0]
    run_plan(oracle, PlanStandIn(evicted=[5]))  # Made before that was known.


# --- Plans on their way -----------------------------------------------------------------------------------


def test_plan_runs_when_it_is_collected_and_reads_the_token_of_the_one_before():
    oracle = _oracle()
    state = _state(_prompt(6))
    run = HandMadeRun(oracle, state, [0, 1, 2, 3])
    oracle.submit(run.plan(6), [state])
    oracle.submit(PlanStandIn(plan_id=2, rows=[{"num_computed_tokens": 6}], tokens=[-1]), [state])
    assert state.output_token_ids == []
    with pytest.raises(InternalError, match="while 2 plans are on their way"):
        oracle.submit(PlanStandIn(plan_id=3), [])
    assert [oracle.collect().plan_id, oracle.collect().plan_id] == [1, 2]
    assert state.output_token_ids == oracle_tokens(0, _prompt(6), 2, VOCAB)
    with pytest.raises(InternalError, match="no plan is on its way"):
        oracle.collect()


def test_token_that_no_plan_before_has_sampled_is_reported():
    run = HandMadeRun(_oracle(), _state(_prompt(6)), [0, 1, 2, 3])
    run.step(4)
    plan = PlanStandIn(plan_id=2, rows=[{"num_computed_tokens": 4}], tokens=[-1])
    with pytest.raises(InternalError, match="has sampled none"):
        run_plan(run.executor, plan, [run.state])


# --- With the real scheduler ------------------------------------------------------------------------------


def test_adapter_that_comes_after_a_drained_one_reads_none_of_its_pages():
    oracle = _oracle()
    run = SchedulerRun(oracle, page_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_loras=1)
    prompt = _prompt(20)
    for adapter_id in (1, 2, 3):
        run.scheduler.open_adapter(adapter_id=adapter_id, digest_seed=1, size_bytes=1, is_staged=True)
        run.add(10 * adapter_id, _state(prompt), 8, adapter_id)
        run.finish()
        run.add(10 * adapter_id + 1, _state(prompt), 8, adapter_id)
        run.finish()
        run.scheduler.drain_adapter(adapter_id)
        run.finish()

    assert run.drained == [1, 2, 3]
    for adapter_id in (1, 2, 3):
        for request_id, num_cached in ((10 * adapter_id, 0), (10 * adapter_id + 1, 16)):
            assert run.states[request_id].output_token_ids == oracle_tokens(adapter_id, prompt, 8, VOCAB)
            assert run.num_cached_tokens[request_id] == num_cached


# --- The adapter store ------------------------------------------------------------------------------------


def test_adapter_store_tells_contents_apart_by_path():
    store = OracleAdapterStore(num_bytes=7)

    first, again, other = store.read("a"), store.read("a", "name"), store.read("b")

    assert first.content_digest == again.content_digest != other.content_digest
    assert first.num_bytes == 7


def test_adapter_store_refuses_unknown_and_repeated_generations():
    store = OracleAdapterStore()
    store.add(1, store.read("a"))

    with pytest.raises(InternalError, match="never reused"):
        store.add(1, store.read("a"))
    with pytest.raises(AdapterNotFoundError):
        store.remove(2)


def test_adapter_store_refuses_moves_that_do_not_fit_where_an_adapter_is():
    store = OracleAdapterStore()
    store.add(1, store.read("a"))
    store.load(1, 4)
    assert (store.adapter_in(4), store.num_device_bytes) == (1, 1024)
    assert [(entry.adapter_id, entry.adapter_slot) for entry in store.snapshot()] == [(1, 4)]
    for action in (
        lambda: store.load(1, 5),
        lambda: store.load(2, 4),
        lambda: store.evict(2),
        lambda: store.remove(1),
    ):
        with pytest.raises(InternalError):
            action()
    store.evict(1)
    assert (store.adapter_in(4), store.num_device_bytes, 1 in store) == (None, 0, True)


def test_adapter_store_reads_again_what_was_lost_before_a_plan_may_load_it():
    store, line = OracleAdapterStore(), Line(1, 2)
    store.is_read = {1}.__contains__
    for adapter_id in (1, 2, 3):
        store.add(adapter_id, store.read("a"))
        store.lose(adapter_id)
    assert store.poll(Line(1)) == HostNews(arrived=[1], evicted=[1, 2, 3])
    assert store.poll(line) == HostNews()
    assert [store.is_on_host(adapter_id) for adapter_id in (1, 2, 3)] == [True, False, False]
    store.prepare_loads([1])
    with pytest.raises(InternalError, match=r"generations \[2\], which are not on the host"):
        store.prepare_loads([1, 2])
    store.is_read = {2}.__contains__
    assert store.poll(line) == HostNews(arrived=[2])
    store.prepare_loads([2])
