"""A key restricted to adapter 'sql' cannot tell whether 'law' exists, is loaded, or has cached a prompt."""

from __future__ import annotations

import inspect
import json
import logging
import re

import msgspec
import pytest

from lora_serve.common.errors import (
    AdapterConflictError,
    CapacityError,
    InternalError,
    InvalidArgumentError,
)
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.engine.isolation import make_domain
from lora_serve.server.api_keys import KeyEntry, read_key_file
from lora_serve.server.caller_client import HARMLESS, NOT_FOR_ROUTES, CallerClient
from lora_serve.server.server_log import RequestIdFilter
from lora_serve.server.settings import AutoloadSettings
from lora_serve.testing.adapters import make_random_adapter
from server.fake_engine_client import FakeEngineClient, adapter_info
from server.http_calls import BASE, call, make_app, make_client
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint

SQL_KEY, LAW_KEY, ADMIN_KEY, FULL_KEY = "key-of-sql", "key-of-law", "key-of-admin", "key-of-all"
ENTRIES = (
    KeyEntry(name="sql-team", key=SQL_KEY, adapters=["sql"]),
    KeyEntry(name="law-team", key=LAW_KEY, adapters=["law"]),
)
OTHER_LOADED = {"sql": adapter_info("sql", 1), "law": adapter_info("law", 2)}
OTHER_NEVER_LOADED = {"sql": adapter_info("sql", 1)}
# Every way to name an adapter, also in bodies that are wrong in other ways: an order of checks may tell, too.
PROBES = [
    ("/v1/completions", {"model": "law", "prompt": "hi"}),
    ("/v1/completions", {"model": f"{BASE}:law", "prompt": "hi"}),
    ("/v1/completions", {"model": BASE, "lora_path": "law", "prompt": "hi"}),
    ("/v1/completions", {"model": BASE, "lora_path": ["sql", "law"], "prompt": ["hi", "ho"]}),
    ("/v1/completions", {"model": "law", "prompt": "hi", "stream": True}),
    ("/v1/completions", {"model": "law", "prompt": "x" * 500}),
    ("/v1/completions", {"model": "law", "prompt": [999999]}),
    ("/v1/completions", {"model": "law", "prompt": "hi", "max_tokens": 99999}),
    ("/v1/chat/completions", {"model": "law", "messages": [{"role": "user", "content": "hi"}]}),
    ("/generate", {"inputs": "hi", "parameters": {"adapter_id": "law"}}),
    ("/generate_stream", {"inputs": "hi", "parameters": {"adapter_id": "law"}}),
    ("/v1/loras", {"lora_name": "law", "source": {"uri": "file:///adapters/law"}}),
    ("/v1/load_lora_adapter", {"lora_name": "law", "lora_path": "/adapters/law"}),
    ("/load_lora_adapter", {"lora_name": "law", "lora_path": "/nowhere", "load_inplace": True}),
    ("/v1/unload_lora_adapter", {"lora_name": "law"}),
    ("/unload_lora_adapter", {"lora_name": "law", "force": True}),
]


def make_tenant_app(adapters=None, **fields):
    client = FakeEngineClient(adapters=dict(OTHER_LOADED if adapters is None else adapters), **fields)
    app = make_app(client, api_keys=(FULL_KEY,), admin_api_keys=(ADMIN_KEY,), key_entries=ENTRIES)
    return app, client


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def ask(app, method, path, key, **arguments):
    return call(app, method, path, headers=bearer(key), **arguments)


def without_ids(response):
    """Everything that a client sees but the random ids and the time."""
    body = response.text
    headers = {k: v for k, v in response.headers.items() if k not in ("x-request-id", "date")}
    try:
        parsed = json.loads(body)
    except ValueError:
        return response.status_code, headers, body
    for name in ("id", "created"):
        parsed.pop(name, None)
    return response.status_code, headers, json.dumps(parsed)


@pytest.mark.parametrize(("path", "body"), PROBES)
def test_an_adapter_of_others_looks_as_if_it_never_existed(path, body):
    loaded, _ = make_tenant_app(OTHER_LOADED)
    absent, _ = make_tenant_app(OTHER_NEVER_LOADED)
    of_loaded = ask(loaded, "POST", path, SQL_KEY, json=body)
    assert without_ids(of_loaded) == without_ids(ask(absent, "POST", path, SQL_KEY, json=body))
    assert of_loaded.status_code in (403, 404)
    # And as any other name that nobody has heard of.
    other_name = json.loads(json.dumps(body).replace("law", "wal"))
    status, headers, text = without_ids(ask(loaded, "POST", path, SQL_KEY, json=other_name))
    assert (status, headers, text.replace("wal", "law")) == without_ids(of_loaded)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/loras"])
