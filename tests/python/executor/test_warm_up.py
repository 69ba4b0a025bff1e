from __future__ import annotations

import pytest

from lora_serve.common.config import EngineConfig
from lora_serve.executor.warm_up import warm_up
from lora_serve.testing.models import make_random_model

from .executors import make_executor
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
