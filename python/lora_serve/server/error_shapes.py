"""Errors as the clients of each dialect read them; by path, so that a refusal before any route has it too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.types import Scope

ErrorShape = Callable[[int, dict[str, Any]], tuple[int, dict[str, Any]]]
"""From a status and a body in OpenAI's shape to what is sent."""


def shape_of(scope: Scope) -> ErrorShape:
    """Give the shape of a request's errors; OpenAI's where its path belongs to no other dialect."""
    method, path = scope["method"], scope["path"]
    if method == "POST" and path in ("/", "/generate", "/generate_stream"):
        return lorax_error
    if path.endswith("load_lora_adapter"):
        return _with_sglang_fields
    if (method == "POST" and path == "/v1/loras") or (method == "DELETE" and path.startswith("/v1/loras/")):
        return _with_dynamo_fields
    return _keep_shape


def lorax_error(status: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Give LoRAX's shape of an error: what is wrong with a request is 422 there."""
    kind, code = body["error"]["type"], body["error"]["code"]
    error_type = "generation"
    if code == "model_not_found":
        error_type = "adapter_not_found"
    elif kind == "rate_limit_error":
        error_type = "overloaded"
    elif kind == "invalid_request_error" and code != "adapter_conflict":
        error_type = "validation"
    return 422 if status == 400 else status, {"error": body["error"]["message"], "error_type": error_type}


def _with_sglang_fields(status: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return status, {**body, "success": False, "error_message": body["error"]["message"]}


def _with_dynamo_fields(status: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return status, {**body, "status": "error", "message": body["error"]["message"]}


def _keep_shape(status: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return status, body
