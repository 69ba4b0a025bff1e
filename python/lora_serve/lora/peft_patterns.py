"""Per-module overrides of rank and alpha by regular expression, as PEFT matches them, within safe limits.

Python's matcher backtracks and holds the interpreter lock while it does: a hostile pattern such as
``(a|a)*b`` would stop the step loop for ever. Patterns are therefore accepted only while a bound on the ways
in which they can match stays small: each quantifier counts as ``_WAYS_PER_QUANTIFIER`` ways, each group as
its number of alternatives, a repeated group as too many. Real adapters need one or two quantifiers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_serve.lora.load_problems import LoadProblems

MAX_PATTERNS = 4096
MAX_PATTERN_LENGTH = 512
_WAYS_PER_QUANTIFIER = 32
_MAX_WAYS = _WAYS_PER_QUANTIFIER**3

_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*,?\d*\})[?+]?")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")


@dataclass(frozen=True)
class ModulePattern:
    """One entry of ``rank_pattern`` or ``alpha_pattern``.

    Parameters
    ----------
    key
        The entry's key as written in the file.
    regex
        The key, compiled so that it matches a whole module path or the end of one after a dot.
    value
        The rank or alpha that it gives.
    """

    key: str
    regex: re.Pattern[str]
    value: float


def first_match(patterns: Sequence[ModulePattern], module: str, default: float) -> float:
    """Value for a module: of the first pattern that matches, of the key that equals it, or the default.

    Parameters
    ----------
    patterns
        In the order of the file.
    module
        Module path in the model that the adapter was trained on, without PEFT's own prefix.
    default
        The value where nothing matches.

    Notes
    -----
    O(patterns). PEFT sorts the patterns when it saves: where several match one module, the file's order
    counts when PEFT loads it again, and so it does here. A key may contain characters that keep it from
    matching itself, hence the second look.
    """
    for pattern in patterns:
        if pattern.regex.match(module):
            return pattern.value
    return next((pattern.value for pattern in patterns if pattern.key == module), default)


def compile_patterns(field: str, raw: object, problems: LoadProblems, file: str) -> tuple[ModulePattern, ...]:
    """Check and compile ``rank_pattern`` or ``alpha_pattern``.

    Parameters
    ----------
    field
        ``rank_pattern`` (values are whole numbers from 1) or ``alpha_pattern`` (finite numbers).
    raw
        The field's value from the file: an object, or None for no pattern.
    problems
        Receives what is wrong with each entry.
    file
        The file's name, for messages.

    Raises
    ------
    InvalidArgumentError
        ``raw`` is not an object, or an entry is wrong.
    """
    if raw is None:
        return ()
    if not isinstance(raw, dict):
        problems.fail(f"{file}: {field} is {raw!r:.80}, expected an object of pattern: number")
    if len(raw) > MAX_PATTERNS:
        problems.fail(f"{file}: {field} has {len(raw)} entries, expected at most {MAX_PATTERNS}")
    compiled = []
    for key, value in raw.items():
        why = _why_bad_value(field, value) or _why_bad_pattern(key)
        if why is not None:
            problems.add_in_file(file, f"{field} {key!r:.120}: {why}")
            continue
        compiled.append(ModulePattern(key, re.compile(rf"(.*\.)?({key})$"), value))
    if len(compiled) < len(raw):
        problems.raise_if_any()
    return tuple(compiled)


def _why_bad_value(field: str, value: object) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if field == "rank_pattern":
        if isinstance(value, int) and is_number and value >= 1:
            return None
        return f"value is {value!r:.80}, expected a whole number from 1"
    if isinstance(value, (int, float)) and is_number and abs(value) < 1e30 and math.isfinite(value):
        return None
    return f"value is {value!r:.80}, expected a finite number"


def _why_bad_pattern(key: str) -> str | None:
    if len(key) > MAX_PATTERN_LENGTH:
        return f"the pattern has {len(key)} characters, expected at most {MAX_PATTERN_LENGTH}"
    if _ways_to_match(key) > _MAX_WAYS:
        return (
            "the pattern could take too long to match; expected few quantifiers and no repeated group: "
            "name the modules one by one"
        )
    try:
        re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a valid regular expression ({error})"
    return None


def _ways_to_match(key: str) -> float:
    """Bound on the ways in which the pattern can match a module path; infinite where a group is repeated."""
    plain = _ESCAPE_OR_CLASS.sub("x", key).replace("(?", "(")
    if _REPEATED_GROUP.search(plain):
        return math.inf
    ways: int = _WAYS_PER_QUANTIFIER ** len(_QUANTIFIER.findall(plain))
    alternatives = [1]
    for character in plain:
        if character == "(":
            alternatives.append(1)
        elif character == "|":
            alternatives[-1] += 1
        elif character == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
    return float(ways * math.prod(alternatives))
