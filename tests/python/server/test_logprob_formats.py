from __future__ import annotations

import math

from lora_serve.common.outputs import Logprob
from lora_serve.server.logprob_formats import LogprobFormatter
from server.fake_engine_client import FakeTokenizer


def formatter(num_top):
    return LogprobFormatter(FakeTokenizer(), num_top)


def test_top_tokens_are_the_best_ones_in_order_whatever_was_sampled():
    position = {7: Logprob(-5.0, 40, "x"), 3: Logprob(-2.0, 2, "b"), 9: Logprob(-1.0, 1, "a")}
    [entry] = formatter(2).for_chat([7], [position]).content
    assert (entry.token, entry.logprob) == ("x", -5.0)
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("a", -1.0), ("b", -2.0)]


def test_sampled_token_is_not_repeated_when_it_is_among_the_best():
    position = {9: Logprob(-1.0, 1, "a"), 3: Logprob(-2.0, 2, "b")}
    answer = formatter(2).for_completion([9], [position], [0])
    assert answer.top_logprobs == [{"a": -1.0, "b": -2.0}]


def test_impossible_tokens_have_the_lowest_number_that_json_can_hold():
    position = {7: Logprob(-math.inf, 2, "x"), 9: Logprob(0.0, 1, "a")}
    for answer in (formatter(1).for_chat([7], [position]), formatter(1).for_completion([7], [position], [0])):
        assert "-9999.0" in answer.to_json()


def test_part_of_a_character_has_no_bytes():
    position = {7: Logprob(-1.0, 1, "\ufffd"), 8: Logprob(-2.0, 2, "é")}
    [entry] = formatter(2).for_chat([7], [position]).content
    assert entry.bytes is None
    assert entry.top_logprobs[1].bytes == [0xC3, 0xA9]


def test_of_tokens_with_the_same_text_the_more_probable_is_shown():
    position = {7: Logprob(-3.0, 2, "\ufffd"), 8: Logprob(-1.0, 1, "\ufffd")}
    answer = formatter(2).for_completion([7], [position], [0])
    assert answer.top_logprobs == [{"\ufffd": -1.0}]
    assert answer.token_logprobs == [-3.0]


def test_tokens_without_text_are_decoded():
    position = {65: Logprob(-1.0, 1, None)}
    assert formatter(1).for_completion([65], [position], [4]).tokens == ["A"]
