from __future__ import annotations

import math

import msgspec
import pytest

from lora_serve.common.errors import InvalidArgumentError, LoraServeError
from lora_serve.common.sampling_params import SamplingParams

BAD_FIELDS = [
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("n", 1.0),
    ("max_tokens", 0),
    ("max_tokens", "16"),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", 1e-9),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", 2**31),
    ("min_tokens", 2**31),
    ("max_tokens", 2**31),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-40),
    ("repetition_penalty", 100.5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 0.5}),
    ("logit_bias", {-1: 0.5}),
    ("logit_bias", {1: 100.5}),
    ("logit_bias", {1: math.nan}),
    ("seed", 2**63),
    ("seed", 0.5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", 1]),
    ("stop", 5),
    ("stop", "half a pair \ud800"),
    ("stop_token_ids", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("include_stop_str_in_output", 1),
    ("ignore_eos", "yes"),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 21),
    ("skip_special_tokens", None),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_value_is_refused_with_the_field_and_the_value(field, value):
    with pytest.raises(InvalidArgumentError, match=field) as caught:
        SamplingParams(**{field: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, LoraServeError)
    assert "must be" in str(caught.value)


def test_min_tokens_above_max_tokens_is_refused_with_both_numbers():
    with pytest.raises(InvalidArgumentError, match=r"min_tokens is 5 .* max_tokens, which is 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5


def test_edges_of_the_ranges_are_accepted():
    params = SamplingParams(
        n=128, max_tokens=1, min_tokens=1, temperature=1e-5, top_p=1e-9, top_k=-1, min_p=1.0, logprobs=0,
        prompt_logprobs=20, seed=-(2**63), logit_bias={0: -100, 7: 100.0}, presence_penalty=-2.0,
    )  # fmt: skip
    assert not params.is_greedy
    assert SamplingParams(temperature=0).is_greedy


@pytest.mark.parametrize(
    ("stop", "expected"), [(None, []), ("end", ["end"]), (["a", "b"], ["a", "b"]), (("a",), ["a"])]
)
def test_stop_is_normalised_to_a_list(stop, expected):
    assert SamplingParams(stop=stop).stop_strings == expected


def test_lists_are_not_shared_with_the_caller():
    stop, ids = ["a"], [1]
    params = SamplingParams(stop=stop, stop_token_ids=ids)
    stop.append("b")
    ids.append(2)
    assert params.stop_strings == ["a"]
    assert params.stop_token_ids == [1]


def test_child_has_one_answer_and_a_seed_of_its_own():
    params = SamplingParams(n=3, seed=41, stop="x", temperature=0.5)
    children = [params.child(index) for index in range(3)]
    assert [child.seed for child in children] == [41, 42, 43]
    assert {child.n for child in children} == {1}
    assert {child.temperature for child in children} == {0.5}
    assert children[0].stop_strings == ["x"]
    assert SamplingParams(n=2).child(1).seed is None


def test_child_seed_wraps_at_the_largest_seed():
    assert SamplingParams(n=2, seed=2**63 - 1).child(1).seed == -(2**63)


def test_message_round_trip_keeps_every_field():
    params = SamplingParams(
        n=2, max_tokens=None, logit_bias={3: 0.5}, stop=["a"], stop_token_ids=[9], logprobs=2, seed=5
    )
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert decoded == params


def test_decoding_a_bad_message_is_refused():
    data = msgspec.msgpack.encode({"n": 0})
    with pytest.raises(msgspec.ValidationError, match="n is 0"):
        msgspec.msgpack.decode(data, type=SamplingParams)
