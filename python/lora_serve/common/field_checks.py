"""Checks of single fields, with messages that name the field, what was found and what was expected."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from lora_serve.common.errors import InvalidArgumentError


def refuse(field: str, found: object, expected: str) -> NoReturn:
    """Raise InvalidArgumentError for a field."""
    raise InvalidArgumentError(f"{field} is {found!r} but must be {expected}")


def check_int(field: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Require an integer (not a boolean) in [minimum, maximum].

    Raises
    ------
    InvalidArgumentError
        The value is no integer or lies outside.
    """
    span = f"at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(field, value, f"an integer {span}")
    if value < minimum or (maximum is not None and value > maximum):
        refuse(field, value, span)


def check_float(
    field: str, value: Any, minimum: float, maximum: float = math.inf, *, above_minimum: bool = False
) -> None:
    """Require a finite number in [minimum, maximum], or (minimum, maximum] with `above_minimum`.

    Raises
    ------
    InvalidArgumentError
        The value is no number, not finite, or lies outside.
    """
    opening = "(" if above_minimum else "["
    span = f"{opening}{minimum}, {maximum}" + (")" if math.isinf(maximum) else "]")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        refuse(field, value, f"a finite number in {span}")
    if value < minimum or value > maximum or (above_minimum and value == minimum):
        refuse(field, value, f"in {span}")


MAX_ADAPTER_WEIGHT = 1000.0


def check_adapter_weight(value: Any) -> None:
    """Require a number in (0, 1000].

    Raises
    ------
    InvalidArgumentError
        The value is none.
    """
    check_float("weight", value, 0.0, MAX_ADAPTER_WEIGHT, above_minimum=True)


def check_bool(field: str, value: Any) -> None:
    """Require True or False.

    Raises
    ------
    InvalidArgumentError
        The value is not a boolean.
    """
    if not isinstance(value, bool):
        refuse(field, value, "True or False")


def check_text(field: str, value: Any) -> None:
    """Require a non-empty string of valid Unicode, without NUL.

    Raises
    ------
    InvalidArgumentError
        The value is no string, is empty, or holds half a surrogate pair or a NUL, which no file name,
        message or tokenizer can carry.
    """
    if not isinstance(value, str) or not value:
        refuse(field, value, "a non-empty string")
    if "\0" in value or not is_valid_unicode(value):
        refuse(field, value, "valid Unicode without NUL characters")


def is_valid_unicode(text: str) -> bool:
    """True when the text has no half surrogate pairs, so that it can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
