from __future__ import annotations

import pytest

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.input_processor import InputProcessor
from lora_serve.engine.messages import ModelInfo

INFO = ModelInfo(
    model="m",
    max_model_len=16,
    vocab_size=100,
    eos_token_ids=[1],
    page_size=4,
    num_device_pages=64,
    max_num_seqs=8,
    max_loras=4,
)


def process(token_ids, lora_name=None, **params):
    return InputProcessor(INFO).process("r", None, token_ids, SamplingParams(**params), lora_name)


def test_max_tokens_of_none_is_what_the_context_holds():
    request = process([5, 6, 7], max_tokens=None)
    assert request.sampling_params.max_tokens == 13
    assert request.engine_requests[0].sampling_params.max_tokens == 13


def test_prompt_and_answer_may_fill_the_context_exactly():
    assert process([5] * 15, max_tokens=1).engine_requests[0].prompt_token_ids == [5] * 15
    assert process([5] * 15, max_tokens=None).sampling_params.max_tokens == 1


@pytest.mark.parametrize(
    ("token_ids", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([5] * 16, {}, r"prompt has 16 tokens but max_model_len is 16.*shorten the prompt to 15"),
        ([5] * 10, {"max_tokens": 7}, r"max_tokens is 7 but a prompt of 10 tokens leaves 6 .*at most 6"),
        ([5] * 10, {"max_tokens": None, "min_tokens": 7}, r"min_tokens is 7 .* leaves 6"),
        ([5, 100], {"max_tokens": 1}, r"the prompt has the token id 100 .* \[0, 100\)"),
        ([5, -1], {"max_tokens": 1}, "token id -1"),
        (["a"], {"max_tokens": 1}, "token id 'a'"),
        ([True], {"max_tokens": 1}, "token id True"),
        ([1.0], {"max_tokens": 1}, r"token id 1\.0"),
        ([5], {"max_tokens": 1, "stop_token_ids": [100]}, "stop_token_ids has the token id 100"),
        ([5], {"max_tokens": 1, "logit_bias": {100: 1.0}}, "logit_bias has the token id 100"),
    ],
)
def test_bad_request_is_refused_with_what_was_found_and_what_to_do(token_ids, params, message):
    with pytest.raises(InvalidArgumentError, match=message):
        process(token_ids, **params)


@pytest.mark.parametrize("name", ["", 5, "\ud800"])
def test_adapter_name_that_is_none_is_refused(name):
    with pytest.raises(InvalidArgumentError, match="lora_name"):
        process([5], lora_name=name, max_tokens=1)


def test_answers_have_ids_and_seeds_of_their_own_over_all_requests():
    processor = InputProcessor(INFO)
    first = processor.process("a", None, [5], SamplingParams(n=2, seed=7, max_tokens=4), "x")
    second = processor.process("b", None, [5], SamplingParams(n=2, max_tokens=4), None)
    ids = first.engine_request_ids + second.engine_request_ids
    assert len(set(ids)) == 4
    assert [request.sampling_params.seed for request in first.engine_requests] == [7, 8]
    assert {request.lora_name for request in first.engine_requests} == {"x"}
    assert {request.lora_name for request in second.engine_requests} == {None}
