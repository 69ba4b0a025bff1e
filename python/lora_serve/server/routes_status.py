"""Whether the server lives, and what it is."""

from __future__ import annotations

from importlib import metadata

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from lora_serve.server.context import context_of
from lora_serve.server.error_handlers import error_body

router = APIRouter()


def package_version() -> str:
    """Give the installed package's version; '0+source' when it runs from a source tree."""
    try:
        return metadata.version("lora-serve")
    except metadata.PackageNotFoundError:
        return "0+source"


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Answer 200 as long as the engine can serve, else 503 with the reason."""
    client = context_of(request).client
    if client.is_healthy:
        return JSONResponse({"status": "ok"})
    reason = client.failure or "the engine is not running"
    return JSONResponse(error_body(reason, "internal_error", code="engine_stopped"), status_code=503)


@router.get("/version")
async def version() -> JSONResponse:
    """Give the server's version."""
    return JSONResponse({"version": package_version()})
