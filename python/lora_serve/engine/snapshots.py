"""What the engine shows of itself: adapters, counts, and a plan in a log line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_serve.engine.messages import AdapterInfo, EngineStats

if TYPE_CHECKING:
    from lora_serve.lora.manager import AdapterResidency
    from lora_serve.lora.registry import AdapterRegistry
    from lora_serve.scheduler import ExecutionPlan, SchedulerStats


def make_adapter_infos(
    registry: AdapterRegistry, stats: SchedulerStats, residencies: Iterable[AdapterResidency]
) -> list[AdapterInfo]:
    """Join what the registry, the scheduler and the adapter memory know of each generation, by adapter id."""
    slots = {residency.adapter_id: residency.adapter_slot for residency in residencies}
    counts = {adapter.adapter_id: adapter for adapter in stats.adapters}
    infos = []
    for generation in registry.generations():
        count = counts[generation.adapter_id]
        slot = slots[generation.adapter_id]
        infos.append(
            AdapterInfo(
                name=generation.name,
                adapter_id=generation.adapter_id,
                path=generation.path,
                content_digest=generation.content_digest,
                lora_rank=generation.lora_rank,
                num_bytes=generation.num_bytes,
                pinned=generation.pinned,
                is_serving=registry.find(generation.name) is generation,
                state=count.state.name.lower(),
                tier="host" if slot < 0 else "device",
                adapter_slot=slot,
                num_waiting_requests=count.num_waiting_requests,
                num_running_requests=count.num_running_requests,
                num_tree_pages=count.num_tree_pages,
                num_private_pages=count.num_private_pages,
                num_host_pages=count.num_host_pages,
                total_hit_tokens=count.num_hit_tokens,
                total_missed_tokens=count.num_missed_tokens,
            )
        )
    return infos


def make_stats(stats: SchedulerStats, total_steps: int, total_recomputed_tokens: int) -> EngineStats:
    """Give the scheduler's counts, and the engine's own, as a message."""
    return EngineStats(
        num_waiting_requests=stats.num_waiting_requests,
        num_running_requests=stats.num_running_requests,
        num_preempted_requests=stats.num_preempted_requests,
        num_device_pages=stats.num_device_pages,
        num_free_pages=stats.num_free_pages,
        num_tree_pages=stats.num_tree_pages,
        num_private_pages=stats.num_private_pages,
        num_host_pages=stats.num_host_pages,
        num_free_host_pages=stats.num_free_host_pages,
        num_transfers=stats.num_transfers,
        num_adapters=len(stats.adapters) - 1,  # The base model is the first.
        total_steps=total_steps,
        total_preemptions=stats.total_preemptions,
        total_recomputed_tokens=total_recomputed_tokens,
        total_evicted_pages=stats.total_evicted_pages,
        total_evicted_host_pages=stats.total_evicted_host_pages,
        total_queried_tokens=stats.total_queried_tokens,
        total_hit_tokens=stats.total_hit_tokens,
        total_host_hit_tokens=stats.total_host_hit_tokens,
    )


def describe_plan(plan: ExecutionPlan | None) -> str:
    """Give a plan's arrays in one line, long ones shortened, for the log."""
    if plan is None:
        return "none was made"
    names = (
        "request_ids",
        "page_table_rows",
        "num_scheduled_tokens",
        "num_computed_tokens",
        "adapter_slots",
        "load_adapter_ids",
        "load_adapter_slots",
        "drained_adapter_ids",
        "transfer_ids",
        "transfer_kinds",
        "transfer_offsets",
        "transfer_source_pages",
        "transfer_destination_pages",
    )
    arrays = ", ".join(f"{name}={getattr(plan, name).tolist()}" for name in names)
    return f"plan_id={plan.plan_id}, {arrays}"
