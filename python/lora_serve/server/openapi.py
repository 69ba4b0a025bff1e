"""The server's OpenAPI schema, with the bodies that the routes read themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from lora_serve.server.protocol.base import RequestModel

_REFERENCE = "#/components/schemas/{model}"


def body_schema(model: type[RequestModel]) -> dict[str, Any]:
    """Give a route's `openapi_extra` for a JSON body."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install_openapi(app: FastAPI, models: Sequence[type[RequestModel]]) -> None:
    """Let the application's schema define the request bodies that `body_schema` refers to.

    Parameters
    ----------
    app : FastAPI
        The application.
    models : sequence of type of RequestModel
        Every request body.
    """
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make_schema()
            _, definitions = models_json_schema(
                [(model, "validation") for model in models], ref_template=_REFERENCE
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
