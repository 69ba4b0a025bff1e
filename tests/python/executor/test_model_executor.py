from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.executor.executor import Executor
from lora_serve.executor.kv_tensors import page_num_bytes
from lora_serve.executor.transfer_orders import LOAD_BACK, WRITE_BACK
from lora_serve.testing.adapters import make_random_adapter, read_adapter_config, read_adapter_tensors
from lora_serve.testing.models import make_random_model

from .executors import make_executor
from .hand_made_run import HandMadeRun
from .plans import PlanStandIn
from .run_plan import run_plan
from .scheduler_run import SchedulerRun
from .states import make_state

VOCAB = 256
PAGE_SIZE = 4
GIB = 2**30
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, "Qwen3ForCausalLM", vocab_size=VOCAB, eos_token_id=[7, 9])
    return str(path)


class Reference:
    """The model by transformers: one request at a time, no KV cache, adapters merged into the weights."""

    def __init__(self, model_path: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        self._known: dict[tuple, list[int]] = {}

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_output: int, adapter: Path | None = None) -> list[int]:
        key = (tuple(prompt), num_output, adapter)
        if key not in self._known:
            self._merge(adapter, 1.0)
            tokens = list(prompt)
            for _ in range(num_output):
                tokens.append(int(self._model(torch.tensor([tokens])).logits[0, -1].argmax()))
            self._merge(adapter, -1.0)
            self._known[key] = tokens[len(prompt) :]
        return self._known[key]

    def _merge(self, adapter: Path | None, sign: float) -> None:
        if adapter is None:
            return
        config, tensors = read_adapter_config(adapter), read_adapter_tensors(adapter)
        for key, a in tensors.items():
            if "lora_A" in key:
                b = tensors[key.replace("lora_A", "lora_B")]
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                delta = sign * config["lora_alpha"] / config["r"] * (b @ a)
                self._model.get_submodule(module).weight += delta


@pytest.fixture(scope="module")
def reference(model_path) -> Reference:
    return Reference(model_path)


