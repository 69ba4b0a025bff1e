"""Steps from "graphs" on a CPU: a replay does again what was captured, with a fake FlashInfer."""

from __future__ import annotations

import dataclasses
import gc
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.executor import cuda_setup, decode_graphs, prefill_graphs
from lora_serve.executor.cuda_executor import CudaExecutor
from lora_serve.executor.device_inputs import DeviceInputs
from lora_serve.kernels import LoRAMetadata, build_lora_metadata
from lora_serve.layers import attention as attention_module
from lora_serve.layers import flashinfer_attention, flashinfer_attention_split
from lora_serve.layers.attention import KVLayer
from lora_serve.layers.flashinfer_attention import FlashInferAttentionBackend
from lora_serve.layers.flashinfer_attention_staging import StagingRing
from lora_serve.testing.adapters import make_random_adapter
from lora_serve.testing.models import make_random_model
from support.fake_flashinfer import FakeFlashInfer

from .executors import set_up_cpu
from .hand_made_run import HandMadeRun
from .plans import PlanStandIn
from .run_plan import run_plan
from .scheduler_run import SchedulerRun
from .states import make_state

VOCAB = 64
PROMPT = list(range(3, 12))


class Graph:
    """Does what was captured again; nothing else may have changed than what lies on the "device"."""

    def __init__(self, run) -> None:
        self.run, self.result = run, run()
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        result = self.run()
        if isinstance(result, torch.Tensor) and result.data_ptr() != self.result.data_ptr():
            self.result.copy_(result)


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """All that were captured: 10 bytes of the device's memory each, and 90 more for the first."""
    captured: list[Graph] = []

    def capture(run, pool):
        captured.append(Graph(run))
        return SimpleNamespace(graph=captured[-1], result=captured[-1].result)

    def free_bytes(device=None):
        return 10_000 - 10 * len(captured) - 90 * bool(captured), 10_000

    fake = FakeFlashInfer()
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)

    def make_backend() -> FlashInferAttentionBackend:
        ring = StagingRing(4, lambda: event, lambda size: torch.empty(size, dtype=torch.uint8))
        return FlashInferAttentionBackend(ring=ring)

    monkeypatch.setitem(attention_module._BACKENDS, "flashinfer", make_backend)
    monkeypatch.setattr(flashinfer_attention, "import_flashinfer", lambda: fake.get_batch_prefill_module)
    monkeypatch.setattr(flashinfer_attention, "device_traits", lambda device: ((9, 0), 132))
    monkeypatch.setattr(decode_graphs, "capture_graph", capture)
    monkeypatch.setattr(prefill_graphs, "capture_graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_bytes)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return captured


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, "Qwen3ForCausalLM", vocab_size=VOCAB, dtype="float16")
    return str(path)


def make_config(model_path: str) -> EngineConfig:
    return EngineConfig(
        model=model_path,
        device="cpu",
        dtype="float16",
        attention_backend="flashinfer",
        page_size=4,
        num_device_pages=32,
        max_num_seqs=4,
        max_model_len=64,
        lora_memory_gb=2**-7,
        lora_host_memory_gb=2**-7,
    )


def test_rows_that_grow_long_are_replayed_with_splits(model_path, graphs, monkeypatch):
    monkeypatch.setattr(flashinfer_attention_split, "ALWAYS_UNSPLIT_TOKENS", len(PROMPT) + 3)
    config = make_config(model_path)
    outputs = []
    for sizes in ((), (1, 4)):
        executor = CudaExecutor(config, dataclasses.replace(set_up_cpu(config), decode_graph_sizes=sizes))
        run = HandMadeRun(executor, make_state(PROMPT, vocab_size=VOCAB, temperature=0.0), [0, 1, 2, 3, 4])
        run.finish([len(PROMPT)], 8)
        outputs.append(run.state.output_token_ids)
        executor.close()

    # Captured: sizes 4 and 1 without adapters, each unsplit and split, then with adapters.
    assert [graph.num_replays for graph in graphs] == [0, 0, 3, 4, 0, 0, 0, 0]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("chunks", [[5, 1, 3], [5, 1, 2, 1]])
def test_chunk_of_one_prompt_token_gives_its_log_probability(model_path, graphs, chunks):
    config = make_config(model_path)
    found = []
    for sizes in ((), (1, 4)):
        executor = CudaExecutor(config, dataclasses.replace(set_up_cpu(config), decode_graph_sizes=sizes))
        state = make_state(PROMPT, vocab_size=VOCAB, temperature=0.0, prompt_logprobs=0)
        run = HandMadeRun(executor, state, [0, 1, 2, 3, 4])
        run.finish(chunks, 3)
        found.append(([entry and entry.logprob for entry in state.prompt_logprobs], state.output_token_ids))
        executor.close()

    assert found[0] == found[1]
    assert None not in found[1][0][1:]
    assert sum(graph.num_replays for graph in graphs) == 2, "the decodes behind the prompt are replayed"