def test_lists_are_the_same_whatever_others_have_loaded(path):
    answers = []
    for adapters in (OTHER_LOADED, OTHER_NEVER_LOADED):
        body = ask(make_tenant_app(adapters)[0], "GET", path, SQL_KEY).json()
        for entry in body["data"]:
            entry.pop("created", None)
        answers.append(body)
    assert answers[0] == answers[1]
    names = [entry.get("id", entry.get("name")) for entry in answers[0]["data"]]
    assert names == ([BASE, "sql"] if path == "/v1/models" else ["sql"])


def test_totals_and_places_of_the_engine_are_hidden_from_tenants():
    app, _ = make_tenant_app()
    tenants = ask(app, "GET", "/v1/loras", SQL_KEY).json()
    assert set(tenants) == {"object", "status", "base_model", "data"}
    [entry] = tenants["data"]
    assert set(entry) == {"name", "path", "content_digest", "lora_rank", "num_bytes", "is_serving"}
    assert {"stats", "tiers"} <= set(ask(app, "GET", "/v1/loras", FULL_KEY).json())


def test_a_path_outside_a_tenants_adapters_is_not_tried_on_first_use():
    client = make_client()
    autoload = AutoloadSettings(allow_local=True)
    app = make_app(client, key_entries=ENTRIES, api_keys=(FULL_KEY,), autoload=autoload)
    body = {"model": BASE, "lora_path": "/adapters/law", "prompt": "hi"}
    assert ask(app, "POST", "/v1/completions", SQL_KEY, json=body).status_code == 404
    assert client.operations == []
    assert ask(app, "POST", "/v1/completions", FULL_KEY, json=body).status_code == 200


def test_a_tenants_unload_leaves_no_trace():
    client = make_client()
    group = KeyEntry(name="group", key="key-of-group", group="group")
    app = make_app(client, key_entries=(*ENTRIES, group), autoload=AutoloadSettings(allow_local=True))
    disowned = []
    app.state.context.autoloader.disown = disowned.append
    for path, body in PROBES:
        if "lora" in path:
            for key in (SQL_KEY, "key-of-group"):
                assert ask(app, "POST", path, key, json=body).status_code == 403
    assert ask(app, "DELETE", "/v1/loras/law", "key-of-group").status_code == 403
    assert disowned == client.operations == []


@pytest.mark.parametrize(("key", "status"), [(SQL_KEY, 403), (FULL_KEY, 200), (ADMIN_KEY, 200)])
def test_metrics_are_for_operators(key, status):
    response = ask(make_tenant_app()[0], "GET", "/metrics", key)
    assert response.status_code == status
    assert ("law" in response.text) == (status == 200)


def test_a_tenant_uses_its_own_adapter_and_the_base_model():
    app, client = make_tenant_app()
    for model in ("sql", BASE):
        response = ask(app, "POST", "/v1/completions", SQL_KEY, json={"model": model, "prompt": "hi"})
        assert response.status_code == 200
    domain = make_domain("sql-team", None)
    assert [submission.isolation_domain for submission in client.submissions] == [domain, domain]


def test_the_fingerprint_does_not_count_the_loads_of_others():
    app, client = make_tenant_app({"sql": adapter_info("sql", 7)})
    body = {"model": "sql", "prompt": "hi"}
    digest = client.adapters["sql"].content_digest[:8]
    for key, expected in ((SQL_KEY, f"sql-{digest}"), (FULL_KEY, f"sql-g7-{digest}")):
        answer = ask(app, "POST", "/v1/completions", key, json=body).json()
        assert answer["system_fingerprint"] == expected


