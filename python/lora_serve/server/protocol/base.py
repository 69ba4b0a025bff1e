"""What every request body shares: strict types, and no field that is silently ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

UNSUPPORTED_FIELD = "unsupported_field"
"""Type of the validation error of a field that is known and not served."""
WRONG_KIND = "wrong_kind"
"""Type of the validation error of a field that has none of its accepted shapes."""


class RequestModel(BaseModel):
    """A request body: unknown fields are errors, and strings are not numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ResponseModel(BaseModel):
    """A response body; only the fields that were set are written."""

    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """Serialise the fields that were set."""
        return self.model_dump_json(exclude_unset=True)


def refuse_unless(*harmless: object, because: str) -> Callable[[Any], Any]:
    """Make a validator for a field that other servers know: only values that change nothing are accepted.

    Parameters
    ----------
    *harmless : object
        Accepted values, besides null.
    because : str
        What is not supported, and what to do.

    Returns
    -------
    Callable
        For `pydantic.AfterValidator`; it raises PydanticCustomError of type UNSUPPORTED_FIELD.
    """

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(known) and value == known for known in harmless):
            return value
        raise PydanticCustomError(UNSUPPORTED_FIELD, "{because}", {"because": because})

    return check
