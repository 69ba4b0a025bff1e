from __future__ import annotations

import random

import pytest

from lora_serve.engine.detokenizer import MAX_HELD_BACK_TOKENS, IncrementalDetokenizer

from .tokenizers_for_tests import CORPUS, byte_fallback, byte_level_bpe


def pieces_of(tokenizer, token_ids, prompt=(), skip_special_tokens=True):
    detokenizer = IncrementalDetokenizer(tokenizer, list(prompt), skip_special_tokens=skip_special_tokens)
    return [detokenizer.feed(token_id) for token_id in token_ids] + [detokenizer.flush()]


@pytest.mark.parametrize("text", CORPUS)
def test_pieces_joined_equal_the_full_decoding(text):
    tokenizer = byte_level_bpe()
    token_ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == text == tokenizer.decode(token_ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("full_text", CORPUS)
@pytest.mark.parametrize(
    "tokenizer", [byte_level_bpe(), byte_fallback()], ids=["byte_level", "byte_fallback"]
)
def test_every_cut_between_prompt_and_answer_gives_the_rest_of_the_text(tokenizer, full_text):
    token_ids = tokenizer.encode(full_text)
    for cut in range(1, len(token_ids)):
        # What the prompt shows in whole characters; one decoder spoils whole ones in front of half a one.
        decoded = [tokenizer.decode(token_ids[:end]).rstrip("\ufffd") for end in range(cut + 1)]
        shown = max((text for text in decoded if full_text.startswith(text)), key=len)
        assert "".join(pieces_of(tokenizer, token_ids[cut:], token_ids[:cut])) == full_text[len(shown) :], cut


def test_character_of_four_tokens_is_shown_at_its_last_token():
    tokenizer = byte_level_bpe()
    token_ids = [tokenizer.backend.convert_tokens_to_ids(token) for token in "ðŁĺĢ"]
    assert tokenizer.decode(token_ids) == "😀"
    assert pieces_of(tokenizer, token_ids) == ["", "", "", "😀", ""]


def test_answer_that_ends_inside_a_character_leaves_it_out():
    tokenizer = byte_level_bpe()
    hello = tokenizer.encode("hello ")
    half = [tokenizer.backend.convert_tokens_to_ids(token) for token in "ðŁĺ"]
    assert "".join(pieces_of(tokenizer, hello + half)) == "hello "


def test_text_in_front_of_an_unfinished_character_in_one_token_is_flushed():
    tokenizer = byte_level_bpe()
    detokenizer = IncrementalDetokenizer(tokenizer, [], skip_special_tokens=True)
    emoji = [tokenizer.backend.convert_tokens_to_ids(token) for token in "ðŁĺ"]
    assert [detokenizer.feed(token_id) for token_id in emoji] == ["", "", ""]
    assert detokenizer.feed(tokenizer.encode("a")[0]) == "\ufffda"


def test_invalid_bytes_are_given_up_after_a_bounded_number_of_tokens():
    tokenizer = byte_level_bpe()
    continuation = tokenizer.backend.convert_tokens_to_ids("Ģ")  # 0x80: never the start of a character
    token_ids = [continuation] * (4 * MAX_HELD_BACK_TOKENS)
    pieces = pieces_of(tokenizer, token_ids)
    longest_wait = max(len(run) for run in "".join(".x"[bool(piece)] for piece in pieces).split("x"))
    assert longest_wait <= MAX_HELD_BACK_TOKENS
    assert set("".join(pieces)) == {"\ufffd"}


def test_character_that_begins_within_invalid_bytes_is_still_whole():
    tokenizer = byte_level_bpe()
    continuation = tokenizer.backend.convert_tokens_to_ids("Ģ")
    emoji = [tokenizer.backend.convert_tokens_to_ids(token) for token in "ðŁĺĢ"]
    for num_invalid in range(3 * MAX_HELD_BACK_TOKENS):
        token_ids = [continuation] * num_invalid + emoji
        assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids), num_invalid


def test_random_tokens_equal_the_full_decoding_less_the_unfinished_end():
    tokenizer = byte_level_bpe()
    rng = random.Random(3)
    for _ in range(300):
        token_ids = rng.choices(range(2, 330), k=rng.randint(1, 40))
        text = "".join(pieces_of(tokenizer, token_ids))
        assert text.rstrip("\ufffd") == tokenizer.decode(token_ids).rstrip("\ufffd"), token_ids


def test_special_tokens_are_left_out_or_shown():
    tokenizer = byte_level_bpe()
    eos = tokenizer.backend.eos_token_id
    token_ids = [*tokenizer.encode("hello"), eos, eos, *tokenizer.encode(" world"), eos]
    assert "".join(pieces_of(tokenizer, token_ids)) == "hello world"
    shown = pieces_of(tokenizer, token_ids, skip_special_tokens=False)
    assert "".join(shown) == "hello</s></s> world</s>"


def test_window_stays_small_when_tokens_give_no_text():
    tokenizer = byte_level_bpe()
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("hello"), skip_special_tokens=True)
    unknown = 100_000  # Padding rows of an embedding have no text.
    for _ in range(200):
        assert detokenizer.feed(unknown) == ""
        assert len(detokenizer._window) < 3 * MAX_HELD_BACK_TOKENS
    assert detokenizer.feed(tokenizer.encode("a")[0]) == "a"


@pytest.mark.parametrize("num_silent", range(0, 4 * MAX_HELD_BACK_TOKENS, 3))
def test_leading_space_is_kept_behind_silent_tokens(num_silent):
    tokenizer = byte_fallback()
    hello, eos = tokenizer.backend.convert_tokens_to_ids(["▁hello", "</s>"])
    assert "".join(pieces_of(tokenizer, [*[eos] * num_silent, hello], [hello])) == " hello"


def test_leading_space_of_the_first_word_is_kept_after_a_prompt():
    tokenizer = byte_fallback()
    hello = tokenizer.backend.convert_tokens_to_ids("▁hello")
    prompt = tokenizer.encode("hello")
    assert "".join(pieces_of(tokenizer, [hello, hello], prompt)) == " hello hello"


def test_byte_fallback_characters_are_shown_whole():
    tokenizer = byte_fallback()
    token_ids = tokenizer.encode("hello 日本 😀 world")
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == "hello 日本 😀 world"
    assert "😀" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
