"""The one place where errors become HTTP answers, of the shape {"error": {...}} or a dialect's own."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from lora_serve.common.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    CapacityError,
    InternalError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    QueueTimeoutError,
)
from lora_serve.server.caller import Caller, PermissionDeniedError, caller_of
from lora_serve.server.context import Shutdown, context_of
from lora_serve.server.current_request import current_request_id
from lora_serve.server.error_shapes import shape_of
from lora_serve.server.lifecycle import NotServingError
from lora_serve.server.request_errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    GenerationAbortedError,
    ServerShutdownError,
    TooManyRequestsError,
)

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Status in the log of a request whose client went away; nobody receives it."""

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

_STATUS_OF_ERROR: tuple[tuple[type[LoraServeError], int, str, str | None], ...] = (
    (BodyTimeoutError, 408, "invalid_request_error", "body_timeout"),
    (BodyTooLargeError, 413, "invalid_request_error", "body_too_large"),
    (InvalidArgumentError, 400, "invalid_request_error", None),
    (AdapterNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (PermissionDeniedError, 403, "permission_error", "permission_denied"),
    (AdapterConflictError, 409, "invalid_request_error", "adapter_conflict"),
    (QueueTimeoutError, 503, "rate_limit_error", "queue_timeout"),
    (CapacityError, 429, "rate_limit_error", "no_capacity"),
    (NotServingError, 503, "internal_error", None),
    (ServerShutdownError, 503, "internal_error", "shutting_down"),
    (GenerationAbortedError, 424, "internal_error", "aborted"),
)

_NO_ROOM = (
    "the server has no room for this now, or the request asks for more at once than it takes; send it again "
    "later, or ask for less"
)
_CONFLICT = (
    "the adapter was loaded, replaced or unloaded meanwhile, or its files were changed; send the request "
    "again, and ask the operator if that does not help"
)


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Give an error in OpenAI's shape.

    Parameters
    ----------
    message : str
        What was found, what was expected and what to do.
    kind : str
        The error's class, such as 'invalid_request_error'.
    param : str or None
        The request's field.
    code : str or None
        A short word for programs.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def translate_error(error: BaseException, shutdown: Shutdown, caller: Caller) -> tuple[int, dict[str, Any]]:
    """Give the HTTP status and body of an error.

    Parameters
    ----------
    error : BaseException
        Whatever was raised. Of errors that lora_serve did not raise on purpose nothing is shown.
    shutdown : Shutdown
        Once it has begun, the engine's failures are its doing.
    caller : Caller
        Who is answered. A tenant is told nothing that could name adapters or paths of others, or count what
        they do: not why the server failed, nor what is full or has changed. Whoever calls this writes the
        reason to the log.

    Returns
    -------
    tuple of int and dict
        The status, and the body in OpenAI's shape.
    """
    if shutdown.has_begun and isinstance(error, InternalError):
        error = ServerShutdownError()
    param: str | None = getattr(error, "param", None)
    code: str | None = getattr(error, "code", None)
    for error_type, status, kind, default_code in _STATUS_OF_ERROR:
        if isinstance(error, error_type):
            message = _message_for(error, caller)
            return status, error_body(message, kind, param=param, code=code or default_code)
    if isinstance(error, LoraServeError) and caller.sees_everything:
        message = str(error)
    else:
        request_id = current_request_id()
        message = f"the server failed on this request; the reason is in its log, at request {request_id}"
    return 500, error_body(message, "internal_error", code="internal_error")


def _message_for(error: BaseException, caller: Caller) -> str:
    """Give what a caller may read of an error that is no failure; the engine's may name what is others'."""
    if caller.sees_everything or isinstance(error, (QueueTimeoutError, TooManyRequestsError)):
        return str(error)
    if isinstance(error, CapacityError):
        return _NO_ROOM
    if isinstance(error, AdapterConflictError):
        return _CONFLICT
    return str(error)


def retry_header(error: BaseException) -> dict[str, str]:
    """Give the headers that say when another try is worth it, where waiting helps, and over what."""
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    if isinstance(error, BodyTimeoutError):  # The rest of the body would be read as the next request.
        headers["Connection"] = "close"
    return headers


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of the application be answered in OpenAI's shape, never with a stack trace."""
    app.add_exception_handler(LoraServeError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_error)


async def _answer_error(request: Request, error: Exception) -> Response:
    status, body = translate_error(error, context_of(request).shutdown, caller_of(request))
    if isinstance(error, (AdapterConflictError, CapacityError)):
        logger.info("%s %s: refused with %d: %s", request.method, request.url.path, status, error)
    elif status == HTTPStatus.SERVICE_UNAVAILABLE:
        logger.warning("%s %s: ended with %d: %s", request.method, request.url.path, status, error)
    elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s %s failed: %s", request.method, request.url.path, error)
    status, body = shape_of(request.scope)(status, body)
    return JSONResponse(body, status_code=status, headers=retry_header(error))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    message, headers = str(error.detail), error.headers
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"there is no endpoint {path}; GET /openapi.json lists the endpoints"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = _allowed_methods(request)
        message = f"{path} does not answer {method}; use {' or '.join(allowed)}"
        headers = {**(headers or {}), "Allow": ", ".join(allowed)}
    body = error_body(message, "invalid_request_error", code=HTTPStatus(error.status_code).name.lower())
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """Give the methods of all routes of a path: the error's own header has those of the first one only."""
    return [
        method
        for method in _METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


async def _answer_nobody(request: Request, _error: Exception) -> Response:
    logger.info("%s %s: the client went away", request.method, request.url.path)
    return Response(status_code=CLIENT_CLOSED_REQUEST)
