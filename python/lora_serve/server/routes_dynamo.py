"""Dynamo's endpoints that load and unload adapters; its list is GET /v1/loras of `routes_adapters`."""

from __future__ import annotations

from urllib.parse import unquote

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lora_serve.server.context import context_of
from lora_serve.server.openapi import body_schema
from lora_serve.server.protocol.adapters import (
    LoadAdapterRequest,
    LoadLoraRequest,
    LoraResponse,
    UnloadAdapterRequest,
)
from lora_serve.server.request_body import read_body
from lora_serve.server.request_errors import RequestError
from lora_serve.server.routes_adapters import load_adapter, unload_adapter

router = APIRouter()

FILE_SCHEME = "file://"


@router.post(
    "/v1/loras", openapi_extra=body_schema(LoadLoraRequest), responses={200: {"model": LoraResponse}}
)
async def load_lora(request: Request) -> Response:
    """Load an adapter, in Dynamo's form; answer when it is ready to serve."""
    context = context_of(request)
    body = await read_body(request, LoadLoraRequest, context.settings.max_body_bytes)
    path = local_path_of(body.source.uri)
    result = await load_adapter(context, LoadAdapterRequest(lora_name=body.lora_name, lora_path=path))
    how = "was already loaded with this content" if result.already_loaded else "is loaded"
    return _answer(f"adapter {body.lora_name!r} {how}", body.lora_name, result.adapter_id)


@router.delete("/v1/loras/{lora_name:path}", responses={200: {"model": LoraResponse}})
async def unload_lora(request: Request, lora_name: str) -> Response:
    """Unload an adapter, in Dynamo's form; answer when its requests have ended and its memory is free."""
    result = await unload_adapter(context_of(request), UnloadAdapterRequest(lora_name=lora_name))
    newest = max(result.adapter_ids, default=0)
    return _answer(f"adapter {lora_name!r} is unloaded", lora_name, newest)


def local_path_of(uri: str) -> str:
    """Give the path of a file:// URI; anything else as it is.

    Raises
    ------
    RequestError
        The URI is empty, or names another machine or no path.
    """
    if not uri:
        raise RequestError(
            "source.uri is empty; give the adapter's folder", param="source.uri", code="invalid_value"
        )
    if not uri.startswith(FILE_SCHEME):
        return uri
    host, slash, path = uri.removeprefix(FILE_SCHEME).partition("/")
    if host not in ("", "localhost") or not path or "?" in path or "#" in path:
        raise RequestError(
            f"source.uri is {uri!r} but must be file:///path with a path of this machine",
            param="source.uri",
            code="invalid_value",
        )
    return unquote(slash + path)


def _answer(message: str, lora_name: str, adapter_id: int) -> Response:
    answer = LoraResponse(status="success", message=message, lora_name=lora_name, lora_id=adapter_id)
    return Response(answer.to_json(), media_type="application/json")
