from __future__ import annotations

import msgspec
import pytest

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.common.lora_request import LoRARequest
from lora_serve.common.queueing import Queueing

BAD_FIELDS = [
    ("model", ""),
    ("dtype", "int8"),
    ("device", None),
    ("load_format", "gguf"),
    ("page_size", 0),
    ("num_device_pages", 0),
    ("kv_memory_gb", 0.0),
    ("kv_host_memory_gb", -0.5),
    ("kv_host_memory_gb", float("inf")),
    ("kv_host_memory_gb", "1"),
    ("kv_write_policy", "write_around"),
    ("kv_write_policy", None),
    ("max_num_seqs", 0),
    ("max_num_batched_tokens", 0),
    ("max_model_len", 1),
    ("max_loras", 0),
    ("max_lora_rank", 0),
    ("max_lora_rank", 8.0),
    ("lora_memory_gb", 0),
    ("lora_memory_gb", -1.0),
    ("lora_memory_gb", float("inf")),
    ("lora_memory_gb", "8"),
    ("max_loading_adapters", 0),
    ("adapter_patience_ms", -1),
    ("adapter_patience_ms", 1.5),
    ("adapter_time_slice_steps", -1),
    ("adapter_pause_ms", -1),
    ("scheduling_policy", "lifo"),
    ("scheduling_policy", None),
    ("priority_ageing_ms", 0),
    ("max_queued_requests", -1),
    ("max_queued_requests", True),
    ("max_queued_tokens", -1),
    ("max_requests_per_adapter", -1),
    ("async_scheduling", 1),
    ("enable_prefix_caching", 1),
    ("lora_allowed_roots", "/adapters"),
    ("lora_allowed_roots", [""]),
    ("seed", -1),
    ("attention_backend", ""),
    ("gpu_memory_utilization", 0.0),
    ("gpu_memory_utilization", 1.01),
    ("gpu_memory_utilization", None),
    ("enforce_eager", 1),
    ("cuda_graph_sizes", []),
    ("cuda_graph_sizes", [0]),
    ("cuda_graph_sizes", [1, 129]),
    ("cuda_graph_sizes", [1.0]),
    ("cuda_graph_sizes", 8),
    ("prefill_graph_sizes", [0]),
    ("prefill_graph_sizes", [1, 2049]),
    ("prefill_graph_sizes", 8),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_value_is_refused_with_the_field(field, value):
    with pytest.raises(InvalidArgumentError, match=field):
        EngineConfig(**{"model": "m", field: value})


def test_step_smaller_than_the_batch_is_refused_with_both_numbers():
    with pytest.raises(InvalidArgumentError, match=r"max_num_batched_tokens is 64 .* which is 128"):
        EngineConfig(model="m", max_num_batched_tokens=64)


def test_defaults_are_valid_and_survive_a_message():
    config = EngineConfig(
        model="m", lora_allowed_roots=["/a"], max_model_len=2, lora_memory_gb=0.5, cuda_graph_sizes=[1, 128]
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    ("device", "asked", "chosen"),
    [
        ("cpu", "auto", "torch"),
        ("cuda", "auto", "flashinfer"),
        ("cuda:1", "auto", "flashinfer"),
        ("cuda", "torch", "torch"),
    ],
)
def test_attention_backend_follows_the_device_unless_asked(device, asked, chosen):
    config = EngineConfig(model="m", device=device, attention_backend=asked)
    assert config.chosen_attention_backend == chosen
    assert config.is_cuda == (device != "cpu")


def test_device_that_is_not_chosen_yet_is_neither():
    with pytest.raises(InternalError, match="before 'auto' was chosen"):
        EngineConfig(model="m").is_cuda  # noqa: B018


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"max_num_seqs": 1}, (1,)),
        ({"max_num_seqs": 3}, (1, 2, 3)),
        ({"max_num_seqs": 8}, (1, 2, 4, 8)),
        ({"max_num_seqs": 30}, (1, 2, 4, 8, 16, 24, 30)),
        ({"max_num_seqs": 30, "cuda_graph_sizes": [7, 2, 7]}, (2, 7)),
        ({"max_num_seqs": 30, "cuda_graph_sizes": [7, 2], "enforce_eager": True}, ()),
    ],
)
def test_cuda_graph_sizes_rise_to_the_most_requests_unless_asked(fields, chosen):
    assert EngineConfig(model="m", **fields).chosen_cuda_graph_sizes == chosen


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({}, (64, 128, 192, 256, 384, 512, 768, 1024)),
        ({"max_num_batched_tokens": 200}, (64, 128, 192)),
        ({"prefill_graph_sizes": [70, 7, 70]}, (7, 70)),
        ({"prefill_graph_sizes": []}, ()),
        ({"enforce_eager": True}, ()),
    ],
)
def test_prefill_graph_sizes_are_the_usual_ones_of_a_step_unless_asked(fields, chosen):
    assert EngineConfig(model="m", **fields).chosen_prefill_graph_sizes == chosen


@pytest.mark.parametrize("arguments", [("",), (None,), ("\ud800",), ("a", 5), ("a", ""), ("a", "/\0")])
def test_lora_request_with_bad_fields_is_refused(arguments):
    with pytest.raises(InvalidArgumentError):
        LoRARequest(*arguments)
    assert LoRARequest("a").lora_path is None


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((1.0,), "priority"),
        ((True,), "priority"),
        ((2**31,), "priority"),
        ((0, 0), "queue_timeout"),
        ((0, -1.0), "queue_timeout"),
        ((0, float("inf")), "queue_timeout"),
        ((0, float("nan")), "queue_timeout"),
        ((0, "1"), "queue_timeout"),
    ],
)
def test_queueing_with_bad_fields_is_refused(arguments, field):
    with pytest.raises(InvalidArgumentError, match=f"^{field} is "):
        Queueing(*arguments)
    assert Queueing(-(2**31), 0.001) == Queueing(priority=-(2**31), timeout_s=0.001)
