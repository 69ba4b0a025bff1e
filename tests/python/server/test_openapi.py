"""What /openapi.json says about answers."""

from __future__ import annotations

import pytest

from server.http_calls import call, make_app

STREAMING = ("/v1/completions", "/v1/chat/completions", "/", "/generate_stream")


@pytest.fixture(scope="module")
def schema():
    return call(make_app(), "GET", "/openapi.json").json()


def test_every_operation_declares_its_errors_and_none_that_it_cannot_give(schema):
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            assert set(responses) == {"200", "4XX", "5XX"}, path
            error = responses["4XX"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            is_lorax = method == "post" and path in ("/", "/generate", "/generate_stream")
            assert error == ("LoraxError" if is_lorax else "ErrorResponse")


def test_streams_and_metrics_declare_their_content_types(schema):
    def content(path, method="post"):
        return set(schema["paths"][path][method]["responses"]["200"]["content"])

    for path in STREAMING:
        assert "text/event-stream" in content(path)
    assert content("/generate_stream") == {"text/event-stream"}
    assert content("/metrics", "get") == {"text/plain", "application/openmetrics-text"}


@pytest.mark.parametrize(
    "path", ["/v1/loras", "/v1/loras/a/b", "/v1/completions", "/health", "/openapi.json"]
)
def test_wrong_methods_are_told_every_right_one(path):
    app = make_app()
    declared = {"/v1/loras": "GET, POST", "/v1/loras/a/b": "DELETE", "/v1/completions": "POST"}
    for method in ("PATCH", "OPTIONS", "TRACE"):
        answer = call(app, method, path)
        assert answer.status_code == 405
        expected = declared.get(path, "GET")
        assert answer.headers["allow"].removesuffix(", HEAD") == expected
        assert f"use {expected.replace(', ', ' or ')}" in answer.json()["error"]["message"]
