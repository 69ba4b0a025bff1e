from __future__ import annotations

import asyncio
import time

import httpx
import msgspec
import pytest

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.common.outputs import CompletionOutput, RequestOutput
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.request_stream import RequestStream
from lora_serve.engine.status import EngineStats
from lora_serve.server.metrics import server_metrics
from lora_serve.server.metrics.histogram import Histogram
from lora_serve.server.metrics.request_metrics import OTHER_ADAPTERS, UNLOADED_SERIES_S, RequestMetrics
from lora_serve.server.settings import ServerSettings
from server.fake_engine_client import adapter_info
from server.http_calls import BASE, call, chat, complete, make_app, make_client
from server.metric_samples import Samples

MODEL = {"model_name": BASE, "engine": "0"}
# Name, type and labels, as vLLM has them.
OF_VLLM = [
    ("vllm:num_requests_running", "gauge", MODEL.keys()),
    ("vllm:num_requests_waiting", "gauge", MODEL.keys()),
    ("vllm:kv_cache_usage_perc", "gauge", MODEL.keys()),
    ("vllm:prefix_cache_queries_total", "counter", MODEL.keys()),
    ("vllm:prefix_cache_hits_total", "counter", MODEL.keys()),
    ("vllm:num_preemptions_total", "counter", MODEL.keys()),
    ("vllm:prompt_tokens_total", "counter", MODEL.keys()),
    ("vllm:generation_tokens_total", "counter", MODEL.keys()),
    ("vllm:request_success_total", "counter", {*MODEL, "finished_reason"}),
    ("vllm:time_to_first_token_seconds_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:inter_token_latency_seconds_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:e2e_request_latency_seconds_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:request_queue_time_seconds_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:request_prefill_time_seconds_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:request_decode_time_seconds_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:request_inference_time_seconds_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:request_time_per_output_token_seconds_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:request_max_num_generation_tokens_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:request_prompt_tokens_bucket", "histogram", {*MODEL, "le"}),
    ("vllm:request_generation_tokens_bucket", "histogram", {*MODEL, "le"}),
    (
        "vllm:lora_requests_info",
        "gauge",
        {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
    ),
]


def scrape(app, **headers):
    response = call(app, "GET", "/metrics", headers=headers)
    assert response.status_code == 200
    return Samples.parse(response.text)


class Clock:
    """Seconds that only a test moves."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def no_reuse(monkeypatch):
    """Every scrape asks the engine."""
    monkeypatch.setattr(server_metrics, "REUSE_S", 0.0)


@pytest.mark.parametrize(("name", "kind", "labels"), OF_VLLM, ids=[name for name, *_ in OF_VLLM])
def test_names_types_and_labels_are_those_of_vllm(name, kind, labels):
    samples = scrape(make_app())
    family = name.removesuffix("_bucket").removesuffix("_total")
    assert samples.kinds[family] == kind
    assert {frozenset(found) for found, _ in samples.all(name)} == {frozenset(labels)}


def test_answers_are_counted_once_each():
    app = make_app()
    complete(app, model="sql", n=2)  # "sql!": 4 tokens, the prompt 5
    complete(app, max_tokens=2)
    chat(app)  # "base!"
    samples = scrape(app)
    assert samples.one("vllm:generation_tokens_total") == 2 * 4 + 2 + 5
    assert samples.one("vllm:prompt_tokens_total") == 4 * 5
    ended = {found["finished_reason"]: value for found, value in samples.all("vllm:request_success_total")}
    assert ended == {"stop": 3, "length": 1, "abort": 0, "error": 0}
    for name, count in (
        ("time_to_first_token_seconds", 4),
        ("inter_token_latency_seconds", 2 * 3 + 1 + 4),
        ("e2e_request_latency_seconds", 4),
        ("request_prompt_tokens", 4),
        ("request_generation_tokens", 4),
        ("request_max_num_generation_tokens", 3),
        ("request_prefill_time_seconds", 4),
        ("request_decode_time_seconds", 4),
        ("request_time_per_output_token_seconds", 4),
    ):
        assert samples.one(f"vllm:{name}_count") == count
    assert samples.one("vllm:request_generation_tokens_bucket", le="2.0") == 1
    assert samples.one("vllm:request_generation_tokens_bucket", le="5.0") == 4
    assert samples.one("vllm:request_generation_tokens_sum") == 15


def test_times_are_those_of_the_tokens():
    clock = Clock()
    metrics = RequestMetrics(BASE, 10, clock)
    stream = RequestStream(
        request_id="r", prompt=None, prompt_token_ids=[1, 2, 3], lora_name="sql", abort=lambda: None
    )
    stream.observer = metrics.watch(stream, num_answers=1, arrived_at=clock.now)
    for wait_s, queue_s, token_ids, reason in (
        (1.5, 0.5, [7], None),
        (0.25, None, [8], None),
        (0.5, None, [], None),
        (0.25, None, [9, 10], None),
        (2.0, None, [], "stop"),
    ):
        clock.now += wait_s
        answer = CompletionOutput(index=0, token_ids=token_ids, finish_reason=reason)
        stream.put(
            RequestOutput("r", None, [], outputs=[answer], finished=reason is not None, queue_s=queue_s)
        )
    series, model = metrics.by_adapter()["sql"], metrics.model()
    assert series.first_token.total == 1.5
    assert (sum(series.inter_token.counts), series.inter_token.total) == (2, 1.0)
    assert series.num_generation_tokens == 4
    for name, total in (
        ("latency", 4.5),
        ("queue", 0.5),
        ("prefill", 1.0),
        ("decode", 1.0),
        ("inference", 2.0),
        ("time_per_token", 1 / 3),
        ("prompt_tokens", 3),
        ("generation_tokens", 4),
        ("most_generation_tokens", 4),
    ):
        assert (sum(getattr(model, name).counts), getattr(model, name).total) == (1, total), name


def test_histograms_by_adapter_have_every_second_bound_of_the_same_counts():
    histogram = Histogram((1.0, 2.0, 5.0, 10.0, 20.0))
    for value in (0.5, 1.0, 1.5, 5.0, 20.0, 21.0):
        histogram.observe(value)
    assert histogram.buckets() == [
        *(("1.0", 2), ("2.0", 3), ("5.0", 4), ("10.0", 4), ("20.0", 5), ("+Inf", 6)),
    ]
    assert histogram.buckets(every=2) == [("2.0", 3), ("10.0", 4), ("+Inf", 6)]
    app = make_app()
    complete(app, model="sql")
    samples = scrape(app)

    def bounds(name, **labels):
        return [found["le"] for found, _ in samples.all(f"{name}_bucket", **labels)]

    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds"):
        of_model = bounds(f"vllm:{name}")
        assert bounds(f"lora_serve:adapter_{name}", adapter_name="sql") == [*of_model[:-1][1::2], "+Inf"]


def test_adapters_have_series_of_their_own_and_the_base_model_too():
    app = make_app()
    complete(app, model="sql")
    complete(app, model="law", stream=True)
    complete(app)
    samples = scrape(app)
    for name, num_tokens in (("sql", 4), ("law", 4), (BASE, 5)):
        labels = {"model_name": BASE, "adapter_name": name}
        assert samples.one("lora_serve:adapter_generation_tokens_total", **labels) == num_tokens
        assert samples.one("lora_serve:adapter_prompt_tokens_total", **labels) == 5
        assert samples.one("lora_serve:adapter_time_to_first_token_seconds_count", **labels) == 1
        assert samples.one("lora_serve:adapter_inter_token_latency_seconds_count", **labels) == num_tokens - 1
        assert samples.one("lora_serve:adapter_requests_total", finished_reason="stop", **labels) == 1


def test_adapters_beyond_the_most_share_one_series():
    client = make_client()
    client.adapters["third"] = adapter_info("third", 3)
    app = make_app(client, metrics_max_adapters=1)
    for name in ("sql", "law", "third", "sql"):
        complete(app, model=name)
    samples = scrape(app)
    tokens = {
        found["adapter_name"]: value
        for found, value in samples.all("lora_serve:adapter_generation_tokens_total")
    }
    assert tokens == {BASE: 0, "sql": 8, OTHER_ADAPTERS: 4 + 6}
    assert samples.one("vllm:generation_tokens_total") == 18


@pytest.mark.parametrize("name", [OTHER_ADAPTERS, BASE])
def test_an_adapter_of_a_name_that_is_taken_is_one_of_the_others(name):
    metrics = RequestMetrics(BASE, 10)
    stream = RequestStream(
        request_id="r", prompt=None, prompt_token_ids=[1], lora_name=name, abort=lambda: None
    )
    stream.observer = metrics.watch(stream, num_answers=1, arrived_at=0.0)
    stream.put(InternalError("broken"))
    ended = {name: series.num_finished["error"] for name, series in metrics.by_adapter().items()}
    assert ended == {BASE: 0, OTHER_ADAPTERS: 1}


def test_series_of_an_unloaded_adapter_vanish_and_totals_stay(no_reuse):
    client = make_client()
    app = make_app(client, metrics_max_adapters=1)
    clock = Clock()
    app.state.context.metrics.requests._clock = clock
    complete(app, model="sql")
    del client.adapters["sql"]

    def names():
        found = scrape(app).all("lora_serve:adapter_generation_tokens_total")
        return {labels["adapter_name"] for labels, _ in found}

    assert "sql" in names()
    clock.now += UNLOADED_SERIES_S - 1
    assert "sql" in names()
    clock.now += 1
    assert "sql" not in names()
    assert scrape(app).one("vllm:generation_tokens_total") == 4
    complete(app, model="law")  # There is room for it now.
    assert "law" in names()


def test_the_time_of_a_series_begins_anew_when_its_adapter_comes_back(no_reuse):
    client = make_client()
    app = make_app(client)
    clock = Clock()
    app.state.context.metrics.requests._clock = clock
    complete(app, model="sql")
    gone = client.adapters.pop("sql")
    scrape(app)
    client.adapters["sql"] = gone
    clock.now += UNLOADED_SERIES_S
    scrape(app)
    del client.adapters["sql"]
    labels = {"adapter_name": "sql"}
    assert scrape(app).one("lora_serve:adapter_generation_tokens_total", **labels) == 4


def test_an_answer_that_is_there_when_its_reader_goes_away_is_counted_once(no_reuse):
    client = make_client()
    app = make_app(client)
    clock = Clock()
    app.state.context.metrics.requests._clock = clock
    params = SamplingParams(max_tokens=20)

    async def leave():
        stream = await client.submit("hello", params, lora_name="sql")
        await stream.aclose()

    asyncio.run(leave())
    assert scrape(app).one("vllm:request_success_total", finished_reason="stop") == 1
    assert scrape(app).one("vllm:request_success_total", finished_reason="abort") == 0
    del client.adapters["sql"]
    scrape(app)
    clock.now += UNLOADED_SERIES_S
    assert scrape(app).all("lora_serve:adapter_requests_total", adapter_name="sql") == []


def test_adapters_are_shown_by_level_although_no_request_uses_them():
    client = make_client()
    client.adapters["law"] = msgspec.structs.replace(
        client.adapters["law"], tier="host", pinned=True, lora_rank=16
    )
    client.adapters["a,b"] = adapter_info("a,b", 3)
    client.adapters["old"] = adapter_info("old", 4, is_serving=False)
    before = time.time()
    samples = scrape(make_app(client))
    names = ("model_name", "adapter_name", "level", "pinned", "rank")
    loaded = samples.all("vllm:lora_adapter_loaded")
    assert {value for _, value in loaded} == {1}
    assert {tuple(found[name] for name in names) for found, _ in loaded} == {
        (BASE, "sql", "device", "false", "8"),
        (BASE, "law", "host", "true", "16"),
        (BASE, "a,b", "device", "false", "8"),
    }
    [(labels, value)] = samples.all("vllm:lora_requests_info")
    assert labels == {"max_lora": "4", "running_lora_adapters": "sql", "waiting_lora_adapters": ""}
    assert before - 1 <= value <= time.time()
    assert samples.one("lora_serve:adapters", level="device") == 3
    assert samples.one("lora_serve:adapter_bytes", level="host") == 1000


def test_cache_sizes_are_where_routers_look_for_them():
    [(labels, value)] = scrape(make_app()).all("vllm:cache_config_info")
    assert value == 1
    assert labels["block_size"] == "16"
    assert labels["num_gpu_blocks"] == "8"
    assert labels["num_cpu_blocks"] == "32"
    assert labels["enable_prefix_caching"] == "True"


def test_cached_pages_that_nobody_uses_do_not_count_as_used(no_reuse):
    client = make_client()
    counts = {"num_device_pages": 8, "num_free_pages": 1, "num_tree_pages": 7, "num_available_pages": 6}

    async def stats():
        return EngineStats(**{**dict.fromkeys(EngineStats.__struct_fields__, 0), **counts})

    client.stats = stats
    assert scrape(make_app(client)).one("vllm:kv_cache_usage_perc") == pytest.approx(0.25)


def test_failed_answers_and_those_left_alone_are_counted():
    client = make_client(first_stream_fails_with=InternalError("the row broke"))
    app = make_app(client)
    complete(app, n=2)
    client.first_stream_fails_with = None
    client.num_tokens_before_hold = 2

    async def leave():
        stream = await client.submit("hello", client.submissions[0].params, lora_name="sql")
        async for _ in stream:
            break
        await stream.aclose()
        await stream.aclose()

    asyncio.run(leave())
    ended = {
        found["finished_reason"]: value for found, value in scrape(app).all("vllm:request_success_total")
    }
    assert ended == {"stop": 0, "length": 0, "abort": 2, "error": 2}
    assert scrape(app).one("vllm:generation_tokens_total") == 2 + 2 * 2


def test_an_engine_that_does_not_answer_holds_up_no_scrape(monkeypatch, no_reuse):
    monkeypatch.setattr(server_metrics, "ENGINE_TIMEOUT_S", 0.05)
    client = make_client()
    app = make_app(client)
    complete(app)
    assert scrape(app).one("vllm:num_requests_running") == 0

    async def never():
        await asyncio.sleep(3600)

    client.stats = never
    samples = scrape(app)
    assert samples.one("lora_serve:engine_up") == 1
    assert samples.one("vllm:generation_tokens_total") == 5
    assert samples.one("vllm:num_requests_running") == 0  # As it was.
    assert samples.one("lora_serve:engine_stats_age_seconds") >= 0.05


def test_many_scrapes_ask_the_engine_once(monkeypatch):
    monkeypatch.setattr(server_metrics, "REUSE_S", 3600.0)
    client = make_client()
    num_calls = 0
    answer = client.stats

    async def stats():
        nonlocal num_calls
        num_calls += 1
        await asyncio.sleep(0.02)
        return await answer()

    client.stats = stats

    async def scrape_all():
        transport = httpx.ASGITransport(app=make_app(client))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return await asyncio.gather(*(http.get("/metrics") for _ in range(10)))

    assert {response.status_code for response in asyncio.run(scrape_all())} == {200}
    assert num_calls == 1


def test_a_dead_engine_leaves_the_counts(no_reuse):
    client = make_client()
    app = make_app(client)
    complete(app)
    scrape(app)
    client.is_healthy = False
    client.failure = "the engine has stopped"
    samples = scrape(app)
    assert samples.one("lora_serve:engine_up") == 0
    assert samples.one("vllm:generation_tokens_total") == 5
    assert samples.one("vllm:prefix_cache_queries_total") == 0
    for gone in ("vllm:num_requests_running", "vllm:lora_requests_info", "vllm:lora_adapter_loaded"):
        assert samples.all(gone) == []


def test_metrics_need_a_key_where_there_are_keys():
    app = make_app(api_keys=("key",))
    assert call(app, "GET", "/metrics").status_code == 401
    assert call(app, "GET", "/metrics", headers={"Authorization": "Bearer key"}).status_code == 200


def test_open_metrics_are_given_to_who_asks_for_them():
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    response = call(make_app(), "GET", "/metrics", headers=headers)
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.text.endswith("# EOF\n")
    plain = call(make_app(), "GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_fewer_adapters_than_none_are_refused():
    with pytest.raises(InvalidArgumentError, match="--metrics-max-adapters"):
        ServerSettings(served_model_name="m", model_path="m", metrics_max_adapters=-1)
