#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <unordered_set>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler/scheduler.h"

namespace lora_serve {

/// Where a request of an adapter is counted; kNone before its arrival and after its end.
enum class RequestList : std::uint8_t { kNone, kQueued, kPreempted, kRunning };

/// How far a generation is on its way to the device. Whether it drains is a question of its own: a
/// draining generation with requests still has to be loaded.
enum class LoadState : std::uint8_t { kRegistered, kLoading, kResident, kFailed };

/// One generation, or the base model (id 0, always resident, slot -1).
struct Adapter {
  AdapterId id;
  AdapterOptions options;
  NamespaceId namespace_id;
  LoadState load_state = LoadState::kRegistered;
  AdapterSlot slot = kNoAdapterSlot;
  bool is_draining = false;
  /// Nothing refers to it any more; it waits for its report or for that plan's return.
  bool is_drained = false;
  std::int64_t num_queued_requests = 0;
  std::int64_t num_preempted_requests = 0;
  /// Requests that hold a page-table row.
  std::int64_t num_running_requests = 0;

  [[nodiscard]] bool IsBase() const { return id == kBaseAdapter; }
  /// True when it counts against `max_loras`: from the first admission of a request to its end. A
  /// preempted request keeps its adapter's place, so that newer work cannot take it.
  [[nodiscard]] bool HoldsPlace() const {
    return !IsBase() && num_running_requests + num_preempted_requests > 0;
  }
  [[nodiscard]] bool HasRequests() const {
    return num_queued_requests + num_preempted_requests + num_running_requests > 0;
  }
};

/// The adapter generations: their life, their slots, and who uses them.
///
///     Registered --PlanLoads--> Loading --OnLoaded--> Resident
///                                       \-OnFailed--> Failed (never retried, never scheduled)
///     any --Drain--> draining --last request, load and copy end--> drained --TakeDrained-->
///     reported --Remove-->
///
/// Owns: adapter records, slots, the cap on distinct adapters; tells the cache which adapters are
/// on the device. Does not know: requests (the caller counts them in and out), rows, pages.
///
/// Invariants: two adapters never share a slot, from the plan of the load to the return of the plan
/// that reports the drain; at most `max_loras` adapters hold a place, the base never; a drained
/// adapter has no request and no namespace.
class AdapterTable {
 public:
  /// `cache` must outlive the table.
  AdapterTable(KVPrefixCache* cache, std::int32_t max_loras);
  AdapterTable(const AdapterTable&) = delete;
  AdapterTable& operator=(const AdapterTable&) = delete;

  // --- Life
  // -------------------------------------------------------------------------------------------
  /// Throws: InvalidArgumentError when the id was used before, is the base's or negative, or the
  /// size is.
  void Open(AdapterId id, const AdapterOptions& options);
  /// Draining twice changes nothing. Throws: AdapterNotFoundError (unknown, or the base).
  void Drain(AdapterId id);
  /// The generation that takes new requests under this id.
  /// Throws: AdapterNotFoundError when it is unknown, draining, or its load failed.
  [[nodiscard]] Adapter& GetOpen(AdapterId id);

  // --- Plans
  // ------------------------------------------------------------------------------------------
  /// The drained generations not reported yet, in the order in which they became so. Marks them
  /// reported.
  [[nodiscard]] std::vector<AdapterId> TakeDrained();
  /// Gives the lowest free slot to every registered generation, in the order of Open, and makes it
  /// Loading.
  [[nodiscard]] std::vector<const Adapter*> TakeLoads();
  /// True when a load or a drain is due.
  [[nodiscard]] bool HasWork() const {
    return !registered_.empty() || !drained_.empty() || !waiting_for_copies_.empty();
  }
  void OnLoaded(AdapterId id);
  void OnFailed(AdapterId id);
  /// Copies between the tiers have ended: this may complete drains.
  void OnCopiesEnded();
  /// The plan that reported `id` as drained has returned: its slot is free.
  void Remove(AdapterId id);

  // --- Requests
  // ---------------------------------------------------------------------------------------
  /// True when one more request of `adapter` may run: it is resident, and it holds a place or one
  /// is left. The base always may.
  [[nodiscard]] bool MayRun(const Adapter& adapter) const;
  /// A request of `adapter` moved from one list to another. When it ended (`to` is kNone) its
  /// namespace handle must be gone: this may complete a drain.
  void MoveRequest(Adapter& adapter, RequestList from, RequestList to);

  /// Ordered by id; the base is the first.
  [[nodiscard]] const std::map<AdapterId, Adapter>& adapters() const { return adapters_; }
  [[nodiscard]] std::int32_t num_places_taken() const { return num_places_taken_; }

  /// Throws: InternalError.
  void CheckInvariants() const;

 private:
  [[nodiscard]] Adapter& Get(AdapterId id);
  [[nodiscard]] AdapterSlot TakeLowestFreeSlot();
  void FinishLoad(AdapterId id, LoadState outcome);
  void CompleteDrainIfUnused(Adapter& adapter);

  KVPrefixCache* cache_backptr_;
  std::int32_t max_loras_;
  std::map<AdapterId, Adapter> adapters_;
  std::unordered_set<AdapterId> used_ids_;  // looked up only, never iterated
  std::vector<AdapterId> registered_;       // not planned yet, in the order of Open
  std::vector<AdapterId> drained_;          // not reported yet, in the order of completion
  /// Draining, without requests or load, but copies of their pages are under way.
  std::set<AdapterId> waiting_for_copies_;
  std::vector<bool> slot_is_taken_;
  std::int32_t num_places_taken_ = 0;
};

}  // namespace lora_serve