@pytest.fixture(autouse=True, params=["cpu", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def executor_kind(request, monkeypatch) -> str:
    """Which executor `_executor` makes."""
    monkeypatch.setattr(f"{__name__}._executor_kind", request.param)
    return request.param


_executor_kind = ""


def _executor(model_path: str, **fields) -> Executor:
    defaults = {"page_size": PAGE_SIZE, "num_device_pages": 64, "max_num_seqs": 8, "max_model_len": 64}
    defaults |= {"lora_memory_gb": 2**-7, "lora_host_memory_gb": 2**-7}
    device = "cuda" if _executor_kind == "cuda" else "cpu"
    config = {"device": device, "attention_backend": "torch", **defaults, **fields}
    return make_executor(_executor_kind, EngineConfig(model=model_path, **config))


def _wait_for_copies() -> None:
    """Of plans that were submitted; a plan without rows may be over before its copies on a busy GPU."""
    if _executor_kind == "cuda":
        torch.cuda.synchronize()


def _run(executor: Executor, **options) -> SchedulerRun:
    defaults = {"page_size": PAGE_SIZE, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_loras": 2}
    return SchedulerRun(executor, **{**defaults, **options})


def _prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def _greedy(prompt: list[int], **params):
    return make_state(prompt, vocab_size=VOCAB, temperature=0.0, **params)


@pytest.fixture
def make_adapter(model_path, tmp_path):
    """Writes adapters with an effect as large as the model's own."""

    def make(seed: int, lora_rank: int, modules: tuple[str, ...]) -> Path:
        path = tmp_path / f"{seed}-{lora_rank}"
        options = {"rank": lora_rank, "target_modules": modules, "seed": seed, "scale": 1.5}
        return make_random_adapter(path, model_path, **options)

    return make


def _poll_until(executor: Executor, condition: Callable[[], bool]) -> None:
    """Poll as the engine does, so that who waits for host memory gets it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        executor.lora.poll()
        time.sleep(0.0005)


def _wait_for_reads(executor: Executor) -> None:
    """Until no read goes on but those that wait for room, so that who runs beside whom is not up to them."""
    lora, deadline = executor.lora, time.monotonic() + TIMEOUT_S
    while not lora._pool.has_waiters and not all(read.future.done() for read in lora._host._reads.values()):
        assert time.monotonic() < deadline, "a read does not end"
        time.sleep(0.0005)


def _add(executor: Executor, adapter_id: int, path: Path) -> int:
    """Read and add an adapter; gives its bytes."""
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(executor.lora.read, str(path))
        _poll_until(executor, read.done)
        with read.result() as adapter:
            executor.lora.add(adapter_id, adapter)
            return adapter.num_bytes


def test_the_last_layer_goes_on_with_rows_that_sample_unless_prompts_want_log_probabilities(
    model_path, monkeypatch
) -> None:
    executor = _executor(model_path)
    outputs = []
    forward = executor._model.forward
    monkeypatch.setattr(
        executor._model,
        "forward",
        lambda ids, ctx, *rest: (
            outputs.append(ctx.outputs and ctx.outputs.tokens.tolist()) or forward(ids, ctx, *rest)
        ),
    )
    try:
        run = _run(executor, max_num_batched_tokens=8)
        run.add(1, _greedy(_prompt(12)), max_tokens=2)
        run.finish()
        run.add(2, _greedy(_prompt(6), prompt_logprobs=0), max_tokens=1)
        run.finish()
    finally:
        executor.close()

    # Chunks of 8 and 4 tokens, a decode that may have been replayed, and the prompt of the other request.
    assert [*outputs[:2], outputs[-1]] == [[], [3], None]


# --- With the real scheduler, against transformers ----------------------------------------------------------


@pytest.mark.parametrize(
    ("num_pages", "chunk"),
    [(64, 64), (64, 9), (16, 16), (16, 8)],
    ids=["whole prompts", "chunks", "preemption", "preemption and chunks"],
)
def test_greedy_tokens_equal_transformers(model_path, reference, num_pages, chunk):
    run = _run(_executor(model_path, num_device_pages=num_pages), max_num_batched_tokens=chunk)
    prompts = [_prompt(length, seed=length) for length in (1, 3, 4, 11, 21, 30)]

    for request_id, prompt in enumerate(prompts):
        run.add(request_id, _greedy(prompt), max_tokens=16)
        run.step()
    run.finish()

    for request_id, prompt in enumerate(prompts):
        assert run.states[request_id].output_token_ids == reference.greedy(prompt, 16)
    assert (run.scheduler.stats().total_preemptions > 0) == (num_pages == 16)


def test_prefix_hits_do_not_change_tokens(model_path, reference):
    run = _run(_executor(model_path))
    head = _prompt(18)
    prompts = [head, head, head[:16], [*head[:10], 5, 6, 7], [*head, *_prompt(9, seed=1)]]

    for request_id, prompt in enumerate(prompts):
        run.add(request_id, _greedy(prompt), max_tokens=8)
        run.finish()

    assert [run.num_cached_tokens[i] for i in range(5)] == [0, 16, 12, 8, 16]
    for request_id, prompt in enumerate(prompts):
        assert run.states[request_id].output_token_ids == reference.greedy(prompt, 8)


@pytest.mark.parametrize("num_host_adapters", [9, 1])
def test_adapters_and_base_mixed_in_a_step_equal_transformers_with_merged_weights(
    model_path, reference, make_adapter, num_host_adapters
):
    """Also with host memory for one of them, where each is read again whenever it comes back."""
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapters: dict[int, Path | None] = {
        0: None,
        1: make_adapter(1, 3, ("q_proj", "o_proj")),
        2: make_adapter(2, 8, linear),
        3: make_adapter(3, 1, ("down_proj", "gate_proj")),
    }
    largest = _add(_executor(model_path), 1, adapters[2])
    executor = _executor(
        model_path, num_device_pages=24, lora_host_memory_gb=num_host_adapters * largest / GIB
    )
    run = _run(executor, max_num_batched_tokens=10)
    for adapter_id in (1, 2, 3):
        _add(executor, adapter_id, adapters[adapter_id])
    for adapter_id in (1, 2, 3):
        run.scheduler.open_adapter(
            adapter_id=adapter_id,
            digest_seed=adapter_id,
            size_bytes=1,
            is_staged=executor.lora.is_on_host(adapter_id),
        )
    mixes = set()
    run.before_poll = lambda: _wait_for_reads(executor)
    run.on_plan = lambda plan: mixes.add(len(set(plan.adapter_slots.tolist())))
    prompts = [_prompt(13), _prompt(14, seed=5)]

    wanted = list(itertools.product(prompts, adapters))
    for request_id, (prompt, adapter_id) in enumerate(wanted):
        run.add(request_id, _greedy(prompt), 12, adapter_id)
    run.finish()

    assert max(mixes) == 3  # two adapters and the base in one step
    answers = set()
    for request_id, (prompt, adapter_id) in enumerate(wanted):
        expected = reference.greedy(prompt, 12, adapters[adapter_id])
        assert run.states[request_id].output_token_ids == expected, adapter_id
        answers.add(tuple(expected))
    assert len(answers) == len(wanted)
    assert any(entry.host.num_reads > 1 for entry in executor.lora.snapshot()) == (num_host_adapters == 1)
    executor.close()


def test_seeded_random_tokens_do_not_change_with_company_and_preemption(model_path, executor_kind):
    num_tokens = 10 if executor_kind == "interpreted" else 20
    params = {
        "temperature": 1.0,
        "min_p": 0.01,
        "seed": 5,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
    }
    prompt = _prompt(9)
    alone = _run(_executor(model_path))
    alone.add(0, make_state(prompt, vocab_size=VOCAB, **params), max_tokens=num_tokens)
    alone.finish()
    run = _run(_executor(model_path, num_device_pages=16), max_num_batched_tokens=11)
    preempted = set()
    run.on_plan = lambda plan: preempted.update(
        int(request_id)
        for request_id, computed in zip(plan.request_ids, plan.num_computed_tokens, strict=True)
        if computed < len(prompt) and run.states[int(request_id)].output_token_ids
    )

    for request_id in range(8):
        state = make_state(
            prompt, vocab_size=VOCAB, **{**params, "seed": 5 if request_id % 2 else request_id}
        )
        run.add(request_id, state, max_tokens=num_tokens)
    run.finish()

    outputs = [run.states[request_id].output_token_ids for request_id in range(8)]
    expected = alone.states[0].output_token_ids
    assert preempted & {1, 3, 5, 7}
    assert [outputs[i] for i in (1, 3, 5, 7)] == [expected] * 4
    assert len({tuple(output) for output in outputs}) == 5


# --- Adapters, by hand-made plans ---------------------------------------------------------------------------


def test_failed_load_is_reported_and_the_rest_of_the_plan_is_done(model_path, reference, make_adapter):
    large, adapter = make_adapter(4, 64, ("v_proj",)), make_adapter(1, 2, ("v_proj",))
    executor = _executor(model_path, lora_memory_gb=_add(_executor(model_path), 1, large) / 2 / GIB)
    _add(executor, 4, large)
    _add(executor, 5, adapter)
    run = HandMadeRun(executor, _greedy(_prompt(6)), [0, 1, 2])
    plan = dataclasses.replace(run.plan(6), loads=[(4, 1), (5, 0)])

    result = run_plan(executor, plan, [run.state])

    assert result.loaded_adapter_ids == [5]
    assert list(result.failed_adapter_ids) == [4]
    assert "bytes are to be placed in the arena" in result.failed_adapter_ids[4]
    assert run.state.output_token_ids == reference.greedy(_prompt(6), 1)
    other = HandMadeRun(executor, _greedy(_prompt(6)), [3, 4, 5], row=1, slot=0)
    other.finish([6], 3)
    assert other.state.output_token_ids == reference.greedy(_prompt(6), 3, adapter)


def test_adapter_on_the_host_serves_the_rows_of_the_plan_that_loads_it(model_path, reference, make_adapter):
    executor = _executor(model_path)
    adapter = make_adapter(1, 4, ("v_proj", "down_proj"))
    _add(executor, 1, adapter)
    run = HandMadeRun(executor, _greedy(_prompt(6)), [0, 1, 2], slot=2)
    plan = dataclasses.replace(run.plan(6), loads=[(1, 2)])

    result = run_plan(executor, plan, [run.state])

    assert (result.loaded_adapter_ids, result.failed_adapter_ids, result.row_errors) == ([1], {}, {})
    assert run.state.output_token_ids == reference.greedy(_prompt(6), 1, adapter)
    assert reference.greedy(_prompt(6), 1, adapter) != reference.greedy(_prompt(6), 1)


def test_drained_adapter_is_gone_before_its_slot_is_loaded(model_path, reference, make_adapter):
    executor = _executor(model_path)
    second = make_adapter(2, 2, ("q_proj",))
    _add(executor, 1, make_adapter(1, 2, ("v_proj", "down_proj")))
    _add(executor, 2, second)
    run_plan(executor, PlanStandIn(loads=[(1, 0)]), [])

    result = run_plan(executor, PlanStandIn(plan_id=2, drained=[1, 99], loads=[(2, 0)]), [])

    assert (result.plan_id, result.loaded_adapter_ids, result.failed_adapter_ids) == (2, [2], {})
    assert result.sampled_token_ids.shape == (0,)
    assert [entry.adapter_slot for entry in executor.lora.snapshot()] == [-1, 0]
    executor.lora.remove(1)
    assert [entry.adapter_id for entry in executor.lora.snapshot()] == [2]
    run = HandMadeRun(executor, _greedy(_prompt(6)), [3, 4, 5], slot=0)
    run.finish([6], 3)
    assert run.state.output_token_ids == reference.greedy(_prompt(6), 3, second)


def test_evicted_adapter_is_off_the_device_and_comes_back_into_another_slot(
    model_path, reference, make_adapter
):
    executor = _executor(model_path)
    adapter = make_adapter(1, 2, ("v_proj", "down_proj"))
    _add(executor, 1, adapter)
    run_plan(executor, PlanStandIn(loads=[(1, 0)]))
    first = HandMadeRun(executor, _greedy(_prompt(6)), [0, 1, 2], slot=0)
    first.finish([6], 3)

    run_plan(executor, PlanStandIn(evicted=[1]))
    slots = [entry.adapter_slot for entry in executor.lora.snapshot()]
    run_plan(executor, PlanStandIn(loads=[(1, 2)]))
    second = HandMadeRun(executor, _greedy(_prompt(6)), [3, 4, 5], row=1, slot=2)
    second.finish([6], 3)

    assert slots == [-1]
    assert first.state.output_token_ids == second.state.output_token_ids
    assert second.state.output_token_ids == reference.greedy(_prompt(6), 3, adapter)
    with pytest.raises(InternalError, match="evicted but is in no slot"):
        run_plan(executor, PlanStandIn(evicted=[1, 1]))


def test_evicted_slot_serves_nothing(model_path, make_adapter, executor_kind):
    executor = _executor(model_path)
    _add(executor, 1, make_adapter(1, 2, ("v_proj",)))
    run_plan(executor, PlanStandIn(loads=[(1, 0)]))
    run_plan(executor, PlanStandIn(evicted=[1]))
    run = HandMadeRun(executor, _greedy(_prompt(6)), [0, 1], slot=0)
    if executor_kind == "cuda":  # A kernel cannot raise: it makes the row's logits NaN.
        assert "not finite" in run.step(6).row_errors[0]
    else:
        with pytest.raises(LookupError, match="adapter slot 0 holds no adapter"):
            run.step(6)
    assert run.state.output_token_ids == []


def test_slot_and_bytes_of_an_evicted_adapter_are_taken_in_the_same_plan(model_path, reference, make_adapter):
    first, second = make_adapter(1, 3, ("v_proj", "down_proj")), make_adapter(2, 3, ("v_proj", "down_proj"))
    executor = _executor(model_path, lora_memory_gb=_add(_executor(model_path), 1, first) / GIB)
    _add(executor, 1, first)
    _add(executor, 2, second)
    run_plan(executor, PlanStandIn(loads=[(1, 0)]))

    result = run_plan(executor, PlanStandIn(evicted=[1], loads=[(2, 0)]))

    run = HandMadeRun(executor, _greedy(_prompt(6)), [0, 1, 2], slot=0)
    run.finish([6], 3)
    assert result.loaded_adapter_ids == [2]
    assert [entry.adapter_slot for entry in executor.lora.snapshot()] == [-1, 0]
    assert run.state.output_token_ids == reference.greedy(_prompt(6), 3, second)


def test_rows_of_an_adapter_whose_load_fails_in_their_plan_fail_alone(model_path, reference, make_adapter):
    """Also in the plan after it, which was made before anybody knew."""
    large = make_adapter(9, 64, ("v_proj",))
    executor = _executor(model_path, lora_memory_gb=_add(_executor(model_path), 1, large) / 2 / GIB)
    _add(executor, 9, large)
    states = [_greedy(_prompt(6)), _greedy(_prompt(6, seed=1))]
    victim, other = (
        HandMadeRun(executor, state, [4 * i, 4 * i + 1], row=i, slot=slot)
        for i, (state, slot) in enumerate(zip(states, (0, -1), strict=True))
    )
    one, two = victim.plan(6), other.plan(6)
    plan = dataclasses.replace(
        one,
        rows=[*one.rows, *two.rows],
        tokens=[*one.tokens, *two.tokens],
        deltas=[*one.deltas, *two.deltas],
        loads=[(9, 0)],
    )
    executor.lora.prepare_loads([9])
    executor.submit(plan, states)
    rows = [{"page_table_row": i, "num_computed_tokens": 6, "adapter_slot": -i} for i in range(2)]
    executor.submit(PlanStandIn(plan_id=2, rows=rows, tokens=[-1, -1]), states)
    first, second = executor.collect(), executor.collect()
    run_plan(executor, PlanStandIn(plan_id=3, evicted=[9]))  # Nobody knew when it was made, either.

    assert list(first.failed_adapter_ids) == [9]
    assert list(first.row_errors) == list(second.row_errors) == [0]
    assert "could not be brought to the device" in second.row_errors[0]
    assert states[0].output_token_ids == []
    assert states[1].output_token_ids == reference.greedy(_prompt(6, seed=1), 2)


# --- Overlap ------------------------------------------------------------------------------------------------


def _decode_of_unknown(run: HandMadeRun, **fields) -> PlanStandIn:
    """The decode step after the newest plan of the run, made before that plan has run."""
    row = {"page_table_row": run.row, "num_computed_tokens": run.computed, "adapter_slot": run.slot}
    return PlanStandIn(plan_id=50 + run.computed, rows=[row], tokens=[-1], **fields)


def test_plan_made_before_its_input_token_is_known_reads_it_from_the_row(model_path, reference):
    executor = _executor(model_path)
    run = HandMadeRun(executor, _greedy(_prompt(9)), [0, 1, 2, 3], row=5)
    executor.submit(run.plan(9), [run.state])
    run.computed = 9
    results = []
    for _ in range(6):
        executor.submit(_decode_of_unknown(run), [run.state])
        run.computed += 1
        results.append(executor.collect())
    results.append(executor.collect())

    expected = reference.greedy(_prompt(9), 7)
    assert run.state.output_token_ids == expected
    assert [int(result.sampled_token_ids[0]) for result in results] == expected


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize(("num_pages", "chunk"), [(64, 64), (64, 9), (16, 16)])
def test_penalties_and_seeds_see_the_token_of_the_plan_before(
    model_path, executor_kind, num_pages, chunk, max_in_flight
):
    num_tokens = 18
    if executor_kind == "interpreted":
        if max_in_flight == 1 or chunk == 64:
            pytest.skip("the interpreter is slow; the other cases have all that this one has")
        num_tokens = 9
    params = [
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4},
        {"temperature": 1.1, "min_p": 0.02, "seed": 7, "repetition_penalty": 1.2},
        {"temperature": 0.8, "min_p": 0.01, "seed": 8, "min_tokens": 6, "stop_token_ids": [3], "logprobs": 2},
    ]
    tokens = {}
    for in_flight in {1, max_in_flight}:
        executor = _executor(model_path, num_device_pages=num_pages)
        run = _run(executor, max_num_batched_tokens=chunk, max_in_flight=in_flight)
        for request_id in range(6):
            state = make_state(
                _prompt(7 + request_id, request_id), vocab_size=VOCAB, **params[request_id % 3]
            )
            run.add(request_id, state, max_tokens=num_tokens)
            run.step()
        run.finish()
        tokens[in_flight] = [run.states[request_id].output_token_ids for request_id in range(6)]
        executor.close()
    assert tokens[1] == tokens[max_in_flight]
    assert all(len(output) == num_tokens for output in tokens[1])


def test_row_that_failed_fails_in_the_plan_that_waits_for_its_token_too(model_path, reference):
    executor = _executor(model_path)
    states = [_greedy(_prompt(6, seed=seed)) for seed in range(2)]
    runs = [
        HandMadeRun(executor, state, [4 * i, 4 * i + 1, 4 * i + 2], row=i) for i, state in enumerate(states)
    ]
    for run in runs:
        run.step(6)
    executor._kv_layers[0].v[4] = torch.nan

    def plan_of(rows_of, tokens):
        return PlanStandIn(rows=[row for plan in rows_of for row in plan.rows], tokens=tokens)

    known = [run.plan(1) for run in runs]
    executor.submit(plan_of(known, [token for plan in known for token in plan.tokens]), states)
    for run in runs:
        run.computed += 1
    executor.submit(plan_of([_decode_of_unknown(run) for run in runs], [-1, -1]), states)
    first, second = executor.collect(), executor.collect()

    assert list(first.row_errors) == list(second.row_errors) == [1]
    assert "not finite" in first.row_errors[1]
    assert "no token to go on from" in second.row_errors[1]
    assert second.sampled_token_ids[1] == -1
    assert states[0].output_token_ids == reference.greedy(_prompt(6), 3)
    assert len(states[1].output_token_ids) == 1


def test_report_between_plans_is_empty_and_takes_nothing_from_a_plan_on_its_way(model_path):
    executor = _executor_with_host_tier(model_path, 4)
    executor.submit(PlanStandIn(transfers=[(3, WRITE_BACK, [5], [0])]), [])
    _wait_for_copies()
    early = executor.report()
    result = executor.collect()
    late = executor.report()

    assert (early.plan_id, early.completed_transfer_ids, late.completed_transfer_ids) == (-1, [], [])
    assert result.completed_transfer_ids == [3]


# --- Copies between the tiers -------------------------------------------------------------------------------


def _executor_with_host_tier(model_path: str, num_host_pages: int, **fields) -> Executor:
    page_gb = page_num_bytes(_executor(model_path).model_config, PAGE_SIZE) / 2**30
    return _executor(model_path, kv_host_memory_gb=num_host_pages * page_gb, **fields)


def test_request_goes_on_elsewhere_from_pages_that_were_on_the_host(model_path, reference):
    executor = _executor_with_host_tier(model_path, 9)
    run = HandMadeRun(executor, _greedy(_prompt(10)), [0, 1, 2, 3])
    run.finish([10], 4)  # The KV of 13 tokens: three full pages and a rest.

    executor.submit(PlanStandIn(plan_id=90, transfers=[(5, WRITE_BACK, [0, 1, 2], [7, 2, 4])]), [])
    _wait_for_copies()
    written = executor.collect()
    HandMadeRun(executor, _greedy(_prompt(15, seed=3)), [0, 1, 2, 3], row=1).finish([15], 1)
    run.preempt([9, 0, 8, 20, 21], num_kept=12)
    plan = dataclasses.replace(run.plan(2), transfers=[(6, LOAD_BACK, [7, 2, 4], [9, 0, 8])])
    loaded = run_plan(executor, plan, [run.state])  # The plan's rows read what its copies have brought.

    assert (written.completed_transfer_ids, written.failed_transfer_ids) == ([5], {})
    assert written.sampled_token_ids.shape == (0,)
    assert loaded.completed_transfer_ids == [6]
    assert run.state.output_token_ids == reference.greedy(_prompt(10), 5)


def test_failed_copy_leaves_the_rows_of_its_plan_alone(model_path, reference, monkeypatch):
    executor = _executor_with_host_tier(model_path, 4)

    def fail(transfer):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(executor._transfers._copies, "_submit", fail)
    run = HandMadeRun(executor, _greedy(_prompt(6)), [0, 1, 2])
    plan = dataclasses.replace(run.plan(6), transfers=[(0, WRITE_BACK, [5], [0])])

    result = run_plan(executor, plan, [run.state])

    assert result.completed_transfer_ids == []
    assert result.failed_transfer_ids == {0: "RuntimeError: no such luck"}
    assert run.state.output_token_ids == reference.greedy(_prompt(6), 1)


def test_copy_without_a_host_tier_is_an_internal_error(model_path):
    executor = _executor(model_path)

    assert executor.num_host_pages == 0
    with pytest.raises(InternalError, match=r"destination pages 0 to 0 .* in \[0, 0\)"):
        run_plan(executor, PlanStandIn(transfers=[(0, WRITE_BACK, [0], [0])]), [])


# --- Rows -------------------------------------------------------------------------------------------------


def test_logits_of_a_row_are_of_its_own_adapter_behind_a_row_that_does_not_sample(
    model_path, reference, make_adapter
):
    executor = _executor(model_path)
    adapters = [make_adapter(seed, 3, ("lm_head",)) for seed in (1, 2)]
    for adapter_id, adapter in enumerate(adapters, 1):
        _add(executor, adapter_id, adapter)
    states = [_greedy(_prompt(6)), _greedy(_prompt(6))]
    first, second = (
        HandMadeRun(executor, state, [4 * slot, 4 * slot + 1], row=slot, slot=slot)
        for slot, state in enumerate(states)
    )
    one, two = first.plan(3), second.plan(6)
    plan = dataclasses.replace(
        one,
        rows=[*one.rows, *two.rows],
        tokens=[*one.tokens, *two.tokens],
        deltas=[*one.deltas, *two.deltas],
        loads=[(1, 0), (2, 1)],
    )

    run_plan(executor, plan, states)

    assert [state.output_token_ids for state in states] == [[], reference.greedy(_prompt(6), 1, adapters[1])]
    assert reference.greedy(_prompt(6), 1, adapters[0]) != reference.greedy(_prompt(6), 1, adapters[1])


def test_row_with_nan_fails_alone(model_path, reference):
    executor = _executor(model_path)
    states = [_greedy(_prompt(6, seed=seed)) for seed in range(3)]
    runs = [HandMadeRun(executor, state, [4 * i, 4 * i + 1], row=i) for i, state in enumerate(states)]
    for run in runs:
        run.step(6)
    executor._kv_layers[0].v[4] = torch.nan
    plans = [run.plan(1) for run in runs]

    result = run_plan(
        executor,
        PlanStandIn(
            plan_id=9,
            rows=[row for plan in plans for row in plan.rows],
            tokens=[token for plan in plans for token in plan.tokens],
        ),
        states,
    )

    assert list(result.row_errors) == [1]
    assert "not finite" in result.row_errors[1]
    assert [len(state.output_token_ids) for state in states] == [2, 1, 2]
    assert result.sampled_token_ids[1] == -1
    for row in (0, 2):
        assert states[row].output_token_ids == reference.greedy(_prompt(6, seed=row), 2)
        assert result.sampled_token_ids[row] == states[row].output_token_ids[-1]


def test_logits_are_computed_only_for_rows_that_sample(model_path, monkeypatch):
    executor = _executor(model_path)
    num_rows = []

    def count_rows(name):
        compute = getattr(executor._model, name)

        def counted(hidden, *lora, **options):
            num_rows.append(len(hidden))
            return compute(hidden, *lora, **options)

        monkeypatch.setattr(executor._model, name, counted)

    count_rows("compute_logits")
    count_rows("compute_base_logits")

    run = HandMadeRun(executor, _greedy(_prompt(10), logprobs=1), [0, 1, 2])
    results = run.finish([4, 6], 2)

    assert num_rows == [1, 1]
    assert [result.sampled_token_ids.tolist() for result in results] == [
        [-1],
        [run.state.output_token_ids[0]],
        [run.state.output_token_ids[1]],
    ]
    assert [result.logprobs[0] is None for result in results] == [True, False, False]
    assert results[2].logprobs[0].token_id == run.state.output_token_ids[1]


def test_plan_that_does_not_fit_its_states_breaks_the_executor_for_good(model_path):
    executor = _executor(model_path)
    run = HandMadeRun(executor, _greedy(_prompt(4)), [0, 1])
    good = run.plan(4)

    executor.submit(run.plan(4), [])
    executor.submit(good, [run.state])

    for _ in range(2):
        with pytest.raises(InternalError, match="1 rows but came with 0 states"):
            executor.collect()
    assert run.state.output_token_ids == []


def test_token_of_another_position_is_an_internal_error(model_path):
    executor = _executor(model_path)
    run = HandMadeRun(executor, _greedy(_prompt(4)), [0, 1])
    run.step(4)
    run.state.append_output(3, 5)
    with pytest.raises(InternalError, match="next position is 6"):
        run_plan(
            executor,
            PlanStandIn(rows=[{"num_computed_tokens": 4}], tokens=[1], deltas=[(0, 0, [0, 1])]),
            [run.state],
        )


# --- Sizes ------------------------------------------------------------------------------------------------


def test_sizes_come_from_configuration_and_model(model_path):
    executor = _executor_with_host_tier(model_path, 23, num_device_pages=10, max_model_len=None)

    assert executor.num_device_pages == 10
    assert executor.num_host_pages == 23
    assert executor.max_model_len == 40
    assert executor.vocab_size == VOCAB
    assert executor.eos_token_ids == (7, 9)
    executor.close()
    executor.close()


def test_max_model_len_beyond_the_pages_is_refused_with_numbers(model_path):
    with pytest.raises(InvalidArgumentError, match=r"max_model_len is 64 .* 10 KV pages of 4 tokens hold 40"):
        _executor(model_path, num_device_pages=10)
