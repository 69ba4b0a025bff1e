from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.executor import prompt_logprobs
from lora_serve.executor.model_executor import ModelExecutor
from lora_serve.testing.models import make_random_model

from .hand_made_run import HandMadeRun
from .scheduler_run import SchedulerRun
from .states import make_state

VOCAB = 256
PROMPT = np.random.default_rng(0).integers(0, VOCAB, 23).tolist()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, "LlamaForCausalLM", vocab_size=VOCAB)
    return str(path)


@pytest.fixture(scope="module")
def executor(model_path) -> ModelExecutor:
    config = EngineConfig(model=model_path, device="cpu", page_size=4, num_device_pages=64, max_num_seqs=4)
    return ModelExecutor(config)


@pytest.fixture(scope="module")
def reference(model_path) -> torch.Tensor:
    """[P, V] log probabilities after each prompt token, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].double(), dim=-1)


def _state(num_top: int = 3, **params):
    return make_state(PROMPT, vocab_size=VOCAB, temperature=0.0, prompt_logprobs=num_top, **params)


def _check(state, reference: torch.Tensor, num_top: int = 3) -> None:
    assert len(state.prompt_logprobs) == len(PROMPT)
    assert state.prompt_logprobs[0] is None
    for position in range(1, len(PROMPT)):
        expected, entry = reference[position - 1], state.prompt_logprobs[position]
        assert entry.token_id == PROMPT[position]
        assert abs(entry.logprob - float(expected[PROMPT[position]])) < 1e-4
        assert entry.rank == int((expected > expected[PROMPT[position]]).sum()) + 1
        assert entry.top_token_ids.tolist() == expected.topk(num_top).indices.tolist()
        np.testing.assert_allclose(entry.top_logprobs, expected.topk(num_top).values, atol=1e-4)


@pytest.mark.parametrize(
    "chunks",
    [[23], [1, 22], [22, 1], [7, 4, 5, 7], [4, 4, 4, 4, 4, 3]],
    ids=lambda chunks: "+".join(map(str, chunks)),
)
def test_prompt_logprobs_equal_a_full_forward_pass(executor, reference, chunks, monkeypatch):
    monkeypatch.setattr(prompt_logprobs, "MAX_LOGIT_ROWS", 5)
    state = _state()

    HandMadeRun(executor, state, pages=[9, 1, 5, 20, 3, 7, 2, 8]).finish(chunks, num_output=3)

    _check(state, reference)


def test_prompt_logprobs_are_not_repeated_when_a_preempted_prompt_is_recomputed(executor, reference):
    state = _state()
    run = HandMadeRun(executor, state, pages=[9, 1, 5, 20, 3, 7, 2, 8])
    run.step(10)
    before = list(state.prompt_logprobs)

    run.preempt(pages=[30, 31, 32, 33, 34, 35, 36, 37])
    run.finish([6, 17], num_output=2)
    run.preempt(pages=[9, 1, 5, 20, 3, 7, 2, 8])
    run.finish([25], num_output=3)

    _check(state, reference)
    assert all(state.prompt_logprobs[p] is before[p] for p in range(11))


def test_prompt_logprobs_are_right_beside_other_requests_and_never_reuse_a_prefix(executor, reference):
    run = SchedulerRun(executor, page_size=4, max_num_seqs=4, max_num_batched_tokens=11)
    plain = make_state(PROMPT, vocab_size=VOCAB, temperature=0.0)
    states = [plain, _state(), _state(num_top=0), _state(logprobs=1)]

    for request_id, state in enumerate(states):
        run.add(request_id, state, max_tokens=8)
        run.step()
    run.finish()

    assert plain.prompt_logprobs is None
    _check(states[1], reference)
    _check(states[2], reference, num_top=0)
    _check(states[3], reference)
    assert [run.num_cached_tokens[request_id] for request_id in (1, 2, 3)] == [0, 0, 0]


def test_prompt_of_one_token_has_one_empty_entry(executor):
    state = make_state([5], vocab_size=VOCAB, temperature=0.0, prompt_logprobs=1)

    (result,) = HandMadeRun(executor, state, pages=[0]).finish([1], num_output=1)

    assert state.prompt_logprobs == [None]
    assert result.row_errors == {}


def test_zero_top_tokens_gives_only_the_prompts_tokens(executor):
    state = _state(num_top=0)

    HandMadeRun(executor, state, pages=list(range(8))).finish([23], num_output=1)

    assert all(entry.top_token_ids.shape == (0,) for entry in state.prompt_logprobs[1:])


def test_reused_prefix_is_a_row_error_not_a_gap(executor):
    first = HandMadeRun(executor, _state(), pages=[9, 1, 5, 20, 3, 7, 2, 8])
    first.finish([23], num_output=1)
    state = _state()
    run = HandMadeRun(executor, state, pages=[9, 1, 50, 51, 52, 53, 54, 55], row=1)
    run.preempt(pages=[9, 1, 50, 51, 52, 53, 54, 55], num_kept=8)

    result = run.step(15)

    assert "8 prompt tokens from 1 on" in result.row_errors[0]
    assert result.sampled_token_ids.tolist() == [-1]
    assert state.output_token_ids == []


def test_prompt_logits_that_are_not_finite_are_a_row_error(executor):
    state = _state()
    run = HandMadeRun(executor, state, pages=list(range(8)))
    run.step(8)
    executor._kv_layers[1].k[0] = torch.nan

    result = run.step(8)

    executor._kv_layers[1].k[0] = 0.0
    assert "not finite" in result.row_errors[0]
    assert state.prompt_logprobs[9] is None
