"""What is true of `CudaExecutor` alone; what all executors do is in test_model_executor.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.executor.cuda_executor import CudaExecutor
from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.prefill_graphs import PrefillGraphs
from lora_serve.kernels import build_lora_metadata
from lora_serve.layers import flashinfer_attention_split
from lora_serve.testing.adapters import make_random_adapter
from lora_serve.testing.models import make_random_model
from support.device_waits import device_waits_are_errors

from .executors import make_executor
from .hand_made_run import HandMadeRun
from .plans import PlanStandIn
from .run_plan import run_plan
from .states import make_state

VOCAB = 256
PAGE_SIZE = 4
PROMPT = list(range(3, 23))
GIB = 2**30


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, "Qwen3ForCausalLM", vocab_size=VOCAB)
    return str(path)


def make(model_path: str, kind: str = "cuda", **fields) -> CudaExecutor:
    of_kind = {
        "cuda": {"device": "cuda", "attention_backend": "flashinfer", "dtype": "bfloat16"},
        "interpreted": {"device": "cpu", "attention_backend": "torch"},
    }[kind]
    options = {"page_size": PAGE_SIZE, "num_device_pages": 64, "max_num_seqs": 8, "max_model_len": 64}
    options |= {"max_loras": PlanStandIn.max_loras, "lora_memory_gb": 2**-7, "lora_host_memory_gb": 2**-7}
    options |= {**of_kind, **fields}
    return make_executor(kind, EngineConfig(model=model_path, **options))


def greedy(**params):
    return make_state(PROMPT, vocab_size=VOCAB, temperature=0.0, **params)


def first_pages(num_pages: int = 9) -> list[int]:
    return list(range(num_pages))


def test_all_steps_leave_their_logits_in_one_place(model_path, monkeypatch):
    executor = make(model_path, "interpreted")
    compute, places = executor._model.compute_base_logits, []

    def noted(hidden, out=None):
        places.append((out.data_ptr(), len(out)))
        return compute(hidden, out)

    monkeypatch.setattr(executor._model, "compute_base_logits", noted)
    run = HandMadeRun(executor, greedy(), first_pages())
    run.finish([len(PROMPT)], 2)
    other = HandMadeRun(executor, greedy(), [20, 21, 22, 23, 24, 25], row=1)
    plans = [other.plan(len(PROMPT)), run.plan(1)]
    both = PlanStandIn(
        plan_id=9,
        rows=[row for plan in plans for row in plan.rows],
        tokens=[token for plan in plans for token in plan.tokens],
        deltas=[delta for plan in plans for delta in plan.deltas],
    )
    run_plan(executor, both, [other.state, run.state])

    assert [num_rows for _, num_rows in places] == [1, 1, 2]
    assert len({place for place, _ in places}) == 1
    assert other.state.output_token_ids == run.state.output_token_ids[:1]
    executor.close()


def test_rows_that_sample_are_grouped_by_adapter_slot(model_path):
    executor = make(model_path, "interpreted", max_loras=3)
    plan = SimpleNamespace(adapter_slots=np.array([1, -1, 0, 1, -1], dtype=np.int32))
    step = SimpleNamespace(host_sampled_rows=np.array([0, 2, 3, 4]))

    found = vars(executor._lora_of_rows(plan, step))

    expected = vars(build_lora_metadata(torch.tensor([1, 0, 1, -1]), 3))
    assert not found.pop("no_adapter")
    assert not expected.pop("no_adapter")
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in expected.items()
    }
    executor.close()


def top_of(entry: TokenLogprobs) -> dict[int, float]:
    return dict(zip(entry.top_token_ids.tolist(), entry.top_logprobs.tolist(), strict=True))


@pytest.mark.gpu
def test_rows_that_grow_long_are_replayed_with_splits(model_path, monkeypatch):
    monkeypatch.setattr(flashinfer_attention_split, "ALWAYS_UNSPLIT_TOKENS", len(PROMPT) + 5)
    runs, ways = [], []
    for options in ({"enforce_eager": True}, {"cuda_graph_sizes": [1, 8]}):
        executor = make(model_path, **options)
        if executor.graphs is not None:
            for i, state in enumerate(executor.graphs._attention[1]):
                plan = state.plan
                monkeypatch.setattr(state, "plan", lambda step, i=i, plan=plan: (ways.append(i), plan(step)))
        run = HandMadeRun(executor, greedy(logprobs=5), first_pages())
        results = run.finish([len(PROMPT)], 12)
        runs.append((run.state.output_token_ids, [result.logprobs[0] for result in results]))
        executor.close()

    # Of 21 to 25 tokens the first way, then the second.
    assert ways == [0] * 5 + [1] * 6
    (eager, eager_entries), (graphs, entries) = runs
    for token, other, entry, other_entry in zip(graphs, eager, entries, eager_entries, strict=True):
        # Up to here both have read the same tokens. Another token may only be one that is as good as equal.
        assert top_of(entry)[other] == pytest.approx(other_entry.logprob, abs=0.1)
        assert top_of(other_entry)[token] == pytest.approx(entry.logprob, abs=0.1)
        if token != other:
            break


def prompt_logprobs_of_all_slots(executor: CudaExecutor, adapters: list[str]) -> dict[str, list[float]]:
    """Of PROMPT without an adapter and with each: in chunks, then all in one step beside a decode."""
    with ThreadPoolExecutor(1) as thread:
        for index, adapter in enumerate(adapters):
            with thread.submit(executor.lora.read, adapter).result() as read:
                executor.lora.add(index + 1, read)
    slots = range(len(adapters))
    run_plan(executor, PlanStandIn(plan_id=90, loads=[(slot + 1, slot) for slot in slots]), [])
    # A longer step of other tokens and adapters is what the padded tokens have left.
    longer = make_state(list(range(200, 240)), vocab_size=VOCAB, temperature=0.0)
    decode = HandMadeRun(executor, longer, list(range(30, 42)), row=3, slot=slots[-1])
    decode.finish([40], 1)
    found = {}
    for slot in (-1, *slots):
        state = greedy(prompt_logprobs=0)
        HandMadeRun(executor, state, first_pages(), slot=slot).finish([11, 3, 6], 1)
        found[f"chunks of slot {slot}"] = state
    runs = {
        f"slot {slot} among others": HandMadeRun(
            executor, greedy(prompt_logprobs=0), list(range(6 * row, 6 * row + 6)), row=row, slot=slot
        )
        for row, slot in enumerate((0, -1, 1))
    }
    plans = [decode.plan(1), *(run.plan(len(PROMPT)) for run in runs.values())]
    together = PlanStandIn(
        plan_id=91,
        rows=[row for plan in plans for row in plan.rows],
        tokens=[token for plan in plans for token in plan.tokens],
        deltas=[delta for plan in plans for delta in plan.deltas],
    )
    run_plan(executor, together, [decode.state, *(run.state for run in runs.values())])
    found |= {name: run.state for name, run in runs.items()}
    return {name: [entry.logprob for entry in state.prompt_logprobs[1:]] for name, state in found.items()}


@pytest.fixture(scope="module")
def two_adapters(model_path, tmp_path_factory) -> list[str]:
    folders = [tmp_path_factory.mktemp(f"adapter{seed}") for seed in (1, 2)]
    for seed, folder in enumerate(folders):
        make_random_adapter(folder, model_path, rank=(8, 3)[seed], seed=seed, scale=0.8)
    return [str(folder) for folder in folders]


def check_that_slots_differ(logprobs: dict[str, list[float]]) -> None:
    for slot, other in ((-1, 0), (-1, 1), (0, 1)):
        ours, others = (np.array(logprobs[f"chunks of slot {each}"]) for each in (slot, other))
        assert np.abs(ours - others).max() > 0.2


def test_rows_of_several_adapters_in_one_step_are_those_of_each_alone(model_path, two_adapters):
    executor = make(model_path, "interpreted")
    found = prompt_logprobs_of_all_slots(executor, two_adapters)
    executor.close()

    check_that_slots_differ(found)
    for slot in (-1, 0, 1):
        assert found[f"slot {slot} among others"] == pytest.approx(found[f"chunks of slot {slot}"], abs=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8, 32, 64, 160, 640])
def test_prefill_from_graphs_is_that_of_eager_steps(model_path, two_adapters, size, monkeypatch):
    runs = []
    run = PrefillGraphs.run
    monkeypatch.setattr(PrefillGraphs, "run", lambda self, *step: (runs.append(self), run(self, *step))[1])
    found = []
    for options in ({"enforce_eager": True}, {"cuda_graph_sizes": [8], "prefill_graph_sizes": [size]}):
        executor = make(model_path, **options)
        found.append(prompt_logprobs_of_all_slots(executor, two_adapters))
        assert (len(runs) >= 6) == (executor.prefill_graphs is not None)
        executor.close()

    eager, from_graphs = found
    check_that_slots_differ(from_graphs)
    # A padded step rounds in other places. The last place of a logit of bf16 is 2**-8 of its size or more, so
    # this is at most four of them where tokens are unlikely, and 0.1 where that is less.
    for name, logprobs in eager.items():
        assert from_graphs[name] == pytest.approx(logprobs, abs=0.1, rel=2**-6), name


@pytest.mark.gpu
def test_graphs_and_buffers_stay_within_the_share_of_the_device(model_path):
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = total - free + 2 * GIB
    executor = make(
        model_path,
        num_device_pages=None,
        gpu_memory_utilization=share / total,
        max_num_seqs=128,
        max_num_batched_tokens=512,
    )
    HandMadeRun(executor, greedy(), first_pages()).finish([len(PROMPT)], 3)

    free, _ = torch.cuda.mem_get_info()

    assert executor.graphs is not None
    assert share - GIB < total - free < share + 2**26
    executor.close()


@pytest.mark.gpu
def test_steps_run_on_the_stream_of_the_executor_whatever_is_current(model_path):
    executor = make(model_path, cuda_graph_sizes=[1])
    HandMadeRun(executor, greedy(), first_pages(), row=1).finish([len(PROMPT)], 3)  # Compiles.
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(5_000_000_000)
        end = other.record_event()
        HandMadeRun(executor, greedy(), first_pages()).finish([len(PROMPT)], 3)
        executor.report()
        is_over = end.query()

    assert not is_over
    torch.cuda.synchronize()
    executor.close()


@pytest.mark.gpu
def test_submit_does_not_wait_for_logits_that_an_adapter_changes(model_path, tmp_path):
    executor = make(model_path, cuda_graph_sizes=[1])
    adapter = tmp_path / "adapter"
    make_random_adapter(adapter, model_path, rank=3, target_modules=("lm_head", "embed_tokens"), seed=1)
    with ThreadPoolExecutor(1) as thread, thread.submit(executor.lora.read, str(adapter)).result() as read:
        executor.lora.add(1, read)
    run_plan(executor, PlanStandIn(plan_id=90, loads=[(1, 0)]), [])
    run = HandMadeRun(executor, greedy(), first_pages(), slot=0)
    run.finish([len(PROMPT)], 5)
    plan = run.plan(1)
    torch.cuda.synchronize()

    with device_waits_are_errors():
        executor.submit(plan, [run.state])

    assert executor.collect().sampled_token_ids[0] >= 0
    executor.close()
