#include <algorithm>
#include <iterator>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {
namespace {

AdapterState PublicState(const Adapter& adapter) {
  if (adapter.is_draining) return AdapterState::kDraining;
  switch (adapter.load_state) {
    case LoadState::kDue:
    case LoadState::kLoading:
      return AdapterState::kLoading;
    case LoadState::kResident:
      return AdapterState::kResident;
    case LoadState::kRegistered:
    case LoadState::kFailed:
      break;
  }
  return AdapterState::kRegistered;
}

/// `namespaces` is ordered by id. Nullptr once a drained namespace has destroyed itself.
const NamespaceStats* FindNamespace(const std::vector<NamespaceStats>& namespaces, NamespaceId id) {
  const auto it = std::lower_bound(
      namespaces.begin(), namespaces.end(), id,
      [](const NamespaceStats& stats, NamespaceId wanted) { return stats.id < wanted; });
  return it != namespaces.end() && it->id == id ? &*it : nullptr;
}

}  // namespace

SchedulerCounters Scheduler::Impl::Counters() const {
  const PolicyCounters& policy = policy_.counters();
  return {.num_queued_requests = requests_.num_queued(),
          .num_queued_tokens = requests_.num_queued_tokens(),
          .num_preempted_requests = std::ssize(requests_.preempted()),
          .num_running_requests = std::ssize(requests_.running()),
          .num_resident_adapters = adapters_.num_resident(),
          .num_loading_adapters = adapters_.num_loading(),
          .num_adapter_bytes = adapters_.num_bytes(),
          .num_adapters_in_line = std::ssize(adapters_.line()),
          .num_paused_adapters = std::ssize(adapters_.paused()),
          .total_plans = next_plan_id_,
          .total_decode_rows = policy.num_decode_rows,
          .total_prefill_rows = policy.num_prefill_rows,
          .total_prefill_tokens = policy.num_prefill_tokens,
          .total_step_adapters = num_step_adapters_,
          .total_started_requests = policy.num_started,
          .total_queue_us = policy.total_queue_us,
          .total_finished_requests = num_finished_requests_,
          .total_aborted_requests = num_aborted_requests_,
          .total_expired_requests = num_expired_requests_,
          .total_rejected_requests = num_rejected_requests_,
          .total_preemptions = policy.num_preemptions,
          .total_adapter_loads = num_adapter_loads_,
          .total_failed_adapter_loads = num_failed_adapter_loads_,
          .total_adapter_evictions = num_adapter_evictions_,
          .total_adapter_pauses = residency_.num_pauses(),
          .total_closings = residency_.num_closings()};
}

SchedulerStats Scheduler::Impl::Stats() const {
  const CacheStats cache = cache_.Stats();
  const PolicyCounters& policy = policy_.counters();
  SchedulerStats stats;
  static_cast<SchedulerCounters&>(stats) = Counters();
  stats.num_waiting_requests = stats.num_queued_requests + stats.num_preempted_requests;
  stats.num_device_pages = cache.num_device_pages;
  stats.num_free_pages = cache.num_free_pages;
  stats.num_available_pages = cache_.NumAvailablePages();
  stats.num_tree_pages = cache.num_tree_pages;
  stats.num_private_pages = cache.num_private_pages;
  stats.total_evicted_pages = cache.num_evicted_pages;
  stats.total_queried_tokens = policy.num_queried_tokens;
  stats.total_hit_tokens = policy.num_hit_tokens;
  stats.total_host_hit_tokens = policy.num_host_hit_tokens;
  stats.num_host_pages = cache.num_host_pages;
  stats.num_free_host_pages = cache.num_free_host_pages;
  stats.total_evicted_host_pages = cache.num_evicted_host_pages;
  stats.num_transfers = cache.num_transfers;
  const std::vector<NamespaceStats> namespaces = cache_.NamespaceStatsList();
  for (const auto& [id, adapter] : adapters_.adapters()) {
    AdapterStats& entry = stats.adapters.emplace_back();
    entry.adapter_id = id;
    entry.state = PublicState(adapter);
    entry.adapter_slot = adapter.slot;
    entry.load_failed = adapter.load_state == LoadState::kFailed;
    entry.is_pinned = adapter.options.is_pinned;
    entry.is_closed = adapter.is_closed;
    entry.is_paused = adapter.standing == AdapterStanding::kPaused;
    entry.size_bytes = adapter.options.size_bytes;
    entry.num_waiting_requests = std::ssize(adapter.queue) + adapter.num_preempted_requests;
    entry.num_running_requests = adapter.num_running_requests;
    entry.num_scheduled_tokens = adapter.num_scheduled_tokens;
    entry.num_started_requests = adapter.num_started_requests;
    entry.total_queue_us = adapter.total_queue_us;
    entry.num_loads = adapter.num_loads;
    entry.num_evictions = adapter.num_evictions;
    entry.num_hit_tokens = adapter.domains.num_dropped_hit_tokens;
    entry.num_missed_tokens = adapter.domains.num_dropped_missed_tokens;
    for (const NamespaceId namespace_id : adapters_.NamespacesOf(adapter)) {
      const NamespaceStats* found = FindNamespace(namespaces, namespace_id);
      entry.num_tree_pages += found->num_tree_pages;
      entry.num_private_pages += found->num_private_pages;
      entry.num_host_pages += found->num_host_pages;
      entry.num_hit_tokens += found->num_hit_tokens;
      entry.num_missed_tokens += found->num_missed_tokens;
    }
  }
  return stats;
}

