#pragma once

#include <cstdint>
#include <vector>

#include "common/strong_id.h"

namespace lora_serve {

enum class AdapterState : std::uint8_t { kRegistered, kLoading, kResident, kDraining };

struct AdapterStats {
  AdapterId adapter_id;
  AdapterState state = AdapterState::kRegistered;
  /// -1 before its load was planned.
  AdapterSlot adapter_slot = kNoAdapterSlot;
  /// Its load failed: it runs nothing, takes nothing, and waits to be drained.
  bool load_failed = false;
  bool is_pinned = false;
  /// Closed to newcomers until an adapter that has waited for its room got in.
  bool is_closed = false;
  /// Its started requests wait until it is its turn again.
  bool is_paused = false;
  std::int64_t size_bytes = 0;
  std::int64_t num_waiting_requests = 0;
  /// Requests that hold a page-table row; one aborted inside a plan does until that plan's Advance.
  std::int64_t num_running_requests = 0;
  /// Device pages of its namespace: in the tree, and private to requests.
  std::int64_t num_tree_pages = 0;
  std::int64_t num_private_pages = 0;
  /// Host pages of its namespace.
  std::int64_t num_host_pages = 0;
  /// Prompt tokens of first admissions: found in the cache, and the others.
  std::int64_t num_hit_tokens = 0;
  std::int64_t num_missed_tokens = 0;
  /// Tokens that it was scheduled: prompt tokens computed, and output.
  std::int64_t num_scheduled_tokens = 0;
  std::int64_t num_started_requests = 0;
  /// From arrival to the first step, of the requests that started.
  std::int64_t total_queue_us = 0;
  std::int64_t num_loads = 0;
  /// Times that it was taken off the device.
  std::int64_t num_evictions = 0;
};

/// Counts that cost the same however many adapters and requests there are. `total_*` count since
/// the scheduler was made.
struct SchedulerCounters {
  std::int64_t num_queued_requests = 0;
  std::int64_t num_queued_tokens = 0;
  std::int64_t num_preempted_requests = 0;
  std::int64_t num_running_requests = 0;
  std::int64_t num_resident_adapters = 0;
  std::int64_t num_loading_adapters = 0;
  /// Of the resident and loading ones.
  std::int64_t num_adapter_bytes = 0;
  /// Adapters that are needed and are neither resident nor loading; paused ones not counted.
  std::int64_t num_adapters_in_line = 0;
  /// Adapters with started requests that others have taken the place of for a while.
  std::int64_t num_paused_adapters = 0;
  std::int64_t total_plans = 0;
  std::int64_t total_decode_rows = 0;
  std::int64_t total_prefill_rows = 0;
  std::int64_t total_prefill_tokens = 0;
  /// Distinct adapters of each plan, added up.
  std::int64_t total_step_adapters = 0;
  std::int64_t total_started_requests = 0;
  std::int64_t total_queue_us = 0;
  std::int64_t total_finished_requests = 0;
  std::int64_t total_aborted_requests = 0;
  std::int64_t total_expired_requests = 0;
  std::int64_t total_rejected_requests = 0;
  std::int64_t total_preemptions = 0;
  std::int64_t total_adapter_loads = 0;
  std::int64_t total_failed_adapter_loads = 0;
  std::int64_t total_adapter_evictions = 0;
  /// Times that an adapter with started requests gave its place to another.
  std::int64_t total_adapter_pauses = 0;
  /// Adapters closed to newcomers, added up over the plans.
  std::int64_t total_closings = 0;
};

struct SchedulerStats : SchedulerCounters {
  /// Queued and preempted.
  std::int64_t num_waiting_requests = 0;
  std::int64_t num_device_pages = 0;
  std::int64_t num_free_pages = 0;
  /// Free, or evictable now: what no request uses.
  std::int64_t num_available_pages = 0;
  std::int64_t num_tree_pages = 0;
  std::int64_t num_private_pages = 0;
  std::int64_t total_evicted_pages = 0;
  std::int64_t total_queried_tokens = 0;   // prompt tokens of requests that started
  std::int64_t total_hit_tokens = 0;       // of these, taken from the cache
  std::int64_t total_host_hit_tokens = 0;  // of these, loaded back from the host
  std::int64_t num_host_pages = 0;
  std::int64_t num_free_host_pages = 0;
  std::int64_t total_evicted_host_pages = 0;
  /// Copies between the tiers that have started and were not reported yet.
  std::int64_t num_transfers = 0;
  /// Ordered by adapter id; the base model (id 0) is always the first.
  std::vector<AdapterStats> adapters;
};

}  // namespace lora_serve
