"""Loading, unloading and listing adapters."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.field_checks import check_adapter_weight
from lora_serve.engine.messages import LoadAdapterResult, UnloadAdapterResult
from lora_serve.engine.status import AdapterInfo
from lora_serve.server.adapter_selection import check_adapter_name
from lora_serve.server.caller import Caller
from lora_serve.server.context import ServerContext, context_of
from lora_serve.server.openapi import body_schema
from lora_serve.server.protocol.adapters import (
    LoadAdapterRequest,
    LoadAdapterResponse,
    ModelCard,
    ModelList,
    UnloadAdapterRequest,
    UnloadAdapterResponse,
)
from lora_serve.server.request_body import read_body
from lora_serve.server.request_errors import RequestError

router = APIRouter()

_TENANT_FIELDS = ("name", "path", "content_digest", "lora_rank", "num_bytes", "is_serving")


@router.post(
    "/load_lora_adapter",
    openapi_extra=body_schema(LoadAdapterRequest),
    responses={200: {"model": LoadAdapterResponse}},
)
@router.post(
    "/v1/load_lora_adapter",
    openapi_extra=body_schema(LoadAdapterRequest),
    responses={200: {"model": LoadAdapterResponse}},
)
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter; answer when it is ready to serve.

    A path that does not exist or cannot be served is 400, as any other bad adapter: 404 is kept for names.
    The load goes on when the client goes away, because others may already count on the name.
    """
    context = context_of(request)
    body = await read_body(request, LoadAdapterRequest, context.settings.max_body_bytes)
    result = await load_adapter(context, body)
    how = "was already loaded with this content" if result.already_loaded else "is loaded"
    answer = LoadAdapterResponse(
        message=f"adapter {body.lora_name!r} {how}",
        lora_name=body.lora_name,
        adapter_id=result.adapter_id,
        already_loaded=result.already_loaded,
        success=True,
        error_message=None,
    )
    if not request.url.path.startswith("/v1/"):
        answer.loaded_adapters = await _loaded_adapters(context)
    return Response(answer.to_json(), media_type="application/json")


async def load_adapter(context: ServerContext, body: LoadAdapterRequest) -> LoadAdapterResult:
    """Load an adapter for an operator; return when it is ready to serve.

    Raises
    ------
    RequestError
        The name, the weight or the path is wrong, or the adapter is refused.
    LoraServeError
        The engine could not load it.
    """
    try:
        check_adapter_name(body.lora_name, context.settings.served_model_name)
    except InvalidArgumentError as error:
        raise RequestError(str(error), param="lora_name", code="invalid_value") from None
    if not body.lora_path:
        raise RequestError(
            "lora_path is empty; give the adapter's folder", param="lora_path", code="invalid_value"
        )
    weight = _weight_of(body)
    try:
        result = await context.client.load_lora_adapter(
            body.lora_name,
            body.lora_path,
            load_inplace=bool(body.load_inplace),
            pinned=bool(body.pinned),
            weight=weight,
        )
    except InvalidArgumentError as error:
        raise RequestError(str(error), param="lora_path", code="invalid_adapter") from None
    if context.autoloader is not None:
        context.autoloader.disown(body.lora_name)
    return result


async def unload_adapter(context: ServerContext, body: UnloadAdapterRequest) -> UnloadAdapterResult:
    """Unload an adapter for an operator; return when its requests have ended and its memory is free.

    Raises
    ------
    RequestError
        The name is empty.
    AdapterNotFoundError
        It does not serve.
    PermissionDeniedError
        The caller may not unload.
    """
    if not body.lora_name:
        raise RequestError("lora_name is empty; name an adapter", param="lora_name", code="invalid_value")
    context.caller.require_may_load()
    if context.autoloader is not None:
        context.autoloader.disown(body.lora_name)
    return await context.client.unload_lora_adapter(body.lora_name, force=bool(body.force))


