from __future__ import annotations

import random

import pytest

from lora_serve.engine.stop_strings import StopStringMatcher


def feed_all(pieces, stops, include=False):
    """Text shown and stop string found, as a user sees them."""
    matcher = StopStringMatcher(stops, include_stop_string=include)
    shown = ""
    for piece in pieces:
        match = matcher.feed(piece)
        shown += match.text
        if match.stop_string is not None:
            return shown, match.stop_string
    return shown + matcher.flush(), None


def char_by_char(text, stops, include=False):
    """The definition: the first character that completes a stop string ends the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stops", [["STOP"], ["</s>", "\n\n"], ["bcd", "c"], ["aab", "ab"], ["a", "ab"]])
@pytest.mark.parametrize("text", ["one STOP two", "xx</s>\n\n", "abcd", "aaab", "no such thing", "STO"])
def test_every_split_in_three_finds_the_same_stop(text, stops, include):
    expected = char_by_char(text, stops, include)
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            pieces = [text[:first], text[first:second], text[second:]]
            assert feed_all(pieces, stops, include) == expected, pieces


def test_random_pieces_and_stops_equal_the_definition():
    rng = random.Random(20)
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        include = rng.random() < 0.5
        assert feed_all(pieces, stops, include) == char_by_char(text, stops, include), (pieces, stops)


def test_only_what_may_become_a_stop_is_held_back():
    matcher = StopStringMatcher(["STOP"], include_stop_string=False)
    assert matcher.feed("hello ST").text == "hello "
    assert matcher.feed("AR").text == "STAR"
    assert matcher.feed("S").text == ""
    assert matcher.feed("S").text == "S"
    assert matcher.flush() == "S"
    assert matcher.flush() == ""


def test_without_stop_strings_nothing_is_held_back():
    matcher = StopStringMatcher([], include_stop_string=False)
    assert matcher.feed("abc").text == "abc"
    assert matcher.flush() == ""
