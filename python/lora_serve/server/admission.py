"""Which requests are let in: the server's life and its limits decide before any body is read."""

from __future__ import annotations

import asyncio
from collections import Counter

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.common.errors import LoraServeError
from lora_serve.server.auth import OPEN_PATHS
from lora_serve.server.caller import Caller, caller_of_scope
from lora_serve.server.context import Shutdown
from lora_serve.server.error_handlers import retry_header, translate_error
from lora_serve.server.error_shapes import shape_of
from lora_serve.server.lifecycle import Lifecycle
from lora_serve.server.request_errors import BodyTimeoutError, TooManyRequestsError

ALWAYS_ANSWERED = OPEN_PATHS | {"/metrics", "/version"}
"""Paths that are answered in every phase."""
RETRY_AFTER_S = 1
_UNLIMITED_SUFFIXES = ("load_lora_adapter", "/v1/loras")


class AdmissionMiddleware:
    """Refuses what the server cannot take now, and counts what it has taken.

    While it drains or its engine is started again that is everything but probes (503); beyond a limit on
    requests at once, every further one that asks for tokens (429). Streams count until their last byte.

    Parameters
    ----------
    app : ASGI application
        What serves the others.
    lifecycle : Lifecycle
        Where the server is in its life.
    shutdown : Shutdown
        For the translation of errors.
    max_requests : int
        Most requests at once, of all keys; 0 = no limit.
    max_requests_per_key : int
        Most requests at once of one key; 0 = no limit. Keys of one name count together.
    """

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle,
        shutdown: Shutdown,
        max_requests: int = 0,
        max_requests_per_key: int = 0,
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._shutdown = shutdown
        self._max_requests = max_requests
        self._max_requests_per_key = max_requests_per_key
        self._num_of_key: Counter[str] = Counter()
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        refusal: LoraServeError | None = self._lifecycle.why_not_serving()
        # Loads are rare and wait for each other anyway; listings take no time.
        is_counted = scope["method"] == "POST" and not scope["path"].endswith(_UNLIMITED_SUFFIXES)
        caller = caller_of_scope(scope)
        if refusal is None and is_counted:
            refusal = self._why_too_many(caller)
        if refusal is not None:
            status, body = shape_of(scope)(*translate_error(refusal, self._shutdown, caller))
            await JSONResponse(body, status_code=status, headers=retry_header(refusal))(scope, receive, send)
            return
        with self._lifecycle.request():
            await self._serve(scope, receive, send, caller.name if is_counted else None)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, key: str | None) -> None:
        if key is None:
            await self._app(scope, receive, send)
            return
        self._num_requests += 1
        self._num_of_key[key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_requests -= 1
            self._num_of_key[key] -= 1
            if not self._num_of_key[key]:
                del self._num_of_key[key]

    def _why_too_many(self, caller: Caller) -> TooManyRequestsError | None:
        if 0 < self._max_requests_per_key <= self._num_of_key[caller.name]:
            return TooManyRequestsError(
                f"this API key has {self._max_requests_per_key} requests at once, which is its limit; send "
                "the request again when one of them has ended",
                RETRY_AFTER_S,
            )
        if 0 < self._max_requests <= self._num_requests:
            return TooManyRequestsError(
                "the server has as many requests at once as it takes; send the request again later",
                RETRY_AFTER_S,
            )
        return None


class BodyTimeoutMiddleware:
    """Gives a client so long to send its request's body; then the request fails with BodyTimeoutError.

    Parameters
    ----------
    app : ASGI application
        What reads the body.
    timeout_s : float
        Seconds from the end of the headers to the end of the body.
    """

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        is_complete = False

        async def receive_in_time() -> Message:
            nonlocal is_complete
            if is_complete:  # From now on only the client's going away can come, at any time.
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline_s - loop.time())
            except asyncio.TimeoutError:
                raise BodyTimeoutError(self._timeout_s) from None
            is_complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)
