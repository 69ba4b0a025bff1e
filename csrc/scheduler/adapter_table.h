#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler/adapter.h"
#include "scheduler/scheduler_options.h"

namespace lora_serve {

/// Where a request of an adapter is counted; kNone before its arrival and after its end.
enum class RequestList : std::uint8_t { kNone, kQueued, kPreempted, kRunning };

/// The adapter generations: their life, their slots and bytes, their queues, who uses them.
///
///     Registered --ReserveBytes--> Due --TakeDue--> Loading --OnLoaded--> Resident --Evict-->
///                                                     \-OnFailed--> Failed        Registered
///     any --Drain--> draining --last request, load and copy end--> drained --TakeDrained-->
///     reported --Remove-->
///
/// Owns: adapter records, slots, the byte budget and the cap on distinct adapters, the lists of
/// AdapterStanding; tells the cache which adapters are on the device. Does not know: who should be
/// loaded, evicted or closed (AdapterResidency), rows, pages, plans.
///
/// Invariants: every adapter is in the list of its standing; two adapters never share a slot, from
/// the plan of the load to an eviction or to the return of the plan that reports the drain; at most
/// `max_loras` adapters hold a place, the base never; who holds a place is resident and has started
/// requests; bytes in use are within the budget; a drained adapter has no request and no namespace.
class AdapterTable {
 public:
  using Line = std::map<LineKey, Adapter*>;

  /// `cache` must outlive the table.
  AdapterTable(KVPrefixCache* cache, const SchedulerOptions& options);
  AdapterTable(const AdapterTable&) = delete;
  AdapterTable& operator=(const AdapterTable&) = delete;

  // --- Life -------------------------------------------------------------------------------------
  /// Returns true when the adapter got its bytes and is due.
  /// Throws: InvalidArgumentError when the id is not above every id opened before, is the base's
  /// or negative, or a field is out of range; CapacityError when it can never fit beside the pinned
  /// ones.
  bool Open(AdapterId id, const AdapterOptions& options);
  /// Draining twice changes nothing. Throws: AdapterNotFoundError (unknown, or the base).
  void Drain(AdapterId id);
  /// The generation that takes new requests under this id.
  /// Throws: AdapterNotFoundError when it is unknown, draining, or its load failed.
  [[nodiscard]] Adapter& GetOpen(AdapterId id);
  /// Throws: AdapterNotFoundError as GetOpen, or for the base; CapacityError.
  void SetPinned(AdapterId id, bool is_pinned);
  /// Throws: AdapterNotFoundError when it is unknown.
  void SetStaged(AdapterId id, bool is_staged);
  /// Throws: AdapterNotFoundError as GetOpen; InvalidArgumentError.
  void SetWeight(AdapterId id, double weight);

  // --- Plans ------------------------------------------------------------------------------------
  /// The time of the step that begins; waiting counts from it.
  void BeginStep(std::int64_t now_us) {
    now_us_ = now_us;
    ++num_steps_;
  }
  /// Counts the calls of BeginStep.
  [[nodiscard]] std::int64_t num_steps() const { return num_steps_; }
  /// The drained generations not reported yet, in the order in which they became so. Marks them
  /// reported; their bytes are free.
  [[nodiscard]] std::vector<AdapterId> TakeDrained();
  /// Gives the lowest free slot to every generation that is due, in the order of becoming so, and
  /// makes it Loading; a staged one is Resident at once.
  [[nodiscard]] std::vector<const Adapter*> TakeDue();
  /// True for one whose weights the caller still has to read: room is of no use to it yet.
  [[nodiscard]] bool IsToBeRead(const Adapter& adapter) const {
    return loads_staged_only_ && !adapter.HoldsBytes() && !adapter.options.is_staged;
  }
  /// Requires: it is in line, and NumFreeBytes() suffices.
  void ReserveBytes(Adapter& adapter);
  /// Requires: it is resident, not pinned, and holds no place.
  void Evict(Adapter& adapter);
  /// Lets a paused adapter go on. Requires: it is resident, and a place is free.
  void EnterPlace(Adapter& adapter);
  /// Pauses an adapter. Requires: it holds a place, and no outstanding plan has a row of it.
  void LeavePlace(Adapter& adapter);
  [[nodiscard]] bool IsLoading(AdapterId id) const;
  void OnLoaded(AdapterId id);
  void OnFailed(AdapterId id);
  /// The load of a staged one, which was taken for resident since, has failed.
  void OnStagedFailed(AdapterId id);
  /// Copies between the tiers have ended: this may complete drains.
  void OnCopiesEnded();
  /// The plan that reported `id` as drained has returned: its slot is free.
  void Remove(AdapterId id);
  /// True when a load or a drain is due or under way.
  [[nodiscard]] bool HasWork() const {
    return !due_.empty() || num_loading_ > 0 || !drained_.empty() || !waiting_for_copies_.empty() ||
           !line_.empty();
  }

