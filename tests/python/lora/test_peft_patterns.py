from __future__ import annotations

import time

import pytest
from peft.utils.other import get_pattern_key

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.lora.load_problems import LoadProblems
from lora_serve.lora.peft_patterns import MAX_PATTERN_LENGTH, MAX_PATTERNS, compile_patterns, first_match

MODULES = [
    f"{prefix}layers.{layer}.{name}"
    for prefix in ("model.", "")
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
]
PATTERNS = [
    "q_proj",
    "proj",
    "self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    r"layers\.1\.self_attn\.q_proj",
    "^model.layers.1.self_attn.q_proj",
    "^layers.1.self_attn.q_proj",
    r".*\.q_proj",
    ".*q_proj",
    r"layers\.\d+\.mlp\.gate_proj",
    r"layers\.[01]\..*",
    "(q|k)_proj",
    "q_proj|k_proj",
    r"self_attn\.(?:q|k)_proj",
    "layers.1",
    "q_proj$",
    "_proj",
    "",
    r"layers\.1?1\..*_proj",
    r"[^.]*_proj",
]


def compiled(raw, field="rank_pattern"):
    return compile_patterns(field, raw, LoadProblems("x"), "adapter_config.json")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_pattern_matches_the_modules_that_peft_matches(pattern):
    raw = {pattern: 3}
    for module in MODULES:
        expected = raw.get(get_pattern_key(raw.keys(), module), 8)
        assert first_match(compiled(raw), module, 8) == expected, module


@pytest.mark.parametrize("shift", range(len(PATTERNS)))
def test_first_pattern_of_the_file_wins_as_in_peft(shift):
    order = PATTERNS[shift:] + PATTERNS[:shift]
    raw = {pattern: rank for rank, pattern in enumerate(order, 1)}
    for module in MODULES:
        expected = raw.get(get_pattern_key(raw.keys(), module), 99)
        assert first_match(compiled(raw), module, 99) == expected, module


def test_key_that_equals_the_module_counts_although_it_does_not_match_itself():
    raw = {"odd[name": 2, "a+b": 3}
    del raw["odd[name"]
    assert first_match(compiled(raw), "a+b", 8) == raw.get(get_pattern_key(raw.keys(), "a+b"), 8) == 3


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|a)*b",
        "(.*)*b",
        "(.+)+b",
        "(?:.|.){30}b",
        ".*.*.*.*b",
        ".?" * 30 + "b",
        "(.|.)" * 30 + "b",
        "((.|.|.)(.|.|.)(.|.|.)(.|.|.)(.|.|.)(.|.|.)(.|.|.)(.|.|.)(.|.|.)(.|.|.))b",
        "a{1,40}{1,40}{1,40}{1,40}b",
        "x" * (MAX_PATTERN_LENGTH + 1),
        "q_proj(",
        "[",
        "*",
    ],
)
def test_pattern_that_is_hostile_or_broken_is_refused_at_once(pattern):
    with pytest.raises(InvalidArgumentError, match="rank_pattern"):
        compiled({pattern: 4})


@pytest.mark.parametrize(
    "pattern", [".*.*.*b", "(.|.|.|.|.)(.|.|.|.|.)(.|.|.|.|.|.|.)b", ".?.?.?b", "(q|k|v|o|gate|up|down)_proj"]
)
def test_worst_pattern_that_is_accepted_takes_little_time(pattern):
    patterns = compiled({pattern: 4})
    started = time.process_time()
    first_match(patterns, "model.layers.11.self_attn." + "a" * 40, 8)
    assert time.process_time() - started < 5, "matching is exponential"


def test_too_many_patterns_are_refused():
    with pytest.raises(InvalidArgumentError, match=f"at most {MAX_PATTERNS}"):
        compiled({f"layers.{i}.x": 1 for i in range(MAX_PATTERNS + 1)})


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4", None, [4]])
def test_rank_that_is_no_rank_is_refused(value):
    with pytest.raises(InvalidArgumentError, match="whole number from 1"):
        compiled({"q_proj": value})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, "4", None, 10**400])
def test_alpha_that_is_no_number_is_refused(value):
    with pytest.raises(InvalidArgumentError, match="finite number"):
        compiled({"q_proj": value}, field="alpha_pattern")


@pytest.mark.parametrize("value", [0, -3, 2.5, 16])
def test_any_finite_alpha_is_accepted(value):
    assert first_match(compiled({"q_proj": value}, field="alpha_pattern"), "q_proj", 1) == value
