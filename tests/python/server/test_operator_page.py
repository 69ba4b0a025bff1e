from __future__ import annotations

import base64
import hashlib
import re

import pytest

from server.http_calls import call, make_app

KEYS = ("first-key",)


def test_the_page_is_one_file_that_asks_nobody_else():
    page = call(make_app(), "GET", "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    addresses = re.findall(r"""\b(?:src|href|action)=["']?([^"'>]*)|\burl\(|@import""", page.text)
    assert [address.partition(",")[0] for address in addresses] == ["data:image/svg+xml"]
    assert set(re.findall(r"https?:[^'\"\s]*", page.text)) == {"http://www.w3.org/2000/svg"}


def test_the_policy_names_the_script_and_the_style_and_nothing_else():
    page = call(make_app(), "GET", "/")
    directives = dict(
        directive.split(" ", 1) for directive in page.headers["content-security-policy"].split("; ")
    )
    assert directives["default-src"] == "'none'"
    for kind in ("script", "style"):
        [inline] = re.findall(f"<{kind}>(.*?)</{kind}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert directives[f"{kind}-src"] == f"'sha256-{digest}'"
    assert page.headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_no_key_and_holds_none():
    page = call(make_app(api_keys=KEYS), "GET", "/")
    assert page.status_code == 200
    assert KEYS[0] not in page.text
    assert page.text == call(make_app(), "GET", "/").text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD"])
def test_other_methods_of_its_path_need_a_key(method):
    assert call(make_app(api_keys=KEYS), method, "/").status_code == 401


def test_without_the_page_its_path_answers_only_lorax():
    app = make_app(operator_page=False)
    refused = call(app, "GET", "/")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "POST"
    assert call(app, "POST", "/", json={"inputs": "hello"}).status_code == 200


def test_with_the_page_lorax_keeps_its_path():
    assert call(make_app(), "POST", "/", json={"inputs": "hello"}).status_code == 200


def test_the_schema_says_that_the_path_of_loraxs_requests_has_the_page_too():
    operations = call(make_app(), "GET", "/openapi.json").json()["paths"]["/"]
    assert set(operations) == {"get", "post"}
    assert set(operations["get"]["responses"]["200"]["content"]) == {"text/html"}
