from __future__ import annotations

import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.executor import cuda_setup
from lora_serve.executor.prompt_logprobs import MAX_LOGIT_ROWS
from lora_serve.executor.warm_up import warm_up
from lora_serve.kernels.triton_lora_linear import warm_up_token_counts
from lora_serve.kernels.triton_lora_tiles import token_class
from lora_serve.testing.models import make_random_model

from .executors import make_executor, set_up_cpu
from .hand_made_run import HandMadeRun
from .states import make_state


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, "Qwen3ForCausalLM", vocab_size=64, eos_token_id=[7, 9])
    return str(path)


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_requests_after_a_warm_up_are_answered_as_without(model_path, kind):
    config = EngineConfig(
        model=model_path,
        device="cuda" if kind == "cuda" else "cpu",
        attention_backend="torch",
        page_size=4,
        num_device_pages=16,
        max_num_seqs=4,
        lora_memory_gb=2**-7,
        lora_host_memory_gb=2**-7,
    )
    tokens = []
    for is_warmed_up in (False, True):
        executor = make_executor(kind, config)
        if is_warmed_up:
            warm_up(executor, config)
        run = HandMadeRun(executor, make_state([1, 2, 3], vocab_size=64, temperature=0.0), [0, 1])
        run.finish([3], 4)
        tokens.append(run.state.output_token_ids)
        executor.close()
    assert tokens[0] == tokens[1]
    assert len(tokens[1]) == 4


def test_executor_too_small_for_the_warm_up_is_left_alone(model_path):
    config = EngineConfig(
        model=model_path,
        device="cpu",
        page_size=4,
        num_device_pages=1,
        max_num_seqs=4,
        lora_memory_gb=2**-7,
        lora_host_memory_gb=2**-7,
    )
    executor = make_executor("cpu", config)
    warm_up(executor, config)
    assert executor.lora.snapshot() == []
    executor.close()


@pytest.mark.parametrize("max_num_seqs", [4, 128, 256])
def test_largest_step_is_measured_behind_all_that_compile_a_kernel(model_path, monkeypatch, max_num_seqs):
    """Pitfall 50, of what starts an engine: steps with adapters and without, logits of prompts, too."""
    config = EngineConfig(
        model=model_path,
        device="cpu",
        attention_backend="torch",
        num_device_pages=40,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=600,
        max_model_len=600,
        lora_memory_gb=2**-7,
        lora_host_memory_gb=2**-7,
    )
    setup = set_up_cpu(config)
    model = setup.model
    steps, logits = [], []

    def forward(token_ids, context, kv_layers, plan):
        steps.append((len(token_ids), context.lora is not None))
        return torch.zeros(len(token_ids), model.config.hidden_size)

    def compute_logits(hidden, lora):
        logits.append((len(hidden), lora is not None))
        return torch.zeros(len(hidden), model.config.vocab_size)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(model, "compute_logits", compute_logits)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))

    cuda_setup._measure_free_bytes(config, model)

    assert steps == [(tokens, has) for tokens in warm_up_token_counts(600) for has in (False, True)]
    assert steps[-1] == (600, True)
    for has_adapter in (False, True):
        compiled = {token_class(rows) for rows, has in logits if has == has_adapter}
        assert compiled >= {token_class(rows) for rows in range(1, max(MAX_LOGIT_ROWS, max_num_seqs) + 1)}
    setup.close()
