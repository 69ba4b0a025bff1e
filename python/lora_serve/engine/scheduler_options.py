"""From the engine's configuration to the scheduler's options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_serve.common.config import EngineConfig
from lora_serve.scheduler import SchedulerOptions

if TYPE_CHECKING:
    from lora_serve.executor.executor import Executor

_US_PER_MS = 1000


def make_scheduler_options(config: EngineConfig, executor: Executor) -> SchedulerOptions:
    """Give the scheduler's options: what the user asked for, with the sizes that the executor has found."""
    return SchedulerOptions(
        page_size=config.page_size,
        num_device_pages=executor.num_device_pages,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=executor.max_model_len,
        max_loras=config.max_loras,
        enable_prefix_caching=config.enable_prefix_caching,
        num_host_pages=executor.num_host_pages,
        write_policy=config.kv_write_policy,
        adapter_memory_bytes=executor.lora.memory_bytes,
        max_loading_adapters=config.max_loading_adapters,
        loads_staged_only=True,
        adapter_patience_us=config.adapter_patience_ms * _US_PER_MS,
        adapter_time_slice_steps=config.adapter_time_slice_steps,
        adapter_pause_us=config.adapter_pause_ms * _US_PER_MS,
        scheduling_policy=config.scheduling_policy,
        priority_ageing_us=config.priority_ageing_ms * _US_PER_MS,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        max_requests_per_adapter=config.max_requests_per_adapter,
        padded_batch_sizes=list(executor.padded_batch_sizes),
    )
