"""The operator page: one HTML file, which asks the other endpoints for what it shows."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

_PAGE = Path(__file__).resolve().parent / "assets" / "operator_page.html"
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


def make_router() -> APIRouter:
    """Give the route of the page; its text and headers are made here, once."""
    content = _PAGE.read_bytes()
    headers = {
        "Content-Security-Policy": content_security_policy(content),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # After an upgrade, the page must be the one that knows the new server's answers.
        "Cache-Control": "no-cache",
    }
    router = APIRouter()

    # In the schema because LoRAX's POST has the same path, of which the schema tells all methods.
    page = {"content": {"text/html": {"schema": {"type": "string"}}}, "description": "The page"}

    @router.get("/", response_class=Response, responses={200: page})
    async def operator_page() -> Response:
        return Response(content, media_type="text/html", headers=headers)

    return router


def content_security_policy(page: bytes) -> str:
    """Give a policy under which only the page's own script and style run, and only its own server is asked.

    `trusted-types 'none'` forbids the script itself to make elements from text, so that a name never can.

    Parameters
    ----------
    page : bytes
        HTML in UTF-8; its `<script>` and `<style>` elements have no attributes and end their lines with LF.

    Returns
    -------
    str
        The header's value.
    """
    sources: dict[str, list[str]] = {"script": [], "style": []}
    for kind, inline in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode("ascii")
        sources[kind.decode("ascii")].append(f"'sha256-{digest}'")
    directives = [
        "default-src 'none'",
        f"script-src {' '.join(sources['script'])}",
        f"style-src {' '.join(sources['style'])}",
        "img-src data:",  # its icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return "; ".join(directives)
