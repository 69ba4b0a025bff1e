#include <algorithm>
#include <map>

#include "common/check.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {
namespace {

AdapterState PublicState(const Adapter& adapter) {
  if (adapter.is_draining) return AdapterState::kDraining;
  switch (adapter.load_state) {
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

SchedulerStats Scheduler::Impl::Stats() const {
  const CacheStats cache = cache_.Stats();
  const PolicyCounters& counters = policy_.counters();
  SchedulerStats stats;
  stats.num_preempted_requests = static_cast<std::int64_t>(requests_.preempted().size());
  stats.num_waiting_requests =
      static_cast<std::int64_t>(requests_.queued().size()) + stats.num_preempted_requests;
  stats.num_running_requests = static_cast<std::int64_t>(requests_.running().size());
  stats.num_device_pages = cache.num_device_pages;
  stats.num_free_pages = cache.num_free_pages;
  stats.num_tree_pages = cache.num_tree_pages;
  stats.num_private_pages = cache.num_private_pages;
  stats.total_preemptions = counters.num_preemptions;
  stats.total_evicted_pages = cache.num_evicted_pages;
  stats.total_queried_tokens = counters.num_queried_tokens;
  stats.total_hit_tokens = counters.num_hit_tokens;
  stats.total_host_hit_tokens = counters.num_host_hit_tokens;
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
    entry.num_waiting_requests = adapter.num_queued_requests + adapter.num_preempted_requests;
    entry.num_running_requests = adapter.num_running_requests;
    if (const NamespaceStats* found = FindNamespace(namespaces, adapter.namespace_id)) {
      entry.num_tree_pages = found->num_tree_pages;
      entry.num_private_pages = found->num_private_pages;
      entry.num_host_pages = found->num_host_pages;
      entry.num_hit_tokens = found->num_hit_tokens;
      entry.num_missed_tokens = found->num_missed_tokens;
    }
  }
  return stats;
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
    LS_CHECK(running.namespace_handle.id() == request->adapter().namespace_id, "request ",
             request->id(), " is in namespace ", running.namespace_handle.id());
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
    LS_CHECK(!request->Is<Aborting>() || IsInOutstandingPlan(*request), "request ", request->id(),
             " waits for a plan that has returned");
  }
  const std::vector<NamespaceStats> namespaces = cache_.NamespaceStatsList();
  for (const auto& [id, adapter] : adapters_.adapters()) {
    const NamespaceStats* found = FindNamespace(namespaces, adapter.namespace_id);
    if (found == nullptr) continue;  // drained; AdapterTable has checked that
    const auto num_live =
        adapter.num_queued_requests + adapter.num_preempted_requests + adapter.num_running_requests;
    LS_CHECK(found->num_handles == num_live, "adapter ", id, " has ", num_live, " requests and ",
             found->num_handles, " namespace handles");
    LS_CHECK(found->num_leases == adapter.num_running_requests, "adapter ", id, " runs ",
             adapter.num_running_requests, " requests with ", found->num_leases, " leases");
  }
}

}  // namespace lora_serve
