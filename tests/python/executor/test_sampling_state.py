from __future__ import annotations

import numpy as np
import pytest

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.executor.sampling_state import TokenCounts

from .states import make_state


def test_token_counts_count_prompt_tokens_as_zero_and_grow():
    counts = TokenCounts(np.array([5, 3, 5], dtype=np.int32))
    rng = np.random.default_rng(0)
    output = [*rng.integers(0, 400, 1000).tolist(), 3]

    for token_id in output:
        counts.add(token_id)

    found = dict(zip(counts.token_ids.tolist(), counts.output_counts.tolist(), strict=True))
    expected = {token_id: output.count(token_id) for token_id in {3, 5, *output}}
    assert found == expected


def test_append_output_at_another_position_is_an_internal_error():
    state = make_state([1, 2, 3], output=[9])

    state.append_output(8, 4)

    assert state.output_token_ids == [9, 8]
    for position in (4, 6):
        with pytest.raises(InternalError, match="next position is 5"):
            state.append_output(7, position)
    assert state.output_token_ids == [9, 8]


@pytest.mark.parametrize("token_id", [32, 1000])
def test_logit_bias_outside_the_vocabulary_is_refused(token_id):
    with pytest.raises(InvalidArgumentError, match=rf"token id {token_id} .*\[0, 32\)"):
        make_state(logit_bias={token_id: 1.0})


@pytest.mark.parametrize(
    ("params", "is_plain"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 1}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.0, "logprobs": 0}, False),
        ({"temperature": 0.0, "logit_bias": {1: 1.0}}, False),
        ({"temperature": 0.0, "logit_bias": {}}, True),
        ({"temperature": 0.0, "min_tokens": 2}, False),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, False),
        ({"temperature": 0.0, "presence_penalty": -0.1}, False),
        ({"temperature": 0.0, "frequency_penalty": 0.1}, False),
    ],
)
def test_plain_greedy_is_recognised(params, is_plain):
    assert make_state(eos=(4,), **params).is_plain_greedy is is_plain


def test_stop_tokens_are_banned_until_min_tokens():
    state = make_state([1], min_tokens=2, stop_token_ids=[7, 99], eos=(4,))

    banned = []
    for position in range(1, 5):
        banned.append(state.stop_ids if state.bans_stop_tokens else [])
        state.append_output(6, position)

    assert banned == [[4, 7], [4, 7], [], []]


def test_missing_prompt_logprobs_never_names_the_first_token():
    state = make_state([1, 2, 3], prompt_logprobs=0)

    assert state.prompt_logprobs == [None, None, None]
    assert state.missing_prompt_logprobs() == [1, 2]
    assert make_state([1, 2, 3]).missing_prompt_logprobs() == []
