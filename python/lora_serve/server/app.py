"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI

from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.server import (
    routes_adapters,
    routes_chat,
    routes_completions,
    routes_dynamo,
    routes_lorax,
    routes_metrics,
    routes_page,
    routes_status,
    routes_tokens,
)
from lora_serve.server.auth import ApiKeyMiddleware
from lora_serve.server.autoload import AdapterAutoloader
from lora_serve.server.cancellation import CancellationMiddleware
from lora_serve.server.context import ServerContext
from lora_serve.server.error_handlers import install_error_handlers
from lora_serve.server.metrics.server_metrics import ServerMetrics
from lora_serve.server.openapi import install_openapi
from lora_serve.server.protocol.adapters import LoadAdapterRequest, LoadLoraRequest, UnloadAdapterRequest
from lora_serve.server.protocol.chat import ChatCompletionRequest
from lora_serve.server.protocol.completion import CompletionRequest
from lora_serve.server.protocol.lorax import LoraxRequest
from lora_serve.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from lora_serve.server.settings import ServerSettings

REQUEST_BODIES = (
    CompletionRequest,
    ChatCompletionRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    LoadLoraRequest,
    LoraxRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def create_app(client: AsyncEngineClient, settings: ServerSettings) -> FastAPI:
    """Make the application that serves an engine over HTTP.

    Parameters
    ----------
    client : AsyncEngineClient
        A started client, which stays the caller's to close.
    settings : ServerSettings
        The server's settings.

    Returns
    -------
    FastAPI
        An ASGI application.
    """
    app = FastAPI(
        title="lora_serve",
        version=routes_status.package_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    autoloader = None
    if settings.autoload is not None:
        autoloader = AdapterAutoloader(client, settings.autoload, settings.served_model_name)
    metrics = ServerMetrics(client, settings.served_model_name, settings.metrics_max_adapters)
    context = ServerContext(client=client, settings=settings, metrics=metrics, autoloader=autoloader)
    app.state.context = context
    for routes in (
        routes_completions,
        routes_chat,
        routes_adapters,
        routes_dynamo,
        routes_lorax,
        routes_status,
        routes_metrics,
        routes_tokens,
    ):
        app.include_router(routes.router)
    if settings.operator_page:
        app.include_router(routes_page.make_router())
    install_error_handlers(app)
    install_openapi(app, REQUEST_BODIES)
    if settings.api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=settings.api_keys)
    app.add_middleware(CancellationMiddleware, shutdown=context.shutdown)
    return app
