"""Whether the server lives, and what it is."""

from __future__ import annotations

from importlib import metadata

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from lora_serve.server.context import context_of
from lora_serve.server.error_handlers import error_body, retry_header, translate_error

router = APIRouter()


def package_version() -> str:
    """Give the installed package's version; '0+source' when it runs from a source tree."""
    try:
        return metadata.version("lora-serve")
    except metadata.PackageNotFoundError:
        return "0+source"


@router.get("/health")
@router.get("/health/ready")
async def health(request: Request) -> JSONResponse:
    """Answer 200 as long as requests are served, else 503 with the reason.

    Not while the server drains, or its engine is started again: balancers then send requests elsewhere.
    """
    context = context_of(request)
    client = context.client
    refusal = context.lifecycle.why_not_serving()
    if refusal is not None:
        _, body = translate_error(refusal, context.shutdown, context.caller)
        return JSONResponse(body, status_code=503, headers=retry_header(refusal))
    if client.is_healthy:
        return JSONResponse({"status": "ok"})
    reason = client.failure or "the engine is not running"
    return JSONResponse(error_body(reason, "internal_error", code="engine_stopped"), status_code=503)


@router.get("/health/live")
async def live(request: Request) -> JSONResponse:
    """Answer 200 unless only a new process can help: whoever runs the server then starts it again."""
    context = context_of(request)
    if context.client.is_healthy or not context.lifecycle.has_given_up:
        return JSONResponse({"status": "ok", "phase": context.lifecycle.phase.value})
    reason = context.client.failure or "the engine is not running"
    return JSONResponse(error_body(reason, "internal_error", code="engine_stopped"), status_code=503)


@router.get("/version")
async def version() -> JSONResponse:
    """Give the server's version."""
    return JSONResponse({"version": package_version()})
