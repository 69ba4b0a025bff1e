"""Prometheus families made of what the engine says about itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lora_serve.common.config import EngineConfig
from lora_serve.engine.messages import ModelInfo
from lora_serve.engine.status import AdapterInfo, EngineStats
from lora_serve.server.metrics.families import MODEL_LABELS, counter, gauge

LEVELS = ("device", "host", "disk")
_US = 1e-6

_OWN_GAUGES = (
    ("preempted_requests", "num_preempted_requests", "Requests that run again when there is room."),
    ("queued_tokens", "num_queued_tokens", "Prompt tokens of requests that have not begun to run."),
    ("kv_transfers", "num_transfers", "Copies of KV pages between the tiers under way."),
    ("adapters_being_read", "num_adapters_being_read", "Adapters that are being read from disk again."),
    ("adapters_in_line", "num_adapters_in_line", "Adapters whose requests wait for a load."),
    ("paused_adapters", "num_paused_adapters", "Adapters whose requests are left out of the steps."),
)
_OWN_COUNTERS = (
    ("steps", "total_steps", "Steps planned."),
    ("host_prefix_cache_hits", "total_host_hit_tokens", "Cached prompt tokens that came from the host."),
    ("recomputed_tokens", "total_recomputed_tokens", "Tokens computed again after a preemption."),
    ("evicted_pages", "total_evicted_pages", "KV pages taken off the device."),
    ("rejected_requests", "total_rejected_requests", "Requests refused because a limit was reached."),
    ("expired_requests", "total_expired_requests", "Requests whose queue timeout had passed."),
    ("adapter_loads", "total_adapter_loads", "Adapters brought to the device."),
    (
        "adapter_load_failures",
        "total_failed_adapter_loads",
        "Adapters that could not be brought to the device.",
    ),
    ("kv_event_batches", "total_kv_event_batches", "Batches of KV events."),
    (
        "kv_event_batches_dropped",
        "total_dropped_kv_event_batches",
        "Batches of KV events dropped because too many waited.",
    ),
    ("adapter_evictions", "total_adapter_evictions", "Adapters taken off the device to make room."),
)


def config_family(info: ModelInfo, config: EngineConfig) -> Metric:
    """Give the sizes of the KV cache, which routers read from the labels; the value is always 1."""
    labels = {
        "block_size": str(info.page_size),
        "num_gpu_blocks": str(info.num_device_pages),
        "num_cpu_blocks": str(info.num_host_pages),
        "enable_prefix_caching": str(config.enable_prefix_caching),
        "gpu_memory_utilization": str(config.gpu_memory_utilization),
        "cache_dtype": config.dtype,
        "engine": "0",
    }
    return gauge("vllm:cache_config_info", "Sizes of the KV cache, in the labels.", labels, 1)


def gauge_families(model_name: str, stats: EngineStats) -> Iterator[Metric]:
    """Give what the engine's counts say of this moment."""
    labels = dict(zip(MODEL_LABELS, (model_name, "0"), strict=True))
    for name, text, value in (
        ("num_requests_running", "Requests that run.", float(stats.num_running_requests)),
        ("num_requests_waiting", "Requests that wait to run.", float(stats.num_waiting_requests)),
        (
            "kv_cache_usage_perc",
            "Part of the device's KV pages that requests use, 0 to 1.",
            1 - stats.num_available_pages / max(stats.num_device_pages, 1),
        ),
    ):
        yield gauge(f"vllm:{name}", text, labels, value)
    own = {"model_name": model_name}
    for name, field, text in _OWN_GAUGES:
        yield gauge(f"lora_serve:{name}", text, own, getattr(stats, field))
    pages = GaugeMetricFamily(
        "lora_serve:kv_pages", "KV pages by tier and what holds them.", labels=["model_name", "tier", "state"]
    )
    for tier, state, count in (
        ("device", "free", stats.num_free_pages),
        ("device", "cached", stats.num_tree_pages),
        ("device", "private", stats.num_private_pages),
        ("host", "free", stats.num_free_host_pages),
        ("host", "cached", stats.num_host_pages - stats.num_free_host_pages),
    ):
        pages.add_metric([model_name, tier, state], count)
    yield pages
    loop = GaugeMetricFamily(
        "lora_serve:step_loop_seconds",
        "What recent steps took in the loop itself, without the model.",
        labels=["model_name", "quantile"],
    )
    for quantile, value_us in (
        ("0.5", stats.loop_p50_us),
        ("0.99", stats.loop_p99_us),
        ("1", stats.loop_max_us),
    ):
        loop.add_metric([model_name, quantile], value_us * _US)
    yield loop


