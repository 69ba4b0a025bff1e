"""Every request has an id: its client's or a new one, in the answer's headers and in the log's lines."""

from __future__ import annotations

import logging
import re
import time
import uuid

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.server.caller import caller_of_scope
from lora_serve.server.context import Shutdown
from lora_serve.server.current_request import set_current_request_id
from lora_serve.server.error_handlers import translate_error
from lora_serve.server.error_shapes import shape_of

HEADER = b"x-request-id"
_VALID_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("lora_serve.access")
"""One line a request, where somebody has set its level to INFO."""


class RequestIdMiddleware:
    """Gives each request its id, and answers what nobody else has caught: the outermost layer of all.

    A client's own `X-Request-Id` is kept if it has 1 to 128 letters, digits or the characters ._:/+=@- .

    Parameters
    ----------
    app : ASGI application
        What is served.
    shutdown : Shutdown
        For the translation of errors.
    """

    def __init__(self, app: ASGIApp, shutdown: Shutdown) -> None:
        self._app = app
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _id_of(scope)
        status = 0
        begin_s = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id.encode())]}
            await send(message)

        # The server makes a task a request, so the variable is this request's alone.
        set_current_request_id(request_id)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if status:
                raise  # Nothing but the connection's end can tell the client now.
            status, body = translate_error(error, self._shutdown, caller_of_scope(scope))
            status, body = shape_of(scope)(status, body)
            await JSONResponse(body, status_code=status)(scope, receive, send_with_id)
        finally:
            if access_logger.isEnabledFor(logging.INFO):
                access_logger.info(
                    "%s %s %d in %.1f ms",
                    scope["method"],
                    scope["path"],
                    status,
                    1e3 * (time.monotonic() - begin_s),
                    extra={"status": status, "caller": caller_of_scope(scope).name},
                )


def _id_of(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == HEADER and _VALID_ID.fullmatch(value):
            return bytes(value).decode("ascii")
    return uuid.uuid4().hex
