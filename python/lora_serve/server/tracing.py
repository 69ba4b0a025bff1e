"""OpenTelemetry traces: one span a request, continuing the trace that its client has begun."""

from __future__ import annotations

from importlib import import_module

from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server.auth import OPEN_PATHS
from lora_serve.server.caller import caller_of_scope
from lora_serve.server.current_request import current_request_id

SERVICE_NAME = "lora_serve"
_NOT_TRACED = OPEN_PATHS | {"/metrics"}
_CARRIED = (b"traceparent", b"tracestate")


def make_tracer(endpoint: str) -> Tracer:
    """Give a tracer that sends its spans to an OTLP collector, in batches and from a thread of its own.

    Parameters
    ----------
    endpoint : str
        URL of the collector's traces over HTTP, such as http://127.0.0.1:4318/v1/traces.

    Raises
    ------
    InvalidArgumentError
        It is no such URL, or the packages are not installed.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidArgumentError(
            f"--otlp-traces-endpoint is {endpoint!r} but must be a URL, such as http://127.0.0.1:4318/v1/traces"
        )
    try:
        exporters = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        resources = import_module("opentelemetry.sdk.resources")
        sdk = import_module("opentelemetry.sdk.trace")
        export = import_module("opentelemetry.sdk.trace.export")
    except ImportError as error:
        raise InvalidArgumentError(
            f"--otlp-traces-endpoint needs packages that are not installed ({error.name}); install them with "
            "pip install 'lora-serve[tracing]'"
        ) from None
    provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": SERVICE_NAME}))
    provider.add_span_processor(export.BatchSpanProcessor(exporters.OTLPSpanExporter(endpoint=endpoint)))
    tracer: Tracer = provider.get_tracer(SERVICE_NAME)
    return tracer


class TracingMiddleware:
    """Makes a span of each request, from its headers to the last byte of its answer; probes have none.

    The first byte of the body, which for a stream is its first token, is an event of the span.

    Parameters
    ----------
    app : ASGI application
        What is served.
    tracer : opentelemetry.trace.Tracer
        Makes the spans.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in _NOT_TRACED:
            await self._app(scope, receive, send)
            return
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in _CARRIED
        }
        span = self._tracer.start_span(
            scope["method"],
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "lora_serve.request_id": current_request_id() or "",
            },
        )
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                status = message["status"]
                span.set_attribute("http.response.status_code", status)
                if status != 404:  # Else a client could make up as many names as it likes.
                    span.update_name(f"{scope['method']} {scope['path']}")
                if status >= 500:
                    span.set_status(StatusCode.ERROR)
            elif not has_begun and message.get("body"):
                has_begun = True
                span.add_event("first byte")
            await send(message)

        with trace.use_span(span, end_on_exit=True):
            try:
                await self._app(scope, receive, send_and_note)
            finally:
                span.set_attribute("lora_serve.caller", caller_of_scope(scope).name)