def test_memory_of_all_graphs_is_foretold_from_a_few(model_path, graphs, monkeypatch):
    monkeypatch.setattr(cuda_setup, "_NUM_TRIAL_SIZES", 2)
    config = make_config(model_path)
    setup = set_up_cpu(config)

    num_bytes = cuda_setup._measure_executor_bytes(config, setup.model, setup.lora, (1, 2, 3, 4), ())

    assert len(graphs) == 8
    assert num_bytes == 16 * 10 + 90


@pytest.fixture
def writes_skip_padding(monkeypatch) -> None:
    """The kernel of a CUDA device writes a slot of -1 nowhere; torch's operator on a CPU knows none."""
    write = KVLayer.write

    def write_some(self, key, value, slot_mapping):
        is_kept = slot_mapping >= 0
        write(self, key[is_kept], value[is_kept], slot_mapping[is_kept])

    monkeypatch.setattr(KVLayer, "write", write_some)


def test_graphs_of_the_trial_are_gone_when_its_memory_is_given_back(
    model_path, graphs, writes_skip_padding, monkeypatch
):
    num_alive: list[int] = []

    def count_alive() -> None:
        graphs.clear()
        gc.collect()
        kinds = (decode_graphs.DecodeGraphs, prefill_graphs.PrefillGraphs)
        num_alive.append(sum(type(one) in kinds for one in gc.get_objects()))

    config = make_config(model_path)
    setup = set_up_cpu(config)
    monkeypatch.setattr(torch.cuda, "empty_cache", count_alive)

    cuda_setup._measure_executor_bytes(config, setup.model, setup.lora, (1, 2), (4, 16))

    before, with_trial, after = num_alive
    assert with_trial - before == 2
    assert after == before


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
@pytest.mark.parametrize(
    ("chunks", "num_large", "num_small"), [([9], 1, 4), ([5, 1, 3], 1, 6), ([2, 7], 1, 5)]
)
def test_prefill_in_pieces_is_that_of_whole_steps(
    model_path, graphs, writes_skip_padding, chunks, num_large, num_small, prompt_logprobs
):
    config = make_config(model_path)
    found = []
    for sizes in ((), (4, 16)):
        executor = CudaExecutor(config, dataclasses.replace(set_up_cpu(config), prefill_graph_sizes=sizes))
        if executor.prefill_graphs is not None:  # What padded tokens would read.
            with torch.inference_mode():
                executor.prefill_graphs._attended.fill_(math.nan)
                executor.prefill_graphs._query.fill_(math.nan)
        state = make_state(PROMPT, vocab_size=VOCAB, temperature=0.0, prompt_logprobs=prompt_logprobs)
        HandMadeRun(executor, state, [0, 1, 2, 3, 4]).finish(chunks, 5)
        entries = state.prompt_logprobs or []
        found.append((state.output_token_ids, [entry.logprob for entry in entries[1:]]))
        executor.close()

    # Captured: two layers of 16 tokens, then of 4; then with adapters.
    expected = [num_large, num_large, num_small, num_small, 0, 0, 0, 0]
    assert [graph.num_replays for graph in graphs] == expected
    assert found[0][0] == found[1][0]
    assert len(found[1][1]) == (0 if prompt_logprobs is None else len(PROMPT) - 1)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-2)


def test_rows_of_several_lengths_share_a_piece(model_path, graphs, writes_skip_padding):
    config = make_config(model_path)
    found = []
    for sizes in ((), (16,)):
        executor = CudaExecutor(config, dataclasses.replace(set_up_cpu(config), prefill_graph_sizes=sizes))
        runs = [
            HandMadeRun(executor, make_state(prompt, vocab_size=VOCAB, temperature=0.0), pages, row=row)
            for row, (prompt, pages) in enumerate([(PROMPT, [3, 1, 2]), (PROMPT[2:7], [0, 5])])
        ]
        runs[0].finish([len(PROMPT)], 1)
        plans = [runs[0].plan(1), runs[1].plan(5)]  # A decode beside a prefill.
        both = PlanStandIn(
            plan_id=9,
            rows=[row for plan in plans for row in plan.rows],
            tokens=[token for plan in plans for token in plan.tokens],
            deltas=[delta for plan in plans for delta in plan.deltas],
        )
        run_plan(executor, both, [run.state for run in runs])
        found.append([run.state.output_token_ids for run in runs])
        executor.close()

    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[1]] == [2, 1]
    assert [graph.num_replays for graph in graphs] == [2, 2, 0, 0]


def test_step_of_more_tokens_than_any_size_runs_as_a_whole(model_path, graphs, writes_skip_padding):
    config = make_config(model_path)
    executor = CudaExecutor(config, dataclasses.replace(set_up_cpu(config), prefill_graph_sizes=(8,)))
    state = make_state(PROMPT, vocab_size=VOCAB, temperature=0.0)
    HandMadeRun(executor, state, [0, 1, 2, 3, 4]).finish([len(PROMPT)], 1)
    executor.close()

    assert not any(graph.num_replays for graph in graphs)