std::vector<AdapterKVEvent> Scheduler::Impl::TakeEvents() {
  std::vector<AdapterKVEvent> taken;
  for (KVEvent& event : cache_.TakeEvents()) {
    const std::optional<AdapterId> adapter_id = adapters_.FindByNamespace(event.namespace_id);
    const Adapter* adapter = adapter_id.has_value() ? adapters_.Find(*adapter_id) : nullptr;
    const bool is_private = adapter != nullptr && adapter->namespace_id != event.namespace_id;
    taken.push_back(
        {.adapter_id = adapter_id, .is_private = is_private, .event = std::move(event)});
  }
  return taken;
}

void Scheduler::Impl::CheckInvariants() const {
  cache_.CheckInvariants();
  transfers_.CheckInvariants();
  rows_.CheckInvariants();
  adapters_.CheckInvariants();
  requests_.CheckInvariants();
  LS_CHECK(std::cmp_equal(rows_.num_taken(), requests_.running().size()), rows_.num_taken(),
           " rows taken by ", requests_.running().size(), " requests");
  for (const Request* request : requests_.running()) {
    const RunningResources& running = request->running();
    const auto num_pages = static_cast<std::int64_t>(running.lease.pages().size());
    LS_CHECK(std::ranges::count(adapters_.NamespacesOf(request->adapter()),
                                running.namespace_handle.id()) == 1,
             "request ", request->id(), " is in namespace ", running.namespace_handle.id());
    LS_CHECK(running.num_computed_tokens <= num_pages * options_.page_size, "request ",
             request->id(), " computed ", running.num_computed_tokens, " tokens in ", num_pages,
             " pages");
    LS_CHECK(
        running.lease.num_published_pages() <= running.num_computed_tokens / options_.page_size,
        "request ", request->id(), " published pages that are not computed");
    LS_CHECK(!request->Is<Decoding>() || request->num_missing_tokens() == 1, "request ",
             request->id(), " decodes with ", request->num_missing_tokens(), " tokens missing");
    LS_CHECK(request->Is<Loading>() == running.lease.IsLoading(), "request ", request->id(), " is ",
             StateName(request->state()), " but its lease is not, or the reverse");
    LS_CHECK(!request->Is<Loading>() || running.num_planned_pages == 0, "request ", request->id(),
             " was planned before its pages arrived");
    LS_CHECK(!request->IsEnding() || IsInOutstandingPlan(*request), "request ", request->id(),
             " waits for a plan that has returned");
  }
  const std::vector<NamespaceStats> namespaces = cache_.NamespaceStatsList();
  for (const auto& [id, adapter] : adapters_.adapters()) {
    std::int64_t num_handles = 0;
    std::int64_t num_leases = 0;
    for (const NamespaceId namespace_id : adapters_.NamespacesOf(adapter)) {
      const NamespaceStats* found = FindNamespace(namespaces, namespace_id);
      num_handles += found->num_handles;
      num_leases += found->num_leases;
    }
    // 0 and 0 once it has drained; AdapterTable has checked that.
    LS_CHECK(num_handles == adapter.num_requests(), "adapter ", id, " has ", adapter.num_requests(),
             " requests and ", num_handles, " namespace handles");
    LS_CHECK(num_leases == adapter.num_running_requests, "adapter ", id, " runs ",
             adapter.num_running_requests, " requests with ", num_leases, " leases");
  }
}

}  // namespace lora_serve
