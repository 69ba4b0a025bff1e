"""From the bytes of a request to a checked body, with errors that name the field."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lora_serve.server.context import context_of
from lora_serve.server.protocol.base import UNSUPPORTED_FIELD, WRONG_KIND, RequestModel
from lora_serve.server.request_errors import BodyTooLargeError, RequestError

RequestModelT = TypeVar("RequestModelT", bound=RequestModel)

# Tags of the protocol's unions: no names of fields.
_UNION_TAGS = frozenset(
    {"#string", "#list", "#parts", "#text", "#texts", "#tokens", "#token_lists", "#name", "#object"}
)
_WHAT_TO_DO = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
    "too_short": "a list with at least one entry",
}
_found = reprlib.Repr()
_found.maxstring = 60


async def read_body(request: Request, model: type[RequestModelT], max_body_bytes: int) -> RequestModelT:
    """Read and check a request's JSON body.

    Parameters
    ----------
    request : Request
        The request, whose body has not been read.
    model : type of RequestModel
        What the body must be.
    max_body_bytes : int
        Longest accepted body in bytes.

    Returns
    -------
    RequestModel
        The checked body.

    Raises
    ------
    RequestError
        The body is not JSON in UTF-8, or a field is missing, unknown, of a wrong type or not supported.
    BodyTooLargeError
        The body is longer than `max_body_bytes`.
    NotServingError
        The engine has ended while the body was on its way, and is being started again.
    starlette.requests.ClientDisconnect
        The client went away before its body was complete.
    """
    body = await _read_bytes(request, max_body_bytes)
    context_of(request).lifecycle.require_engine()
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise describe_validation_error(error.errors(include_url=False)) from None


async def _read_bytes(request: Request, max_body_bytes: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    too_large = BodyTooLargeError(
        f"the request's body has more than {max_body_bytes} bytes; send fewer or shorter prompts"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_body_bytes:
        raise too_large
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_body_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def _show(value: object) -> str:
    """Quote a found value, shortened; JSON's words for what Python calls differently."""
    words = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return words[value]
    return _found.repr(value)


def _field_of(detail: ErrorDetails) -> str:
    """Give the path of the field, 'messages.0.content'; the last part is always the client's own word."""
    *path, last = detail["loc"] or ("",)
    return ".".join([str(part) for part in path if part not in _UNION_TAGS] + [str(last)])


def describe_validation_error(details: Sequence[ErrorDetails]) -> RequestError:
    """Make one error of pydantic's list: the first entry, which names its field.

    Parameters
    ----------
    details : sequence of ErrorDetails
        At least one entry.

    Returns
    -------
    RequestError
        With `param` set unless the body as a whole is wrong.
    """
    detail = details[0]
    kind = detail["type"]
    field = _field_of(detail)
    if kind == "json_invalid":
        reason = detail["msg"].removeprefix("Invalid JSON: ")
        return RequestError(
            f"the request's body is not valid JSON: {reason}; send a JSON object in UTF-8",
            code="invalid_json",
        )
    if not field:
        return RequestError(
            f"the request's body is {_show(detail['input'])} but must be a JSON object",
            code="invalid_type",
        )
    if kind == "missing":
        return RequestError(f"{field} is missing but required; add it", param=field, code="missing_field")
    if kind == "extra_forbidden":
        return RequestError(
            f"{field} is not a field of this request; unknown fields are refused, because ignoring one could "
            "change the answer: remove it or correct its spelling",
            param=field,
            code="unknown_field",
        )
    if kind == UNSUPPORTED_FIELD:
        return RequestError(f"{field}: {detail['msg']}", param=field, code=UNSUPPORTED_FIELD)
    if kind == WRONG_KIND:
        expected = detail["msg"].removeprefix("must be ")
    else:
        expected = _WHAT_TO_DO.get(kind, detail["msg"].removeprefix("Input should be "))
    return RequestError(
        f"{field} is {_show(detail['input'])} but must be {expected}", param=field, code="invalid_value"
    )
