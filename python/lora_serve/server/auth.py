"""API keys."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lora_serve.server.error_handlers import error_body

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key, so that a load balancer can probe them."""
OPEN_PAGE = "/"
"""Path that needs no key with GET: the operator page, which holds nothing and asks for a key itself."""


class ApiKeyMiddleware:
    """Answers 401 unless a request shows one of the keys as `Authorization: Bearer KEY`.

    A plain ASGI layer in front of the routes: unknown paths need a key too, so that nothing can be probed.

    Parameters
    ----------
    app : ASGI application
        What serves requests that show a key.
    api_keys : sequence of str
        At least one key.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._api_keys = [key.encode("ascii") for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or _is_open(scope) or self._shows_key(scope):
            await self._app(scope, receive, send)
            return
        body = error_body(
            "the API key is missing or wrong; send the header 'Authorization: Bearer KEY' with a key "
            "that the server was started with",
            "authentication_error",
            code="invalid_api_key",
        )
        response = JSONResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _shows_key(self, scope: Scope) -> bool:
        """Compare with every key in constant time, whichever matches."""
        shown: bytes = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                shown = value
        scheme, _, key = shown.partition(b" ")
        is_known = False
        for api_key in self._api_keys:
            is_known |= hmac.compare_digest(key.strip(), api_key)
        return is_known and scheme.lower() == b"bearer"


def _is_open(scope: Scope) -> bool:
    return scope["path"] in OPEN_PATHS or (scope["path"] == OPEN_PAGE and scope["method"] == "GET")