ASKED = [
    ("/v1/completions", {"model": "sql", "prompt": "hi"}),
    ("/v1/chat/completions", {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}),
    ("/generate", {"inputs": "hi", "parameters": {"adapter_id": "sql"}}),
]
ASKED_AS_STREAMS = [
    ("/v1/completions", {**ASKED[0][1], "stream": True}),
    ("/v1/chat/completions", {**ASKED[1][1], "stream": True}),
    ("/generate_stream", ASKED[2][1]),
]
REFUSALS_THAT_TELL_OF_OTHERS = [
    CapacityError("request 3 would make 41 queued requests; max_queued_requests is 40", 2),
    CapacityError("request 3 would make 41 live requests of adapter 12; max_requests_per_adapter is 40"),
    CapacityError("the adapter takes 41 bytes but all host memory for adapters is 40 bytes"),
    CapacityError("adapter 12 takes 41 bytes; with 4141 bytes of pinned adapters there is no room"),
    CapacityError("all 41 adapters that may be loaded on first use are in use", retry_after_s=1),
    AdapterConflictError("adapter 'org/a' is loaded from '/adapters/law' with other content"),
    AdapterConflictError("the load of adapter 'org/a' from '/adapters/law' was cancelled by an unload"),
    AdapterConflictError("adapter 'sql' could not be brought: '/adapters/law' holds content 41, expected 12"),
]
NAMES_OF_OTHERS = re.compile(r"law|41|12|max_|first use|/adapters")


def message_in(answer):
    """What an error tells, of any dialect, in a body or as a stream's event."""
    [message] = re.findall(r'"(?:message|error)":\s*"([^"]*)"', answer.text)
    return message


def refuse_with(error):
    async def refuse(*_arguments, **_options):
        raise error

    return refuse


@pytest.mark.parametrize("method", ["submit", "load_lora_adapter"])
@pytest.mark.parametrize("error", REFUSALS_THAT_TELL_OF_OTHERS, ids=lambda error: str(error)[-20:])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": BASE, "lora_path": "org/a", "prompt": "hi"}),
        ("/v1/chat/completions", {"model": f"{BASE}:org/a", "messages": [{"role": "user", "content": "hi"}]}),
        ("/generate_stream", {"inputs": "hi", "parameters": {"adapter_id": "org/a"}}),
    ],
)
def test_no_refusal_of_a_tenant_counts_or_names_what_others_have(path, body, error, method):
    client = make_client()
    tenant = KeyEntry(name="group", key="key-of-group", group="group")
    autoload = AutoloadSettings(allow_hub=True)
    app = make_app(client, api_keys=(FULL_KEY,), key_entries=(tenant,), autoload=autoload)
    setattr(client, method, refuse_with(error))
    refused = ask(app, "POST", path, "key-of-group", json=body)
    assert refused.status_code == (429 if isinstance(error, CapacityError) else 409)
    retry_after_s = getattr(error, "retry_after_s", None)
    assert refused.headers.get("retry-after") == (retry_after_s and str(retry_after_s))
    assert not NAMES_OF_OTHERS.search(refused.text), refused.text
    assert str(error) in ask(app, "POST", path, FULL_KEY, json=body).text, "an operator is told all of it"


@pytest.mark.parametrize("error", REFUSALS_THAT_TELL_OF_OTHERS, ids=lambda error: str(error)[-20:])
@pytest.mark.parametrize(("path", "body"), ASKED + ASKED_AS_STREAMS)
def test_no_end_of_an_accepted_request_counts_or_names_what_others_have(path, body, error):
    def ask_new(key):
        return ask(make_tenant_app(first_stream_fails_with=error)[0], "POST", path, key, json=body)

    ended = ask_new(SQL_KEY)
    is_stream = (path, body) in ASKED_AS_STREAMS
    assert ended.status_code == (200 if is_stream else 429 if isinstance(error, CapacityError) else 409)
    assert not NAMES_OF_OTHERS.search(message_in(ended)), ended.text
    assert message_in(ask_new(FULL_KEY)) == str(error), "an operator is told all of it"


def test_a_full_set_of_adapters_loaded_on_first_use_is_not_counted_for_a_tenant():
    client = make_client()
    tenant = KeyEntry(name="group", key="key-of-group", group="group")
    autoload = AutoloadSettings(max_adapters=1, allow_hub=True)
    app = make_app(client, key_entries=(tenant,), api_keys=(FULL_KEY,), autoload=autoload)
    body = {"model": BASE, "prompt": "hi"}
    assert ask(app, "POST", "/v1/completions", FULL_KEY, json={**body, "lora_path": "o/1"}).status_code == 200
    client.adapters["o/1"] = msgspec.structs.replace(client.adapters["o/1"], num_running_requests=1)
    refused = ask(app, "POST", "/v1/completions", "key-of-group", json={**body, "lora_path": "o/2"})
    assert refused.status_code == 429
    assert not NAMES_OF_OTHERS.search(refused.json()["error"]["message"])


FAILURES = [
    InternalError("adapter 'law' could not be read from '/adapters/law': no such file"),
    InternalError("the engine has stopped: page 41 of adapter 12 is free; see its log, and start it again"),
    RuntimeError("adapter 'law' has 41 requests"),
]


