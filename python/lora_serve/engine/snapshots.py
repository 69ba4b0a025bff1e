"""What the engine shows of itself: adapters, counts, and a plan in a log line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING

from lora_serve.engine.status import AdapterInfo, EngineStats

if TYPE_CHECKING:
    from lora_serve.engine.admission import Admission
    from lora_serve.engine.kv_event_publisher import KVEventPublisher
    from lora_serve.engine.step_loop import StepLoop
    from lora_serve.executor.adapter_store import AdapterStore
    from lora_serve.lora.manager import AdapterResidency
    from lora_serve.lora.registry import AdapterGeneration, AdapterRegistry
    from lora_serve.scheduler import AdapterStats, ExecutionPlan, SchedulerStats


_ENGINES_OWN = {
    "num_adapters",
    "num_adapters_being_read",
    "total_steps",
    "loop_p50_us",
    "loop_p99_us",
    "loop_max_us",
    "total_load_waits",
    "total_recomputed_tokens",
    "total_kv_event_batches",
    "total_dropped_kv_event_batches",
}
_SAME_NAME = tuple(name for name in EngineStats.__struct_fields__ if name not in _ENGINES_OWN)
"""Counts that the scheduler has under the same name."""


class AdapterListing:
    """Every generation that exists at the start, described so many at a time.

    For a caller that makes steps in between: most of the time, 10 ms for a thousand adapters, goes into the
    descriptions. What they say is of the start, so that a name that is replaced meanwhile is not missing,
    and what is on the device fits there.

    Parameters
    ----------
    registry, store
        What knows the generations, and where their weights are.
    stats : SchedulerStats
        Of now.
    num_at_once : int
        Generations that `go_on` describes.

    Attributes
    ----------
    infos : list of AdapterInfo
        Those described so far, by adapter id.
    """

    def __init__(
        self, registry: AdapterRegistry, stats: SchedulerStats, store: AdapterStore, num_at_once: int
    ) -> None:
        self.infos: list[AdapterInfo] = []
        self._residencies = {residency.adapter_id: residency for residency in store.snapshot()}
        self._num_at_once = num_at_once
        self._counts = {adapter.adapter_id: adapter for adapter in stats.adapters}
        self._generations = registry.generations()
        self._serving = {
            generation.adapter_id
            for generation in self._generations
            if registry.find(generation.name) is generation
        }
        self._num_done = 0

    def go_on(self) -> bool:
        """Describe the next ones; True when there are no more."""
        begin, self._num_done = self._num_done, self._num_done + self._num_at_once
        part = self._generations[begin : self._num_done]
        self.infos += make_adapter_infos(self._serving, part, self._counts, self._residencies)
        return self._num_done >= len(self._generations)


def make_adapter_infos(
    serving: Set[int],
    generations: Iterable[AdapterGeneration],
    counts: Mapping[int, AdapterStats],
    residencies: Mapping[int, AdapterResidency],
) -> list[AdapterInfo]:
    """Join what the registry, the scheduler and the adapter memory know of generations, in their order.

    Parameters
    ----------
    serving : set of int
        Adapter ids of the generations that new requests get.
    generations : iterable of AdapterGeneration
        Which to tell of.
    counts : mapping from int to AdapterStats
        The scheduler's, by adapter id.
    residencies : mapping from int to AdapterResidency
        Of the adapter memory, by adapter id.
    """
    infos = []
    for generation in generations:
        count = counts[generation.adapter_id]
        residency = residencies[generation.adapter_id]
        infos.append(
            AdapterInfo(
                name=generation.name,
                adapter_id=generation.adapter_id,
                path=generation.path,
                content_digest=generation.content_digest,
                lora_rank=generation.lora_rank,
                num_bytes=generation.num_bytes,
                pinned=generation.pinned,
                weight=generation.weight,
                is_serving=generation.adapter_id in serving,
                state=count.state.name.lower(),
                is_closed=count.is_closed,
                is_paused=count.is_paused,
                load_failed=count.load_failed,
                tier=residency.tier,
                is_being_read=residency.host.is_being_read,
                adapter_slot=residency.adapter_slot,
                last_used_s=residency.host.last_used_s,
                load_ms=residency.load_ms,
                total_reads=residency.host.num_reads,
                num_waiting_requests=count.num_waiting_requests,
                num_running_requests=count.num_running_requests,
                num_tree_pages=count.num_tree_pages,
                num_private_pages=count.num_private_pages,
                num_host_pages=count.num_host_pages,
                total_hit_tokens=count.num_hit_tokens,
                total_missed_tokens=count.num_missed_tokens,
                total_scheduled_tokens=count.num_scheduled_tokens,
                total_started_requests=count.num_started_requests,
                total_queue_us=count.total_queue_us,
                total_loads=count.num_loads,
                total_evictions=count.num_evictions,
            )
        )
    return infos


def make_stats(
    stats: SchedulerStats,
    loop: StepLoop,
    store: AdapterStore,
    kv_events: KVEventPublisher | None,
    admission: Admission,
) -> EngineStats:
    """Give the scheduler's counts, and the engine's own, as a message."""
    counted = {name: getattr(stats, name) for name in _SAME_NAME}
    counted["total_rejected_requests"] += admission.num_refused
    times = loop.times.quantiles()
    return EngineStats(
        **counted,
        num_adapters=len(stats.adapters) - 1,  # The base model is the first.
        num_adapters_being_read=store.num_reads_under_way,
        total_steps=loop.num_steps,
        loop_p50_us=times.p50_us,
        loop_p99_us=times.p99_us,
        loop_max_us=times.max_us,
        total_load_waits=store.num_load_waits,
        total_recomputed_tokens=loop.num_recomputed_tokens,
        total_kv_event_batches=0 if kv_events is None else kv_events.num_batches,
        total_dropped_kv_event_batches=0 if kv_events is None else kv_events.num_dropped_batches,
    )


def describe_plan(plan: ExecutionPlan) -> str:
    """Give a plan's arrays in one line, for the log."""
    names = (
        "request_ids",
        "page_table_rows",
        "num_scheduled_tokens",
        "num_computed_tokens",
        "adapter_slots",
        "load_adapter_ids",
        "load_adapter_slots",
        "drained_adapter_ids",
        "evicted_adapter_ids",
        "transfer_ids",
        "transfer_kinds",
        "transfer_offsets",
        "transfer_source_pages",
        "transfer_destination_pages",
    )
    arrays = ", ".join(f"{name}={getattr(plan, name).tolist()}" for name in names)
    return f"plan_id={plan.plan_id}, {arrays}"
