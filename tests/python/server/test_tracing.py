from __future__ import annotations

import sys

import pytest
from opentelemetry.trace import get_current_span

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server import tracing
from server.http_calls import BASE, call, make_app, make_client

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class FakeSpan:
    def __init__(self, name, context, attributes):
        self.name = name
        self.attributes = dict(attributes)
        self.events = []
        self.status = None
        self.has_ended = False
        self.trace_id = f"{get_current_span(context).get_span_context().trace_id:032x}"

    def set_attribute(self, name, value):
        self.attributes[name] = value

    def update_name(self, name):
        self.name = name

    def add_event(self, name):
        self.events.append(name)

    def set_status(self, status, description=None):
        self.status = status

    def end(self):
        self.has_ended = True


class FakeTracer:
    def __init__(self):
        self.spans = []

    def start_span(self, name, context, kind, attributes):
        self.spans.append(FakeSpan(name, context, attributes))
        return self.spans[-1]


@pytest.fixture
def tracer(monkeypatch):
    tracer = FakeTracer()
    monkeypatch.setattr(tracing, "make_tracer", lambda _endpoint: tracer)
    return tracer


def traced_app(client=None):
    return make_app(client, api_keys=("key",), otlp_traces_endpoint="http://collector")


def test_a_request_is_a_span_of_its_clients_trace(tracer):
    headers = {"Authorization": "Bearer key", "traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
    body = {"model": BASE, "prompt": "hi", "stream": True}
    headers["X-Request-Id"] = "abc"
    assert call(traced_app(), "POST", "/v1/completions", json=body, headers=headers).status_code == 200
    [span] = tracer.spans
    assert (span.name, span.trace_id) == ("POST /v1/completions", TRACE_ID)
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["lora_serve.request_id"] == "abc"
    assert span.attributes["lora_serve.caller"] == "api-key-1"
    assert span.events == ["first byte"]
    assert span.has_ended


def test_names_of_spans_cannot_be_made_up_and_probes_have_none(tracer):
    app = traced_app()
    call(app, "GET", "/made-up", headers={"Authorization": "Bearer key"})
    call(app, "GET", "/health")
    assert [span.name for span in tracer.spans] == ["GET"]


def test_a_failure_ends_its_span_as_an_error(tracer):
    client = make_client()

    async def submit(*_arguments, **_options):
        raise RuntimeError("no")

    client.submit = submit
    headers = {"Authorization": "Bearer key"}
    call(traced_app(client), "POST", "/v1/completions", json={"model": BASE, "prompt": "a"}, headers=headers)
    [span] = tracer.spans
    assert span.has_ended


def test_without_the_packages_traces_are_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'lora-serve\[tracing\]'"):
        traced_app()


def test_an_endpoint_that_is_no_url_is_refused():
    with pytest.raises(InvalidArgumentError, match="--otlp-traces-endpoint is 'collector:4317'"):
        make_app(otlp_traces_endpoint="collector:4317")