def check_failure(make, caplog, path, body, error, status):
    """A tenant is told where to find the reason, operators what was meant to be told, and the log all."""
    for key in (SQL_KEY, FULL_KEY, ADMIN_KEY):
        caplog.clear()
        headers = {**bearer(key), "X-Request-Id": "request-of-sql"}
        answer = call(make(), "POST", path, headers=headers, json=body)
        assert answer.status_code == status
        told = message_in(answer)
        if key != SQL_KEY and isinstance(error, InternalError):
            assert told == str(error)
        else:
            assert told == (
                "the server failed on this request; the reason is in its log, at request request-of-sql"
            )
            assert "Traceback" not in answer.text
        logged = [one for one in caplog.records if str(error) in f"{one.getMessage()} {one.exc_info}"]
        assert logged
        assert {record.request_id for record in logged} == {"request-of-sql"}


@pytest.fixture
def log_with_ids(caplog):
    """The log, whose records have the id of their request as in a server's."""
    ids = RequestIdFilter()
    caplog.handler.addFilter(ids)
    with caplog.at_level(logging.ERROR):
        yield caplog
    caplog.handler.removeFilter(ids)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize(("path", "body"), ASKED + ASKED_AS_STREAMS)
def test_why_the_server_fails_on_a_request_is_for_operators_and_the_log(path, body, error, log_with_ids):
    def make():
        app, client = make_tenant_app()
        client.submit = refuse_with(error)
        return app

    check_failure(make, log_with_ids, path, body, error, 500)


@pytest.mark.parametrize("error", FAILURES[:2], ids=lambda error: str(error)[:20])
@pytest.mark.parametrize(("path", "body"), ASKED_AS_STREAMS)
def test_why_a_stream_ends_is_for_operators_and_the_log(path, body, error, log_with_ids):
    def make():
        return make_tenant_app(first_stream_fails_with=error)[0]

    check_failure(make, log_with_ids, path, body, error, 200)


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/health/live"])
def test_why_the_engine_has_stopped_is_for_operators(path):
    app, client = make_tenant_app()
    app.state.context.lifecycle.give_up()
    client.is_healthy, client.failure = False, str(FAILURES[1])
    stranger, tenant = call(app, "GET", path), ask(app, "GET", path, SQL_KEY)
    assert stranger.status_code == tenant.status_code == 503
    error = stranger.json()["error"]
    assert (error["message"], error["code"]) == (
        "the engine has stopped; the reason is in the server's log",
        "engine_stopped",
    )
    assert tenant.json() == stranger.json()
    for key in (FULL_KEY, ADMIN_KEY):
        assert ask(app, "GET", path, key).json()["error"]["message"] == str(FAILURES[1])


@pytest.mark.parametrize(("key", "status"), [(SQL_KEY, 403), (FULL_KEY, 403), (ADMIN_KEY, 200)])
def test_only_the_admin_loads_and_unloads_once_there_is_one(key, status):
    app, client = make_tenant_app()
    load = ask(app, "POST", "/v1/load_lora_adapter", key, json={"lora_name": "new", "lora_path": "/a"})
    unload = ask(app, "POST", "/v1/unload_lora_adapter", key, json={"lora_name": "sql"})
    assert [load.status_code, unload.status_code] == [status, status]
    assert bool(client.operations) == (status == 200)


def test_without_an_admin_key_full_keys_load_and_tenants_do_not():
    app = make_app(make_client(), api_keys=(FULL_KEY,), key_entries=ENTRIES)
    body = {"lora_name": "new", "lora_path": "/a"}
    assert ask(app, "POST", "/v1/load_lora_adapter", FULL_KEY, json=body).status_code == 200
    assert ask(app, "POST", "/v1/load_lora_adapter", SQL_KEY, json=body).status_code == 403


def test_an_admin_key_alone_leaves_the_rest_open():
    app = make_app(make_client(), admin_api_keys=(ADMIN_KEY,))
    assert call(app, "GET", "/v1/models").status_code == 200
    body = {"lora_name": "new", "lora_path": "/a"}
    assert call(app, "POST", "/v1/load_lora_adapter", json=body).status_code == 403
    assert ask(app, "POST", "/v1/load_lora_adapter", ADMIN_KEY, json=body).status_code == 200