def counter_families(model_name: str, stats: EngineStats) -> Iterator[Metric]:
    """Give what the engine has counted since its start."""
    labels = dict(zip(MODEL_LABELS, (model_name, "0"), strict=True))
    for name, text, value in (
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.total_queried_tokens),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.total_hit_tokens),
        ("num_preemptions", "Preemptions.", stats.total_preemptions),
    ):
        yield counter(f"vllm:{name}", text, labels, value)
    own = {"model_name": model_name}
    for name, field, text in _OWN_COUNTERS:
        yield counter(f"lora_serve:{name}", text, own, getattr(stats, field))
    rows = CounterMetricFamily(
        "lora_serve:step_rows", "Rows of the steps, by what they compute.", labels=["model_name", "kind"]
    )
    rows.add_metric([model_name, "decode"], stats.total_decode_rows)
    rows.add_metric([model_name, "prefill"], stats.total_prefill_rows)
    yield rows


def adapter_families(
    model_name: str, max_loras: int, adapters: Sequence[AdapterInfo], now_s: float
) -> Iterator[Metric]:
    """Give where the adapters are, whether or not they have requests.

    Parameters
    ----------
    model_name : str
        The base model's name.
    max_loras : int
        Distinct adapters in one step.
    adapters : sequence of AdapterInfo
        Every generation; those that only drain are not shown.
    now_s : float
        Unix time, which is the value of `vllm:lora_requests_info`: routers take the latest one.
    """
    serving = [adapter for adapter in adapters if adapter.is_serving]
    # Routers split the lists at commas: a name with one would be taken for two adapters.
    listed = sorted((adapter for adapter in serving if "," not in adapter.name), key=lambda one: one.name)
    requests = {
        "max_lora": str(max_loras),
        "waiting_lora_adapters": ",".join(one.name for one in listed if one.num_waiting_requests),
        "running_lora_adapters": ",".join(one.name for one in listed if one.tier == "device"),
    }
    yield gauge(
        "vllm:lora_requests_info",
        "Adapters on the device and adapters with waiting requests, in the labels; the value is the time.",
        requests,
        now_s,
    )
    loaded = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "An adapter that serves, and the fastest memory that holds it; the value is always 1.",
        labels=["model_name", "adapter_name", "level", "pinned", "rank"],
    )
    num_adapters, num_bytes = dict.fromkeys(LEVELS, 0), dict.fromkeys(LEVELS, 0)
    for one in serving:
        pinned = "true" if one.pinned else "false"
        loaded.add_metric([model_name, one.name, one.tier, pinned, str(one.lora_rank)], 1)
    for one in adapters:
        num_adapters[one.tier] += 1
        num_bytes[one.tier] += one.num_bytes
    yield loaded
    for name, text, values in (
        ("adapters", "Adapter generations by the fastest memory that holds them.", num_adapters),
        ("adapter_bytes", "Bytes of adapters by the fastest memory that holds them.", num_bytes),
    ):
        family = GaugeMetricFamily(f"lora_serve:{name}", text, labels=["model_name", "level"])
        for level, value in values.items():
            family.add_metric([model_name, level], value)
        yield family
