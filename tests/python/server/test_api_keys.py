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
