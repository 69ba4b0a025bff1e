"""From a request's fields to the form that its answer must have."""

from __future__ import annotations

from typing import Any, Protocol

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.structured_outputs import KINDS, StructuredOutputsParams
from lora_serve.server.protocol.structured import ResponseFormat, StructuredOutputs
from lora_serve.server.request_errors import RequestError


class HasForm(Protocol):
    """A request with the two fields that ask for a form."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None


def form_of(request: HasForm) -> StructuredOutputsParams | None:
    """Give the form that a request asks for; None = its answer is free.

    Raises
    ------
    RequestError
        It asks for two forms, or for one that would not be kept to exactly.
    """
    wanted = request.response_format
    if wanted is not None and wanted.type == "text":
        wanted = None
    if request.structured_outputs is not None:
        if wanted is not None:
            raise RequestError(
                "structured_outputs and response_format both ask for a form; send one of them",
                param="structured_outputs",
                code="invalid_value",
            )
        fields = request.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        values: dict[str, Any] = {kind: fields[kind] for kind in KINDS if kind in fields}
        values["disable_any_whitespace"] = bool(request.structured_outputs.disable_any_whitespace)
        return build_form("structured_outputs", values)
    if wanted is None:
        return None
    if wanted.type == "json_object":
        return build_form("response_format", {"json_object": True})
    if wanted.json_schema is None:
        raise RequestError(
            "response_format.json_schema is missing but required with type 'json_schema'; add it",
            param="response_format.json_schema",
            code="missing_field",
        )
    return build_form("response_format.json_schema.schema", {"json": wanted.json_schema.schema_})


def build_form(param: str, values: dict[str, Any]) -> StructuredOutputsParams:
    """Construct the form, and name the request's field when it is refused.

    Raises
    ------
    RequestError
        With the reason.
    """
    try:
        return StructuredOutputsParams(**values)
    except InvalidArgumentError as error:
        raise RequestError(str(error), param=param, code="invalid_value") from None