@pytest.mark.parametrize("slots", [[1, 1, -1, 0, 2], [0, 0, 0], [-1, 3, -1, 3, -1, 1, 2]])
def test_padded_tokens_have_no_adapter_and_no_place(slots):
    inputs = DeviceInputs(
        max_num_seqs=4,
        max_num_tokens=16,
        max_pages_per_row=4,
        max_loras=4,
        page_size=4,
        needs_row_pages=False,
        num_buffers=1,
        device=torch.device("cpu"),
    )
    captured = inputs.prefill_step(8, has_adapters=True).context
    lora = captured.lora
    for earlier in ([3, 3, 3, 3, 0, 0, 1, 2], slots):  # Nothing of the step before is left.
        own = build_lora_metadata(torch.tensor(earlier), 4)
        inputs._slot_mapping[: len(earlier)] = torch.arange(len(earlier)) + 10
        step = SimpleNamespace(token_ids=earlier, context=SimpleNamespace(lora=own))
        inputs.pad(step, 8)

    num_own, num_padded = len(slots), 8 - len(slots)
    assert captured.slot_mapping.tolist() == [*range(10, 10 + num_own), *[-1] * num_padded]
    assert lora.token_lora_mapping.tolist() == [*slots, *[-1] * num_padded]
    assert lora.token_indices_sorted_by_lora_ids[:num_own].equal(own.token_indices_sorted_by_lora_ids)
    for name in ("num_tokens_per_lora", "lora_token_start_loc", "active_lora_ids"):
        assert getattr(lora, name).equal(getattr(own, name))
    assert lora.lora_tiles[:, : own.lora_tiles.shape[1]].equal(own.lora_tiles)
    assert int(lora.num_tokens_per_lora.sum()) == num_own


@pytest.fixture
def groups_are_read_anew(monkeypatch) -> None:
    """Kernels read a step's groups in each replay; torch keeps what it has read once."""
    group = LoRAMetadata.groups.func

    def read(self):
        counts, slots = self.num_tokens_per_lora, self.active_lora_ids
        num_grouped = int(counts.sum())
        tokens = self.token_indices_sorted_by_lora_ids[:num_grouped].long()
        mapping = torch.full_like(self.token_lora_mapping, -1)
        mapping[tokens] = slots.repeat_interleave(counts)
        assert num_grouped == 0 or mapping.equal(self.token_lora_mapping)
        return group(build_lora_metadata(mapping, len(slots)))

    monkeypatch.setattr(LoRAMetadata, "groups", property(read))
    monkeypatch.setattr(LoRAMetadata, "of_tables", property(lambda self: {}))


def outputs_of_random_requests(executor: CudaExecutor, adapters: list[str]) -> dict[int, list[int]]:
    """Of greedy, drawn, penalised and restricted requests, on so few pages that some are preempted."""
    options = {"page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 24, "max_loras": 2}
    run = SchedulerRun(
        executor,
        max_in_flight=2,
        padded_batch_sizes=list(executor.padded_batch_sizes),
        adapter_memory_bytes=2**23,
        **options,
    )
    for adapter_id, path in enumerate(adapters, start=1):
        with ThreadPoolExecutor(1) as thread, thread.submit(executor.lora.read, path).result() as read:
            executor.lora.add(adapter_id, read)
            num_bytes = read.num_bytes
        run.scheduler.open_adapter(adapter_id, digest_seed=adapter_id, size_bytes=num_bytes, is_staged=True)
    kinds = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.3},
        {"allowed_token_ids": [5, 9, 40]},
    ]
    rng = np.random.default_rng(0)
    for request_id in range(1, 33):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 24)).tolist()
        params = {"temperature": 0.0, "logprobs": 1, **kinds[rng.integers(len(kinds))]}
        state = make_state(prompt, vocab_size=VOCAB, **params)
        run.add(request_id, state, int(rng.integers(1, 14)), int(rng.choice([0, 0, 1, 2, 3])))
        run.step()
    run.finish()
    return run.outputs


def test_random_requests_from_graphs_are_those_of_whole_steps(
    model_path, graphs, writes_skip_padding, groups_are_read_anew, tmp_path
):
    adapters = [tmp_path / "first", tmp_path / "second", tmp_path / "third"]
    for seed, path in enumerate(adapters):
        # The third adapts what no graph has: steps with it run without them.
        others = {"target_modules": ("lm_head", "embed_tokens", "q_proj")} if seed == 2 else {}
        make_random_adapter(path, model_path, rank=(8, 3, 4)[seed], seed=seed, scale=1.5, **others)
    config = msgspec.structs.replace(
        make_config(model_path), num_device_pages=14, max_model_len=48, max_loras=2
    )
    found = []
    for sizes, prefill_sizes in (((), ()), ((1, 4), (12,))):
        setup = dataclasses.replace(
            set_up_cpu(config), decode_graph_sizes=sizes, prefill_graph_sizes=prefill_sizes
        )
        executor = CudaExecutor(config, setup)
        found.append(outputs_of_random_requests(executor, [str(path) for path in adapters]))
        executor.close()

    assert found[0] == found[1]
    # Decodes of 4 and 1, without adapters and with them, every other with splits; then prefills.
    num_replays = [graph.num_replays for graph in graphs]
    assert all(num_replays[:8:2]), num_replays
    assert all(num_replays[8:]), num_replays
