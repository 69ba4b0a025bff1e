from __future__ import annotations

import pytest

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server.settings import ServerSettings
from server.http_calls import call, make_app

KEYS = ("first-key", "second-key")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_key_opens_the_server(key, scheme):
    headers = {"Authorization": f"{scheme} {key}"}
    assert call(make_app(api_keys=KEYS), "GET", "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "shown",
    [None, "", "Bearer", "Bearer ", "Bearer first", "Bearer first-key2", "Basic first-key", "first-key"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/loras", "/version", "/openapi.json", "/nothing"])
def test_without_a_key_everything_is_401(shown, path):
    headers = {} if shown is None else {"Authorization": shown}
    response = call(make_app(api_keys=KEYS), "GET", path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        *(("POST", path, {"error_type": "generation"}) for path in ("/", "/generate", "/generate_stream")),
        ("POST", "/v1/load_lora_adapter", {"success": False}),
        ("POST", "/unload_lora_adapter", {"success": False}),
        ("POST", "/v1/loras", {"status": "error"}),
        ("DELETE", "/v1/loras/sql", {"status": "error"}),
    ],
)
@pytest.mark.parametrize("refused_for", ["key", "drain"])
def test_a_refusal_before_any_route_has_the_shape_of_the_paths_dialect(method, path, fields, refused_for):
    app = make_app(api_keys=KEYS if refused_for == "key" else ())
    if refused_for == "drain":
        app.state.context.lifecycle.begin_drain()
    response = call(app, method, path, content=b"{}")
    assert response.status_code == (401 if refused_for == "key" else 503)
    body = response.json()
    assert fields.items() <= body.items()
    text = "API key is missing" if refused_for == "key" else "shutting down"
    if "error_type" in body:
        assert set(body) == {"error", "error_type"}
        assert text in body["error"]
    else:
        assert text in body["error"]["message"]
        assert text in body.get("error_message", body.get("message"))


def test_keys_that_are_not_ascii_are_401():
    response = call(make_app(api_keys=KEYS), "GET", "/v1/models", headers={"Authorization": b"Bearer \xff"})
    assert response.status_code == 401


def test_health_needs_no_key():
    assert call(make_app(api_keys=KEYS), "GET", "/health").status_code == 200


def test_without_keys_the_server_is_open():
    assert call(make_app(), "GET", "/v1/models").status_code == 200


@pytest.mark.parametrize("key", ["", " k", "k\n", "schlüssel"])
def test_keys_that_no_header_can_carry_are_refused(key):
    with pytest.raises(InvalidArgumentError, match="--api-key"):
        ServerSettings(served_model_name="m", model_path="m", api_keys=(key,))