async def _loaded_adapters(context: ServerContext) -> dict[str, str]:
    adapters = await context.client.list_lora_adapters()
    return {adapter.name: adapter.path for adapter in adapters if adapter.is_serving}


def _weight_of(body: LoadAdapterRequest) -> float:
    weight = 1.0 if body.weight is None else body.weight
    try:
        check_adapter_weight(weight)
    except InvalidArgumentError as error:
        raise RequestError(str(error), param="weight", code="invalid_value") from None
    return weight


@router.post(
    "/unload_lora_adapter",
    openapi_extra=body_schema(UnloadAdapterRequest),
    responses={200: {"model": UnloadAdapterResponse}},
)
@router.post(
    "/v1/unload_lora_adapter",
    openapi_extra=body_schema(UnloadAdapterRequest),
    responses={200: {"model": UnloadAdapterResponse}},
)
async def unload_lora_adapter(request: Request) -> Response:
    """Unload an adapter; answer when its requests have ended and its memory is free."""
    context = context_of(request)
    body = await read_body(request, UnloadAdapterRequest, context.settings.max_body_bytes)
    await unload_adapter(context, body)
    answer = UnloadAdapterResponse(
        message=f"adapter {body.lora_name!r} is unloaded",
        lora_name=body.lora_name,
        success=True,
        error_message=None,
    )
    if not request.url.path.startswith("/v1/"):
        answer.loaded_adapters = await _loaded_adapters(context)
    return Response(answer.to_json(), media_type="application/json")


@router.get("/v1/models", responses={200: {"model": ModelList}})
async def list_models(request: Request) -> Response:
    """Give every name that `model` may be: the base model first, then the adapters."""
    context = context_of(request)
    client, settings = context.client, context.settings

    def card(name: str, root: str, parent: str | None) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=context.started_at,
            owned_by="lora_serve",
            root=root,
            parent=parent,
            max_model_len=client.model_info.max_model_len,
        )

    cards = [card(settings.served_model_name, settings.model_path, None)]
    for adapter in await client.list_lora_adapters():
        if adapter.is_serving:
            cards.append(card(adapter.name, adapter.path, settings.served_model_name))
    return Response(ModelList(object="list", data=cards).to_json(), media_type="application/json")


@router.get("/v1/loras")
async def list_loras(request: Request) -> JSONResponse:
    """Give every adapter generation with its state, bytes, requests and pages, and the engine's totals.

    `status`, `loras` and `count` are Dynamo's: the names that serve, with their generations.
    A tenant gets its own adapters, without what others could have changed, and no totals.
    """
    context = context_of(request)
    adapters = await context.client.list_lora_adapters()
    answer = {
        "object": "list",
        "status": "success",
        "base_model": context.settings.served_model_name,
        "data": [shown_adapter(adapter, context.caller) for adapter in adapters],
    }
    if not context.caller.sees_everything:
        return JSONResponse(answer)
    stats = await context.client.stats()
    loras = {adapter.name: adapter.adapter_id for adapter in adapters if adapter.is_serving}
    return JSONResponse(
        {
            **answer,
            "count": len(loras),
            "loras": loras,
            "tiers": {tier: _tier_totals(adapters, tier) for tier in ("device", "host")},
            "stats": msgspec.to_builtins(stats),
        }
    )


def shown_adapter(adapter: AdapterInfo, caller: Caller) -> dict[str, Any]:
    """Give an adapter as JSON, with those fields that the caller may see.

    A tenant sees what the adapter is, and whether it serves. Its counts, place and generation
    depend on what others do with it, or with the memory.
    """
    fields: dict[str, Any] = msgspec.to_builtins(adapter)
    if caller.sees_everything:
        return fields
    return {name: fields[name] for name in _TENANT_FIELDS}


def _tier_totals(adapters: list[AdapterInfo], tier: str) -> dict[str, Any]:
    on_tier = [adapter for adapter in adapters if adapter.tier == tier]
    return {"num_adapters": len(on_tier), "num_bytes": sum(adapter.num_bytes for adapter in on_tier)}