  // --- Domains ----------------------------------------------------------------------------------
  /// A handle on the adapter's namespace of this isolation domain, which the first request of the
  /// domain opens; empty = the default domain. Requires: the adapter is open.
  /// Complexity: O(log domains), amortised.
  [[nodiscard]] NamespaceHandle RetainNamespace(Adapter& adapter, const std::string& domain);
  /// Those that exist, the default domain's first.
  [[nodiscard]] std::vector<NamespaceId> NamespacesOf(const Adapter& adapter) const;

  // --- Requests ---------------------------------------------------------------------------------
  /// A request moved from one list of its adapter to another. When it ended (`to` is kNone) its
  /// namespace handle must be gone: this may complete a drain.
  void MoveRequest(Request& request, RequestList from, RequestList to);
  /// `num_tokens` tokens of a request were scheduled.
  static void Charge(Adapter& adapter, std::int32_t num_tokens);
  /// A request of `adapter` was chosen although others wait: who becomes active from now on starts
  /// no lower.
  void AdvanceVirtualTime(const Adapter& adapter);

  // --- Lists ------------------------------------------------------------------------------------
  /// Those whose standing is kInLine, kUnplaced, kPaused: who goes first is in front. They have
  /// one order in common.
  [[nodiscard]] const Line& line() const { return line_; }
  [[nodiscard]] const Line& unplaced() const { return unplaced_; }
  [[nodiscard]] const Line& paused() const { return paused_; }
  /// In any of these three.
  [[nodiscard]] std::int64_t num_waiting() const {
    return std::ssize(line_) + std::ssize(unplaced_) + std::ssize(paused_);
  }
  [[nodiscard]] const std::map<AdapterId, Adapter*>& placed() const { return placed_; }
  /// kIdle; the least recently used in front.
  [[nodiscard]] const std::map<std::int64_t, Adapter*>& idle() const { return idle_; }
  [[nodiscard]] std::int64_t num_idle_bytes() const { return num_idle_bytes_; }
  [[nodiscard]] Adapter& base() { return base_; }

  [[nodiscard]] std::int64_t NumFreeBytes() const { return max_bytes_ - num_bytes_; }
  [[nodiscard]] std::int64_t num_bytes() const { return num_bytes_; }
  [[nodiscard]] std::int32_t num_loading() const { return num_loading_; }
  [[nodiscard]] std::int32_t num_due() const { return static_cast<std::int32_t>(due_.size()); }
  [[nodiscard]] std::int32_t num_resident() const { return num_resident_; }
  [[nodiscard]] std::int32_t num_free_places() const {
    return max_loras_ - static_cast<std::int32_t>(placed_.size());
  }
  /// Ordered by id; the base is the first.
  [[nodiscard]] const std::map<AdapterId, Adapter>& adapters() const { return adapters_; }
  /// Nullptr when there is no such generation.
  [[nodiscard]] const Adapter* Find(AdapterId id) const {
    const auto it = adapters_.find(id);
    return it == adapters_.end() ? nullptr : &it->second;
  }
  /// Whose namespace it is or was; nothing once the adapter is removed. Complexity: O(log
  /// adapters).
  [[nodiscard]] std::optional<AdapterId> FindByNamespace(NamespaceId id) const {
    const auto it = by_namespace_.find(id);
    return it == by_namespace_.end() ? std::nullopt : std::optional(it->second);
  }

