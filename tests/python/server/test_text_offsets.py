from __future__ import annotations

import itertools

import pytest

from lora_serve.common.outputs import CompletionOutput, RequestOutput
from lora_serve.server.text_offsets import AnswerOffsets, prompt_offsets
from server.fake_engine_client import a_position
from server.http_calls import complete, events, make_app, make_client

BOS, EOS, AB, CDE, SPACE_F, FIRST_HALF, SECOND_HALF = range(7)
TEXTS = {BOS: b"<s>", EOS: b"</s>", AB: b"ab", CDE: b"cde", SPACE_F: b" f", FIRST_HALF: b"\xc3"}
TEXTS[SECOND_HALF] = b"\xa9"


class TokenizerWithSpecialTokens:
    def decode(self, token_ids, *, skip_special_tokens=True):
        shown = [i for i in token_ids if not (skip_special_tokens and i in (BOS, EOS))]
        return b"".join(TEXTS[i] for i in shown).decode(errors="replace")


def answer_offsets(token_ids, *, skip, prompt=(AB,), start=0, cuts=()):
    offsets = AnswerOffsets(TokenizerWithSpecialTokens(), prompt, skip_special_tokens=skip, start=start)
    bounds = [0, *cuts, len(token_ids)]
    return [
        offset for begin, end in itertools.pairwise(bounds) for offset in offsets.take(token_ids[begin:end])
    ]


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 3, 4), (0, 3, 3)])
def test_answer_offsets_do_not_depend_on_the_pieces(cuts):
    assert answer_offsets([AB, CDE, SPACE_F, AB], skip=True, start=10, cuts=cuts) == [10, 12, 15, 17]


def test_special_tokens_count_only_when_they_are_shown():
    tokens = [AB, EOS, CDE, EOS, BOS, AB]
    assert answer_offsets(tokens, skip=True) == [0, 2, 2, 5, 5, 5]
    assert answer_offsets(tokens, skip=False) == [0, 2, 6, 9, 13, 16]


def test_halves_of_a_character_start_where_it_starts():
    assert answer_offsets([AB, FIRST_HALF, SECOND_HALF, AB], skip=True) == [0, 2, 2, 3]


def test_half_a_character_at_the_end_of_the_prompt_belongs_to_the_answer():
    assert answer_offsets([SECOND_HALF, AB], skip=True, prompt=(AB, FIRST_HALF)) == [0, 1]


@pytest.mark.parametrize(
    ("token_ids", "text", "expected"),
    [
        ([AB, CDE, SPACE_F], "abcde f", [0, 2, 5]),
        ([BOS, AB, CDE], "abcde", [0, 0, 2]),  # added by the tokenizer
        ([AB, CDE, EOS], "abcde", [0, 2, 5]),
        ([BOS, AB, CDE], "<s>abcde", [0, 3, 5]),  # in the text, as for token ids
        ([BOS, BOS, AB], "<s>ab", [0, 3, 3]),
        ([AB, FIRST_HALF, SECOND_HALF, CDE], "ab\u00e9cde", [0, 2, 2, 3]),
    ],
)
def test_prompt_offsets_are_places_in_the_prompts_text(token_ids, text, expected):
    assert prompt_offsets(TokenizerWithSpecialTokens(), token_ids, text) == expected


@pytest.mark.parametrize("echo", [False, True])
def test_text_that_was_held_back_does_not_move_the_offsets_of_a_stream(echo):
    """As with stop strings: tokens come at once, their text later, and the stop string's never."""
    pieces = [("ab", "ab"), ("cd", ""), ("e", "cd"), ("f", "")]

    def hold_back(stream, params, lora_name):
        for number, (tokens, text) in enumerate(pieces):
            is_last = number == len(pieces) - 1
            answer = CompletionOutput(index=0, text=text, token_ids=[ord(token) for token in tokens])
            answer.logprobs = [a_position(token_id) for token_id in answer.token_ids]
            answer.finish_reason = "stop" if is_last else None
            delta = RequestOutput(stream.request_id, "hi", stream.prompt_token_ids, None, [answer], is_last)
            if echo and number == 0:
                delta.prompt_logprobs = [None, a_position(ord("i"))]
            stream.put(delta)

    client = make_client()
    client._answer = hold_back
    body = {"prompt": "hi", "logprobs": 0, "echo": echo, "max_tokens": 9}
    chunks = events(complete(make_app(client), stream=True, **body))
    streamed = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    [whole] = complete(make_app(client), **body).json()["choices"]
    assert whole["text"] == ("hiabcd" if echo else "abcd")
    assert streamed == whole["logprobs"]["text_offset"] == list(range(8 if echo else 6))