def test_every_method_of_the_engines_client_is_narrowed_or_known_to_be_harmless():
    public = {name for name in dir(AsyncEngineClient) if not name.startswith("_")}
    public |= {name for name in inspect.get_annotations(AsyncEngineClient) if not name.startswith("_")}
    undecided = public - HARMLESS - NOT_FOR_ROUTES - set(CallerClient.__dict__)
    assert not undecided, f"may a tenant use {undecided}? see CallerClient"


def test_no_two_groups_and_salts_share_a_domain():
    parts = [None, "", "a", "ab", "b", "a\0b", "+1:a", "-"]
    domains = [make_domain(group, salt) for group in parts for salt in parts]
    assert len(set(domains)) == len(domains)
    assert make_domain(None, None) == b""


# --- The file of keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected {"),
        ('{"keys": [{"name": "a"}]}', "missing required field `key`"),
        ('{"keys": [{"name": "a", "key": "secret", "adaptors": []}]}', "unknown field `adaptors`"),
        ('{"keys": [{"name": "a", "key": "secret", "adapters": "sql"}]}', "Expected `array | null`"),
    ],
)
def test_a_bad_file_of_keys_is_refused_without_showing_a_key(tmp_path, content, message):
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError) as refusal:
        read_key_file(str(path))
    assert message in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([KeyEntry(name="", key="secret")], "has a key with the name ''"),
        ([KeyEntry(name="a", key=" secret")], "the key 'a' of --api-keys-file"),
        ([KeyEntry(name="a", key="secret", group="")], "empty group"),
        ([KeyEntry(name="a", key="secret", adapters=[], admin=True)], "is an admin's but has adapters"),
        ([KeyEntry(name="a", key="secret"), KeyEntry(name="b", key="secret")], "there twice"),
        ([KeyEntry(name="a", key=FULL_KEY, adapters=["sql"])], "there twice"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(entries, message):
    with pytest.raises(InvalidArgumentError, match=message) as refusal:
        make_app(api_keys=(FULL_KEY,), key_entries=tuple(entries))
    assert "secret" not in str(refusal.value)


# --- The whole server ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenancy")
    model = make_tiny_checkpoint(folder / "model", max_position_embeddings=512)
    adapters = [f"{name}={make_random_adapter(folder / name, model, rank=4)}" for name in ("sql", "law")]
    keys = [
        {"name": "sql-team", "key": SQL_KEY, "adapters": ["sql"]},
        {"name": "sql-other-team", "key": "key-of-sql-2", "adapters": ["sql"]},
        {"name": "law-team", "key": LAW_KEY, "adapters": ["law"]},
        {"name": "sql-team", "key": "new-key-of-sql", "adapters": ["sql"]},
    ]
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": keys}))
    options = ["--served-model-name", BASE, "--api-keys-file", path, "--api-key", FULL_KEY]
    with ServerProcess(model, *options, "--lora-modules", *adapters) as server:
        yield server


def num_cached(server, key, model, prompt, **fields):
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **fields}
    with server.http() as http:
        response = http.post("/v1/completions", json=body, headers=bearer(key))
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("model", [BASE, "sql"])
def test_prompts_cached_by_others_are_not_cached_tokens(server, model):
    prompt = f"a long prompt of a tenant who says things to {model} that nobody else may know of" * 2
    assert num_cached(server, SQL_KEY, model, prompt) == 0
    assert num_cached(server, SQL_KEY, model, prompt) > 0
    assert num_cached(server, "new-key-of-sql", model, prompt) > 0, "two keys of one name are one tenant"
    assert num_cached(server, "key-of-sql-2", model, prompt) == 0, (
        "the adapter is shared, its prefixes are not"
    )
    assert num_cached(server, FULL_KEY, model, prompt) == 0
    if model == BASE:
        assert num_cached(server, LAW_KEY, model, prompt) == 0


def test_salts_part_what_one_tenant_caches(server):
    prompt = "a long prompt that is sent with one salt and with another one, and with none" * 2
    assert num_cached(server, SQL_KEY, "sql", prompt, cache_salt="alice") == 0
    assert num_cached(server, SQL_KEY, "sql", prompt, cache_salt="alice") > 0
    assert num_cached(server, SQL_KEY, "sql", prompt, cache_salt="bob") == 0
    assert num_cached(server, SQL_KEY, "sql", prompt) == 0
    assert num_cached(server, FULL_KEY, "sql", prompt, cache_salt="alice") == 0


def test_an_empty_salt_is_refused(server):
    with server.http() as http:
        body = {"model": BASE, "prompt": "hi", "cache_salt": ""}
        response = http.post("/v1/completions", json=body, headers=bearer(FULL_KEY))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_salt")
