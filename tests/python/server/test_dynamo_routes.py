from __future__ import annotations

import pytest

from lora_serve.common.errors import AdapterConflictError, InvalidArgumentError
from server.http_calls import BASE, call, make_app, make_client


def load(app, uri, name="new"):
    return call(app, "POST", "/v1/loras", json={"lora_name": name, "source": {"uri": uri}})


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///adapters/new", "/adapters/new"),
        ("file://localhost/adapters/a%20b", "/adapters/a b"),
        ("/adapters/new", "/adapters/new"),
        ("hf://org/new@main", "hf://org/new@main"),
        ("s3://bucket/new", "s3://bucket/new"),
    ],
)
def test_load_takes_the_uri_as_a_path(uri, path):
    client = make_client()
    response = load(make_app(client), uri)
    assert response.status_code == 200
    assert response.json() == {
        "status": "success",
        "message": "adapter 'new' is loaded",
        "lora_name": "new",
        "lora_id": 3,
    }
    assert client.operations == [("load", "new", path, False, False, 1.0)]


def test_loading_what_is_loaded_is_200_and_says_so():
    response = load(make_app(), "/adapters/sql", name="sql")
    assert response.status_code == 200
    assert "already loaded" in response.json()["message"]


@pytest.mark.parametrize("name", ["sql", "org/sql"])
def test_delete_unloads_once_and_then_is_404(name):
    client = make_client()
    app = make_app(client)
    load(app, "/adapters/x", name=name)
    lora_id = client.adapters[name].adapter_id
    response = call(app, "DELETE", f"/v1/loras/{name}")
    assert response.status_code == 200
    assert response.json() == {
        "status": "success",
        "message": f"adapter '{name}' is unloaded",
        "lora_name": name,
        "lora_id": lora_id,
    }
    again = call(app, "DELETE", f"/v1/loras/{name}")
    assert again.status_code == 404
    assert again.json()["status"] == "error"
    assert again.json()["message"] == again.json()["error"]["message"]


@pytest.mark.parametrize(
    "uri", ["", "file://", "file:///", "file://host/adapters", "file:///a?b", "file://["]
)
def test_uri_that_is_no_path_of_this_machine_is_400(uri):
    client = make_client()
    response = load(make_app(client), uri)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "source.uri"
    assert client.operations == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidArgumentError("rank 128"), 400), (AdapterConflictError("other content"), 409)],
)
def test_refused_load_keeps_the_reason_in_both_shapes(error, status):
    client = make_client()
    client.load_error = error
    response = load(make_app(client), "/adapters/new")
    assert response.status_code == status
    body = response.json()
    assert (body["status"], body["message"], body["error"]["message"]) == ("error", str(error), str(error))


@pytest.mark.parametrize("body", [{}, {"lora_name": "a"}, {"lora_name": "a", "source": "b"}, {"x": 1}])
def test_bad_body_is_400(body):
    assert call(make_app(), "POST", "/v1/loras", json=body).status_code == 400


def test_names_of_the_base_model_are_refused():
    assert load(make_app(), "/adapters/new", name=BASE).status_code == 400
