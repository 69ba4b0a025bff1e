"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI

from lora_serve.common.errors import InvalidArgumentError
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
from lora_serve.server.admission import AdmissionMiddleware, BodyTimeoutMiddleware
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
from lora_serve.server.request_ids import RequestIdMiddleware
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

    Raises
    ------
    InvalidArgumentError
        Traces are asked for without the packages that they need.
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
    if settings.tokenizer_info:
        app.include_router(routes_tokens.info_router)
    if settings.operator_page:
        app.include_router(routes_page.make_router())
    install_error_handlers(app)
    install_openapi(app, REQUEST_BODIES)
    limits = settings.limits
    app.add_middleware(BodyTimeoutMiddleware, timeout_s=limits.body_timeout_s)
    app.add_middleware(
        AdmissionMiddleware,
        lifecycle=context.lifecycle,
        shutdown=context.shutdown,
        max_requests=limits.max_concurrent_requests,
        max_requests_per_key=limits.max_concurrent_requests_per_key,
    )
    app.add_middleware(ApiKeyMiddleware, keys=settings.keys)
    app.add_middleware(CancellationMiddleware, shutdown=context.shutdown)
    if settings.otlp_traces_endpoint is not None:
        try:
            from lora_serve.server.tracing import TracingMiddleware, make_tracer
        except ImportError:
            raise InvalidArgumentError(
                "--otlp-traces-endpoint needs packages that are not installed; install them with pip install "
                "'lora-serve[tracing]'"
            ) from None
        app.add_middleware(TracingMiddleware, tracer=make_tracer(settings.otlp_traces_endpoint))
    app.add_middleware(RequestIdMiddleware, shutdown=context.shutdown)
    return app
