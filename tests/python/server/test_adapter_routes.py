from __future__ import annotations

import pytest

from lora_serve.common.errors import (
    AdapterConflictError,
    CapacityError,
    InternalError,
    InvalidArgumentError,
)
from server.fake_engine_client import adapter_info
from server.http_calls import BASE, call, make_app, make_client

LOAD = {"lora_name": "new", "lora_path": "/adapters/new"}


def sglang_fields(prefix, *names):
    """What SGLang's clients read; its endpoints have no /v1."""
    return {} if prefix else {"loaded_adapters": {name: f"/adapters/{name}" for name in names}}


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_load_and_unload_with_and_without_v1(prefix):
    client = make_client()
    app = make_app(client)
    loaded = call(app, "POST", f"{prefix}/load_lora_adapter", json={**LOAD, "pinned": True})
    assert loaded.status_code == 200
    assert loaded.json() == {
        "message": "adapter 'new' is loaded",
        "lora_name": "new",
        "adapter_id": 3,
        "already_loaded": False,
        "success": True,
        "error_message": None,
        **sglang_fields(prefix, "sql", "law", "new"),
    }
    unloaded = call(app, "POST", f"{prefix}/unload_lora_adapter", json={"lora_name": "new", "force": True})
    assert unloaded.status_code == 200
    assert unloaded.json() == {
        "message": "adapter 'new' is unloaded",
        "lora_name": "new",
        "success": True,
        "error_message": None,
        **sglang_fields(prefix, "sql", "law"),
    }
    assert client.operations == [("load", "new", "/adapters/new", False, True, 1.0), ("unload", "new", True)]


def test_loading_what_is_loaded_says_so():
    client = make_client()
    app = make_app(client)
    call(app, "POST", "/v1/load_lora_adapter", json={**LOAD, "load_inplace": True})
    again = call(app, "POST", "/v1/load_lora_adapter", json={**LOAD, "load_inplace": True})
    assert again.status_code == 200
    assert again.json()["already_loaded"] is True
    assert client.operations == [("load", "new", "/adapters/new", True, False, 1.0)] * 2
    assert "already loaded" in again.json()["message"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidArgumentError("rank 128 is above 64"), 400, "invalid_adapter"),
        (AdapterConflictError("other content"), 409, "adapter_conflict"),
        (CapacityError("no room"), 429, "no_capacity"),
        (InternalError("the engine has stopped"), 500, "internal_error"),
    ],
)
def test_refused_load_keeps_the_reason(error, status, code):
    client = make_client()
    client.load_error = error
    response = call(make_app(client), "POST", "/v1/load_lora_adapter", json=LOAD)
    assert response.status_code == status
    body = response.json()
    assert body["error"]["message"] == body["error_message"] == str(error)
    assert body["error"]["code"] == code
    assert body["success"] is False


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a\tb", "a\nb", "a\u00a0b", "a\x00b", "\u2028", BASE])
def test_names_that_requests_cannot_use_are_400(name):
    client = make_client()
    response = call(make_app(client), "POST", "/v1/load_lora_adapter", json={**LOAD, "lora_name": name})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_name"
    assert client.operations == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("load", {"lora_name": "a"}, "lora_path"),
        ("load", {"lora_path": "/a"}, "lora_name"),
        ("load", {**LOAD, "lora_path": ""}, "lora_path"),
        ("load", {**LOAD, "load_inplace": "yes"}, "load_inplace"),
        ("load", {**LOAD, "lora_int_id": 1}, "lora_int_id"),
        ("load", {**LOAD, "lora_id": "7"}, "lora_id"),
        ("unload", {}, "lora_name"),
        ("unload", {"lora_name": ""}, "lora_name"),
        ("unload", {"lora_name": 3}, "lora_name"),
    ],
)
def test_bad_body_is_400_and_names_the_field(path, body, param):
    response = call(make_app(), "POST", f"/v1/{path}_lora_adapter", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_unloading_an_unknown_adapter_is_404():
    response = call(make_app(), "POST", "/v1/unload_lora_adapter", json={"lora_name": "nobody"})
    assert response.status_code == 404
    assert "nobody" in response.json()["error"]["message"]


def test_models_lists_the_base_and_what_serves():
    client = make_client()
    client.adapters["old"] = adapter_info("old", 3, is_serving=False)
    body = call(make_app(client), "GET", "/v1/models").json()
    assert body["object"] == "list"
    assert [(m["id"], m["root"], m["parent"]) for m in body["data"]] == [
        (BASE, "/models/base", None),
        ("sql", "/adapters/sql", BASE),
        ("law", "/adapters/law", BASE),
    ]
    assert {m["max_model_len"] for m in body["data"]} == {128}


def test_loras_lists_every_generation_with_totals():
    client = make_client()
    client.adapters["old"] = adapter_info("old", 3, is_serving=False)
    body = call(make_app(client), "GET", "/v1/loras").json()
    assert [entry["name"] for entry in body["data"]] == ["sql", "law", "old"]
    assert body["data"][2]["state"] == "draining"
    assert body["tiers"] == {
        "device": {"num_adapters": 3, "num_bytes": 3000},
        "host": {"num_adapters": 0, "num_bytes": 0},
    }
    assert (body["status"], body["count"], body["loras"]) == ("success", 2, {"sql": 1, "law": 2})
    stats = body["stats"]
    assert (stats["num_device_pages"], stats["num_host_pages"], stats["num_free_host_pages"]) == (8, 32, 30)
    assert stats["total_host_hit_tokens"] == 64


def test_health_follows_the_engine():
    client = make_client()
    app = make_app(client)
    assert call(app, "GET", "/health").status_code == 200
    client.is_healthy, client.failure = False, "the engine process ended with status 9"
    response = call(app, "GET", "/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the engine process ended with status 9"


def test_version_is_a_string():
    assert call(make_app(), "GET", "/version").json()["version"]


def test_openapi_schema_resolves_every_reference():
    schema = call(make_app(), "GET", "/openapi.json").json()
    assert "requestBody" in schema["paths"]["/v1/completions"]["post"]
    methods = {(path, method) for path, entry in schema["paths"].items() for method in entry}
    assert methods >= {
        *((path, "post") for path in ("/", "/generate", "/generate_stream", "/tokenize", "/detokenize")),
        *((f"{prefix}/{verb}_lora_adapter", "post") for prefix in ("", "/v1") for verb in ("load", "unload")),
        *(("/v1/loras", method) for method in ("get", "post")),
        ("/v1/loras/{lora_name}", "delete"),
    }
    for path, method in methods:
        operation = schema["paths"][path][method]
        assert ("requestBody" in operation) == (method == "post"), path
    known = schema["components"]["schemas"]
    assert {"CompletionRequest", "ChatCompletionRequest", "LoadAdapterRequest"} <= set(known)

    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    missing = {ref for ref in references(schema) if ref.removeprefix("#/components/schemas/") not in known}
    assert missing == set()
