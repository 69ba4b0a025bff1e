"""Decode steps from "graphs" on a CPU: a replay does again what was captured, with a fake FlashInfer."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.executor import cuda_setup, decode_graphs
from lora_serve.executor.cuda_executor import CudaExecutor
from lora_serve.layers import attention as attention_module
from lora_serve.layers import flashinfer_attention, flashinfer_attention_split
from lora_serve.layers.flashinfer_attention import FlashInferAttentionBackend
from lora_serve.layers.flashinfer_attention_staging import StagingRing
from lora_serve.testing.models import make_random_model
from support.fake_flashinfer import FakeFlashInfer

from .executors import set_up_cpu
from .hand_made_run import HandMadeRun
from .states import make_state

VOCAB = 64
PROMPT = list(range(3, 12))


class Graph:
    """Does what was captured again; nothing else may have changed than what lies on the "device"."""

    def __init__(self, run) -> None:
        self.run = run
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.run()


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """All that were captured: 10 bytes of the device's memory each, and 90 more for the first."""
    captured: list[Graph] = []

    def capture(run, pool):
        captured.append(Graph(run))
        return SimpleNamespace(graph=captured[-1], logits=run())

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
    monkeypatch.setattr(decode_graphs, "_capture", capture)
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

    num_bytes = cuda_setup._measure_executor_bytes(config, setup.model, setup.lora, (1, 2, 3, 4))

    assert len(graphs) == 8
    assert num_bytes == 16 * 10 + 90
