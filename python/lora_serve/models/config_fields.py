"""Reading single fields of a config.json, each checked, each error with file, field, found and expected."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lora_serve.common.errors import InvalidArgumentError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises
    ------
    InvalidArgumentError
        The file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not valid JSON ({error}); restore or download it") from error
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


class ConfigFields:
    """One JSON object of a configuration file.

    A field that is missing or null takes the default; where there is no default it is refused.

    Parameters
    ----------
    subject
        The file, and the field within it where the object is nested, for messages.
    content
        The object.
    """

    def __init__(self, subject: str, content: Mapping[str, Any]) -> None:
        self.subject = subject
        self.content = content

    def refuse(self, field: str, expected: str) -> NoReturn:
        """Raise an InvalidArgumentError about a field.

        Raises
        ------
        InvalidArgumentError
            Always.
        """
        found = repr(self.content[field]) if field in self.content else "missing"
        raise InvalidArgumentError(f"{self.subject}: {field} is {found}, expected {expected}")

    def positive_int(self, field: str, default: int | None = None) -> int:
        """Read a whole number of at least 1.

        Raises
        ------
        InvalidArgumentError
            It is something else, or missing without a default.
        """
        value = self.optional_positive_int(field)
        if value is None:
            value = default
        if value is None:
            self.refuse(field, "a whole number of at least 1")
        return value

    def optional_positive_int(self, field: str) -> int | None:
        """Read a whole number of at least 1, or None where the field is missing or null.

        Raises
        ------
        InvalidArgumentError
            It is something else.
        """
        value = self.content.get(field)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(field, "a whole number of at least 1")
        return value

    def flag(self, field: str, default: bool) -> bool:
        """Read a boolean.

        Raises
        ------
        InvalidArgumentError
            It is something else.
        """
        value = self.content.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(field, "true or false")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """Read a finite number above 0.

        Raises
        ------
        InvalidArgumentError
            It is something else, or missing without a default.
        """
        value = self.optional_number(field)
        if value is None:
            value = default
        if value is None:
            self.refuse(field, "a number above 0")
        return value

    def optional_number(self, field: str) -> float | None:
        """Read a finite number above 0, or None where the field is missing or null.

        Raises
        ------
        InvalidArgumentError
            It is something else.
        """
        value = self.content.get(field)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            self.refuse(field, "a number above 0")
        return float(value)
