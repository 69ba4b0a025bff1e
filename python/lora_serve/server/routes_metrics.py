"""/metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lora_serve.server.context import context_of

router = APIRouter()


_CONTENT: dict[str, Any] = {
    media_type: {"schema": {"type": "string"}}
    for media_type in ("text/plain", "application/openmetrics-text")
}


@router.get("/metrics", response_class=Response, responses={200: {"content": _CONTENT}})
async def metrics(request: Request) -> Response:
    """Give the server's metrics as Prometheus reads them; not to tenants, whom they would tell of others."""
    context = context_of(request)
    context.caller.require_sees_everything()
    page, content_type = await context.metrics.page(request.headers.get("accept", ""))
    return Response(page, headers={"Content-Type": content_type})
