"""API keys."""

from __future__ import annotations

import hashlib
import hmac
import os

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lora_serve.server.api_keys import ApiKeys
from lora_serve.server.caller import STRANGER, Caller, set_caller
from lora_serve.server.error_handlers import error_body
from lora_serve.server.error_shapes import shape_of

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
"""Paths that need no key, so that a load balancer can probe them."""
OPEN_PAGE = "/"
"""Path that needs no key with GET: the operator page, which holds nothing and asks for a key itself."""


class ApiKeyMiddleware:
    """Answers 401 unless a request shows one of the keys as `Authorization: Bearer KEY`; notes whose it is.

    A plain ASGI layer in front of the routes: unknown paths need a key too, so that nothing can be probed.

    Parameters
    ----------
    app : ASGI application
        What serves requests that show a key.
    keys : ApiKeys
        The keys; it may want none.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys
        # Looked up by a digest that nobody outside can compute, so the time tells nothing about a key, and
        # does not grow with their number.
        self._secret = os.urandom(32)
        self._callers = {self._digest(key.encode("ascii")): who for key, who in keys.callers().items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = self._find_caller(scope)
        if caller is None and _is_open(scope):
            caller = STRANGER
        if caller is not None:
            set_caller(scope, caller)
            await self._app(scope, receive, send)
            return
        body = error_body(
            "the API key is missing or wrong; send the header 'Authorization: Bearer KEY' with a key "
            "that the server was started with",
            "authentication_error",
            code="invalid_api_key",
        )
        status, body = shape_of(scope)(401, body)
        response = JSONResponse(body, status_code=status, headers={"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _find_caller(self, scope: Scope) -> Caller | None:
        """Give whose key the request shows; None when it shows none and has to."""
        shown: bytes = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                shown = value
        scheme, _, key = shown.partition(b" ")
        caller = self._callers.get(self._digest(key.strip()))
        if caller is not None and scheme.lower() == b"bearer":
            return caller
        return None if self._keys.asks_for_key else self._keys.nobody

    def _digest(self, key: bytes) -> bytes:
        return hmac.new(self._secret, key, hashlib.sha256).digest()


def _is_open(scope: Scope) -> bool:
    return scope["path"] in OPEN_PATHS or (scope["path"] == OPEN_PAGE and scope["method"] == "GET")
