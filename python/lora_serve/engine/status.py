"""What the engine tells about its adapters and itself: values that may cross to another process."""

from __future__ import annotations

from typing import Literal

import msgspec


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter generation, as `/v1/loras` shows it.

    Parameters
    ----------
    name : str
        Several generations of a name exist while old ones drain.
    adapter_id : int
        The generation, at least 1.
    path : str
        The directory that it was read from.
    content_digest : str
        Hex.
    lora_rank : int
        Largest rank of its modules.
    num_bytes : int
        Bytes of its weights.
    pinned : bool
        As the last load of this content asked.
    weight : float
        Its share of the steps beside others' under the policy 'fair', as the last load of this content asked.
    is_serving : bool
        True when new requests for the name get this generation.
    state : {'registered', 'loading', 'resident', 'draining'}
        The scheduler's view; a registered one is brought in when requests wait for it.
    is_closed : bool
        True while it takes no newcomers, because another adapter has waited long for its room.
    is_paused : bool
        True while its started requests are left out of the steps, so that others have its room.
    load_failed : bool
        True when it could not be brought to the device: it drains.
    tier : {'device', 'host', 'disk'}
        The fastest memory that holds its weights.
    is_being_read : bool
        True while they are read from disk again, because requests want it.
    adapter_slot : int
        Index into the device tables; -1 = none.
    last_used_s : float
        Unix time at which it was read, or a plan brought it to the device, last.
    load_ms : dict of str to float
        Milliseconds that each stage of its last load took: "locate", "check", "room" (waiting for host
        memory), "read", and "copy" to the device.
    total_reads : int
        How often it was read from disk.
    num_waiting_requests, num_running_requests : int
        Its requests; preempted ones wait.
    num_tree_pages, num_private_pages : int
        Device KV pages of its namespace: in the prefix tree, and held by requests only.
    num_host_pages : int
        Host KV pages of its namespace.
    total_hit_tokens, total_missed_tokens : int
        Tokens of its requests' first admissions: taken from the cache, of either tier, and the others.
    total_scheduled_tokens : int
        Tokens that it was given in steps: prompt tokens computed, and output.
    total_started_requests, total_queue_us : int
        Requests that have begun to run, and what they waited for it from their arrival, together.
    total_loads, total_evictions : int
        Times that it was brought to the device, and taken off to make room.
    """

    name: str
    adapter_id: int
    path: str
    content_digest: str
    lora_rank: int
    num_bytes: int
    pinned: bool
    weight: float
    is_serving: bool
    state: str
    is_closed: bool
    is_paused: bool
    load_failed: bool
    tier: Literal["device", "host", "disk"]
    is_being_read: bool
    adapter_slot: int
    last_used_s: float
    load_ms: dict[str, float]
    total_reads: int
    num_waiting_requests: int
    num_running_requests: int
    num_tree_pages: int
    num_private_pages: int
    num_host_pages: int
    total_hit_tokens: int
    total_missed_tokens: int
    total_scheduled_tokens: int
    total_started_requests: int
    total_queue_us: int
    total_loads: int
    total_evictions: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one engine, over all adapters and the base model.

    Parameters
    ----------
    num_waiting_requests, num_running_requests, num_preempted_requests : int
        Requests now; preempted ones are counted as waiting too.
    num_queued_requests, num_queued_tokens : int
        Requests that have not begun to run, and their prompt tokens; see the limits of EngineConfig.
    num_device_pages, num_free_pages, num_tree_pages, num_private_pages : int
        KV pages on the device: all = free + in the tree + private to requests.
    num_available_pages : int
        Of them, those that no request uses: free ones, and cached ones that can go at once.
    num_host_pages, num_free_host_pages : int
        KV pages of the host tier: all = free + in the tree.
    num_transfers : int
        Copies between the tiers that are under way.
    num_adapters : int
        Generations that exist, draining ones included.
    num_resident_adapters, num_adapter_bytes : int
        Generations on the device, and their bytes.
    num_adapters_being_read : int
        Generations that are being read from disk again, because requests wait for them.
    num_adapters_in_line, num_paused_adapters : int
        Generations with waiting requests that are not on the device, and those whose started requests are
        left out of the steps for a while.
    total_steps : int
        Plans made since the start.
    loop_p50_us, loop_p99_us, loop_max_us : int
        Microseconds that the step loop itself took in each of its last steps: planning and taking results,
        without the model.
    total_load_waits : int
        Times since the start that the step loop may have waited for a thread that reads adapters: 0, but for
        a lock that one happened to hold for a few microseconds.
    total_decode_rows, total_prefill_rows, total_prefill_tokens, total_step_adapters : int
        What the steps were made of, added up: rows that decode, rows that compute prompt tokens, those
        tokens, and distinct adapters of each step.
    total_started_requests, total_queue_us : int
        Requests that have begun to run, and what they waited for it from their arrival, together.
    total_finished_requests, total_aborted_requests, total_expired_requests, total_rejected_requests : int
        Requests since the start: ended by themselves, ended by somebody, failed because their queue timeout
        had passed, and refused because a limit was reached.
    total_adapter_loads, total_failed_adapter_loads, total_adapter_evictions : int
        Times since the start that an adapter was brought to the device, could not be, and was taken off to
        make room.
    total_adapter_pauses, total_closings : int
        Times since the start that an adapter was paused, and (for each step) was closed to newcomers.
    total_preemptions, total_evicted_pages, total_evicted_host_pages : int
        Since the start; pages that a drain freed are not counted.
    total_recomputed_tokens : int
        Tokens since the start whose KV a preemption had taken away and which were computed again.
    total_queried_tokens, total_hit_tokens : int
        Prompt tokens of first admissions since the start, and those of them that came from the cache.
    total_host_hit_tokens : int
        Of the latter, those that came from the host tier.
    total_kv_event_batches, total_dropped_kv_event_batches : int
        Batches of KV events since the start, and those of them that were dropped because too many waited.
    """

    num_waiting_requests: int
    num_running_requests: int
    num_preempted_requests: int
    num_queued_requests: int
    num_queued_tokens: int
    num_device_pages: int
    num_free_pages: int
    num_tree_pages: int
    num_private_pages: int
    num_available_pages: int
    num_host_pages: int
    num_free_host_pages: int
    num_transfers: int
    num_adapters: int
    num_resident_adapters: int
    num_adapter_bytes: int
    num_adapters_being_read: int
    num_adapters_in_line: int
    num_paused_adapters: int
    total_steps: int
    loop_p50_us: int
    loop_p99_us: int
    loop_max_us: int
    total_load_waits: int
    total_decode_rows: int
    total_prefill_rows: int
    total_prefill_tokens: int
    total_step_adapters: int
    total_started_requests: int
    total_queue_us: int
    total_finished_requests: int
    total_aborted_requests: int
    total_expired_requests: int
    total_rejected_requests: int
    total_adapter_loads: int
    total_failed_adapter_loads: int
    total_adapter_evictions: int
    total_adapter_pauses: int
    total_closings: int
    total_preemptions: int
    total_recomputed_tokens: int
    total_evicted_pages: int
    total_evicted_host_pages: int
    total_queried_tokens: int
    total_hit_tokens: int
    total_host_hit_tokens: int
    total_kv_event_batches: int
    total_dropped_kv_event_batches: int
