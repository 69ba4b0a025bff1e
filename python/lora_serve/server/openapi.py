"""The server's OpenAPI schema, with the bodies that the routes read themselves and every error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lora_serve.server.protocol.base import RequestModel
from lora_serve.server.protocol.errors import ErrorResponse

_REFERENCE = "#/components/schemas/{model}"
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENT_STREAM: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}
"""A route's `content` of status 200 where a request may ask for a stream; the schema is of one event."""
_ERROR_STATUSES = {"4XX": "The request is refused", "5XX": "The server cannot serve it"}


def body_schema(model: type[RequestModel]) -> dict[str, Any]:
    """Give a route's `openapi_extra` for a JSON body."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install_openapi(app: FastAPI, models: Sequence[type[RequestModel]]) -> None:
    """Let the application's schema define the request bodies that `body_schema` refers to, and the errors.

    A route that declares errors of its own under '4XX' and '5XX', in a dialect's shape, keeps them.

    Parameters
    ----------
    app : FastAPI
        The application.
    models : sequence of type of RequestModel
        Every request body.
    """
    make_schema = app.openapi
    bodies: list[type[BaseModel]] = [*models, ErrorResponse]

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make_schema()
            _, definitions = models_json_schema(
                [(model, "validation") for model in bodies], ref_template=_REFERENCE
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            for operations in schema["paths"].values():
                for operation in operations.values():
                    _declare_errors(operation["responses"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _declare_errors(responses: dict[str, Any]) -> None:
    # FastAPI's own shape for wrong parameters; every parameter here is a string, which cannot be wrong.
    responses.pop("422", None)
    schema = {"$ref": _REFERENCE.format(model=ErrorResponse.__name__)}
    for status, description in _ERROR_STATUSES.items():
        error = {"description": description, "content": {"application/json": {"schema": schema}}}
        responses.setdefault(status, error)
