"""Prometheus families made of what was counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from lora_serve.server.metrics.histogram import Histogram
from lora_serve.server.metrics.request_metrics import ModelSeries, RequestSeries

MODEL_LABELS = ("model_name", "engine")
"""Of every family that vLLM has under the same name; this server has one engine, '0'."""
ADAPTER_LABELS = ("model_name", "adapter_name")
ADAPTER_BOUNDS = 2
"""Every second bound is shown of histograms by adapter, which are most of the page's lines."""


def gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> GaugeMetricFamily:
    """Give a gauge of one sample."""
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def counter(name: str, text: str, labels: Mapping[str, str], value: float) -> CounterMetricFamily:
    """Give a counter of one sample; Prometheus sees it as `name` with '_total' behind."""
    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def histogram(
    name: str,
    text: str,
    labels: tuple[str, ...],
    series: Mapping[tuple[str, ...], Histogram],
    *,
    every: int = 1,
) -> HistogramMetricFamily:
    """Give a histogram with a series for each tuple of label values, and `every` of its bounds."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, one in series.items():
        family.add_metric(values, buckets=one.buckets(every=every), sum_value=one.total)
    return family


def request_families(
    model_name: str,
    by_adapter: Mapping[str, RequestSeries],
    retired: RequestSeries,
    model: ModelSeries,
) -> Iterator[Metric]:
    """Give what was counted of requests: of the model as vLLM names it, and by adapter.

    Parameters
    ----------
    model_name : str
        The base model's name.
    by_adapter : mapping from str to RequestSeries
        By the value of the label `adapter_name`.
    retired : RequestSeries
        What is in the totals only.
    model : ModelSeries
        What is counted of all answers together.
    """
    total = RequestSeries()
    for series in (retired, *by_adapter.values()):
        total.add(series)
    yield from _model_families(model_name, total, model)
    yield from _adapter_families(model_name, by_adapter)


def _model_families(model_name: str, total: RequestSeries, model: ModelSeries) -> Iterator[Metric]:
    labels = dict(zip(MODEL_LABELS, (model_name, "0"), strict=True))
    yield counter(
        "vllm:prompt_tokens", "Prompt tokens of answers that have begun.", labels, total.num_prompt_tokens
    )
    yield counter("vllm:generation_tokens", "Tokens generated.", labels, total.num_generation_tokens)
    ended = CounterMetricFamily(
        "vllm:request_success", "Answers that have ended, by reason.", labels=[*labels, "finished_reason"]
    )
    for reason, count in total.num_finished.items():
        ended.add_metric([*labels.values(), reason], count)
    yield ended
    for name, text, one in (
        ("time_to_first_token_seconds", "From submission to the first token.", total.first_token),
        ("inter_token_latency_seconds", "Between two tokens of an answer.", total.inter_token),
        ("e2e_request_latency_seconds", "From submission to an answer's end.", model.latency),
        ("request_queue_time_seconds", "From arrival to the first step.", model.queue),
        ("request_prefill_time_seconds", "From the first step to the first token.", model.prefill),
        ("request_decode_time_seconds", "From the first token to the last.", model.decode),
        ("request_inference_time_seconds", "From the first step to the last token.", model.inference),
        ("request_time_per_output_token_seconds", "Decode time by tokens.", model.time_per_token),
        ("request_prompt_tokens", "Prompt tokens of answers that have ended.", model.prompt_tokens),
        ("request_generation_tokens", "Tokens of answers that have ended.", model.generation_tokens),
        (
            "request_max_num_generation_tokens",
            "Tokens of the longest answer of a prompt.",
            model.most_generation_tokens,
        ),
    ):
        yield histogram(f"vllm:{name}", text, MODEL_LABELS, {tuple(labels.values()): one})


def _adapter_families(model_name: str, by_adapter: Mapping[str, RequestSeries]) -> Iterator[Metric]:
    prompt_tokens = CounterMetricFamily(
        "lora_serve:adapter_prompt_tokens", "Prompt tokens, by adapter.", labels=ADAPTER_LABELS
    )
    generation_tokens = CounterMetricFamily(
        "lora_serve:adapter_generation_tokens", "Tokens generated, by adapter.", labels=ADAPTER_LABELS
    )
    ended = CounterMetricFamily(
        "lora_serve:adapter_requests",
        "Answers that have ended, by adapter and reason.",
        labels=[*ADAPTER_LABELS, "finished_reason"],
    )
    for name, series in by_adapter.items():
        prompt_tokens.add_metric([model_name, name], series.num_prompt_tokens)
        generation_tokens.add_metric([model_name, name], series.num_generation_tokens)
        for reason, count in series.num_finished.items():
            ended.add_metric([model_name, name, reason], count)
    yield prompt_tokens
    yield generation_tokens
    yield ended
    yield histogram(
        "lora_serve:adapter_time_to_first_token_seconds",
        "From submission to the first token, by adapter.",
        ADAPTER_LABELS,
        {(model_name, name): series.first_token for name, series in by_adapter.items()},
        every=ADAPTER_BOUNDS,
    )
    yield histogram(
        "lora_serve:adapter_inter_token_latency_seconds",
        "Between two tokens of an answer, by adapter.",
        ADAPTER_LABELS,
        {(model_name, name): series.inter_token for name, series in by_adapter.items()},
        every=ADAPTER_BOUNDS,
    )
