"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI

from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.server import (
    routes_adapters,
    routes_chat,
    routes_completions,
    routes_status,
    routes_tokens,
)
from lora_serve.server.auth import ApiKeyMiddleware
from lora_serve.server.cancellation import CancellationMiddleware
from lora_serve.server.context import ServerContext
from lora_serve.server.error_handlers import install_error_handlers
from lora_serve.server.openapi import install_openapi
from lora_serve.server.protocol.adapters import LoadAdapterRequest, UnloadAdapterRequest
from lora_serve.server.protocol.chat import ChatCompletionRequest
from lora_serve.server.protocol.completion import CompletionRequest
from lora_serve.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from lora_serve.server.settings import ServerSettings

REQUEST_BODIES = (
    CompletionRequest,
    ChatCompletionRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
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
    context = ServerContext(client=client, settings=settings)
    app.state.context = context
    for routes in (routes_completions, routes_chat, routes_adapters, routes_status, routes_tokens):
        app.include_router(routes.router)
    install_error_handlers(app)
    install_openapi(app, REQUEST_BODIES)
    if settings.api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=settings.api_keys)
    app.add_middleware(CancellationMiddleware, shutdown=context.shutdown)
    return app