  /// Throws: InternalError.
  void CheckInvariants() const;

 private:
  [[nodiscard]] Adapter& Get(AdapterId id);
  /// Throws: CapacityError unless every adapter could run beside the pinned ones if `id`, of
  /// `size_bytes`, were one of them or not.
  void CheckFits(AdapterId id, std::int64_t size_bytes, bool is_pinned) const;
  /// Counts it among the pinned or the other adapters that need room, or ends that.
  void CountSize(const Adapter& adapter);
  void UncountSize(const Adapter& adapter);
  void CheckLists() const;
  [[nodiscard]] AdapterSlot TakeLowestFreeSlot();
  /// True while the namespace of any of its domains exists.
  [[nodiscard]] bool HasNamespace(const Adapter& adapter) const;
  void SetResidentInCache(const Adapter& adapter, bool is_resident);
  void DropIdleDomains();
  void FinishLoad(AdapterId id, LoadState outcome);
  void SetLoadState(Adapter& adapter, LoadState state);
  void CompleteDrainIfUnused(Adapter& adapter);
  [[nodiscard]] static AdapterStanding StandingOf(const Adapter& adapter);
  /// The queue and the counts of a request's adapter.
  static void CountMove(Request& request, RequestList from, RequestList to);
  /// A first request of `adapter` was admitted: it gets its place, and its turn.
  void BeginTurn(Adapter& adapter);
  /// Brings the lists up to date after a change of `adapter`.
  void Relist(Adapter& adapter);
  void List(Adapter& adapter);
  void Unlist(const Adapter& adapter);
  /// Where adapters of this standing wait; nullptr when they wait for nothing.
  [[nodiscard]] Line* LineOf(AdapterStanding standing);

  KVPrefixCache* cache_backptr_;
  const std::int32_t max_loras_;
  const std::int32_t max_num_seqs_;
  const std::int64_t max_bytes_;
  const std::int64_t priority_ageing_us_;
  const bool loads_staged_only_;
  std::map<AdapterId, Adapter> adapters_;
  Adapter& base_;
  /// Of every adapter in `adapters_` and its domains, also when the namespace has destroyed itself.
  std::map<NamespaceId, AdapterId> by_namespace_;
  /// Ids only grow, so this alone tells which were used: a report about a generation that is gone
  /// can never mean another one.
  AdapterId newest_id_ = kBaseAdapter;
  std::vector<AdapterId> due_;      // in the order of becoming so
  std::vector<AdapterId> drained_;  // not reported yet, in the order of completion
  /// Draining, without requests or load, but copies of their pages are under way.
  std::set<AdapterId> waiting_for_copies_;
  Line line_;
  Line unplaced_;
  Line paused_;
  std::map<AdapterId, Adapter*> placed_;
  std::map<std::int64_t, Adapter*> idle_;
  std::vector<bool> slot_is_taken_;
  std::int64_t num_bytes_ = 0;
  std::int64_t num_idle_bytes_ = 0;
  // Of the adapters that are neither drained nor failed.
  std::int64_t num_pinned_bytes_ = 0;
  std::multiset<std::int64_t> unpinned_sizes_;
  std::int32_t num_loading_ = 0;
  std::int32_t num_resident_ = 0;
  std::int64_t next_join_number_ = 0;
  std::int64_t next_use_number_ = 0;
  /// Namespaces beside those of the default domain, over all adapters.
  std::int64_t num_domains_ = 0;
  std::int64_t num_domains_to_drop_at_ = 64;
  /// Still in `by_namespace_`: the events of their end may not have been taken yet.
  std::vector<NamespaceId> dropped_namespaces_;
  std::int64_t next_domain_use_number_ = 0;
  std::int64_t virtual_time_ = 0;
  std::int64_t now_us_ = 0;
  std::int64_t num_steps_ = 0;
};

}  // namespace lora_serve
