"""What becomes of requests that are cancelled because the server ends."""

from __future__ import annotations

import asyncio
import logging

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.server.caller import caller_of_scope
from lora_serve.server.context import Shutdown
from lora_serve.server.error_handlers import translate_error
from lora_serve.server.request_errors import ServerShutdownError

logger = logging.getLogger(__name__)


class CancellationMiddleware:
    """Answers requests that a shutdown cancels: those that do not wait for the engine, whose end they miss.

    Such a request is still sending its body, still being tokenised, or its client does not read the answer.

    Parameters
    ----------
    app : ASGI application
        What is served.
    shutdown : Shutdown
        Before it has begun, cancellation is left alone.
    """

    def __init__(self, app: ASGIApp, shutdown: Shutdown) -> None:
        self._app = app
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if not self._shutdown.has_begun:
                raise
            logger.warning("%s: cut off by the shutdown", scope["path"])
            if not has_started:
                status, body = translate_error(ServerShutdownError(), self._shutdown, caller_of_scope(scope))
                await JSONResponse(body, status_code=status)(scope, receive, send)
