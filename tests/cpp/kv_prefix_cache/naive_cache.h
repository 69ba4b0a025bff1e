#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "kv_prefix_cache/tier.h"
#include "naive_sequence.h"
#include "operation_coverage.h"

namespace lora_serve {

/// The contract of KVPrefixCache on flat maps: no tree, no edges, no lists, no counters that are
/// kept up to date; every question is answered by a scan.
///
/// A page is there or not, in each tier. It can be evicted when no page of its tier continues it
/// and nothing protects it; one page goes at a time. That this gives the same pages in the same
/// order as runs of pages on compressed edges is what the random test shows.
///
/// Knows everything that can be observed, except which ids the cache chooses: it is told them
/// (Learn...), and finds out when one is used twice.
class NaiveCache {
 public:
  struct NaiveLease {
    NamespaceId ns;
    Tokens published;  // whole pages in the tree, as this lease's, as twins or being loaded
    std::vector<PageId> pages;
    std::vector<bool> is_private;  // by logical page
    std::int32_t num_cached_tokens = 0;
    std::int32_t num_host_cached_tokens = 0;
    std::int32_t branching_tokens = 0;
    std::optional<std::int64_t> load_back;  // number of the transfer
    StateSlot working_slot = kNoStateSlot;
    std::optional<Tokens> resumed;  // the snapshot at its end is protected
    StateSlot reserved_slot = kNoStateSlot;
    std::size_t reserved_page = 0;
    std::vector<std::size_t> attached_pages;  // boundaries of snapshots left behind, oldest first
  };

  /// The device keeps `path` until it ends, the host too when pages are copied; both keep the
  /// snapshots at `boundaries`.
  struct NaiveTransfer {
    TransferKind kind = TransferKind::kWriteBack;
    SequenceKey path;                     // its pages [first_page, end) are copied
    std::size_t first_page = 0;           //
    std::vector<std::size_t> boundaries;  // of the snapshots that are copied, in pages
  };

  /// One page; the cache may report several at once.
  struct NaiveEvent {
    KVEventKind kind = KVEventKind::kStored;
    Tier tier = Tier::kDevice;
    NamespaceId ns;
    std::optional<std::uint64_t> parent_hash;
    std::uint64_t hash = 0;
    Tokens tokens;  // of the page; empty when removed
    friend bool operator==(const NaiveEvent&, const NaiveEvent&) = default;
  };

  NaiveCache(const KVPrefixCacheOptions& options, OperationCoverage* coverage);

  // --- The calls of KVPrefixCache; leases and transfers have numbers -----------------------------

  void OpenNamespace(NamespaceId id, const NamespaceOptions& options);
  void RetainNamespace(NamespaceId id) { ++namespaces_.at(id).num_handles; }
  void DropHandle(NamespaceId id);
  void DrainNamespace(NamespaceId id);
  void SetAdapterResident(NamespaceId id, bool is_resident);
  void SetQuota(NamespaceId id, Tier tier, std::optional<std::int64_t> num_pages);
  [[nodiscard]] bool HasNamespace(NamespaceId id) const { return namespaces_.contains(id); }

  [[nodiscard]] ProbeResult Probe(NamespaceId id, std::span<const TokenId> tokens,
                                  MatchIntent intent) const;
  [[nodiscard]] AcquireOutcome Acquire(int lease, NamespaceId id, std::span<const TokenId> tokens,
                                       const AcquireOptions& options);
  [[nodiscard]] bool Extend(int lease, std::int32_t num_capacity_tokens);
  void Publish(int lease, std::span<const TokenId> tokens);
  void EndLease(int lease);
  [[nodiscard]] bool ReserveSnapshot(int lease, std::int32_t num_tokens);

  void PlanWriteBacks();
  bool StartWriteBack(int lease);
  void CompleteTransfer(std::int64_t transfer);
  void FailTransfer(std::int64_t transfer);

  void SetEventsEnabled(bool is_enabled);
  [[nodiscard]] std::vector<NaiveEvent> TakeEvents() { return std::exchange(events_, {}); }

  [[nodiscard]] std::int64_t NumAvailablePages() const;
  /// Without num_nodes, which a flat model does not have.
  [[nodiscard]] CacheStats Stats() const;
  [[nodiscard]] std::vector<NamespaceStats> NamespaceStatsList() const;
  std::int64_t Evict(Tier tier, std::int64_t num_pages);

  // --- What only tests ask -----------------------------------------------------------------------

  [[nodiscard]] std::vector<NamespaceId> NamespaceIds() const;
  [[nodiscard]] bool IsDraining(NamespaceId id) const { return namespaces_.at(id).is_draining; }
  [[nodiscard]] const NaiveLease& LeaseOf(int lease) const { return leases_.at(lease); }
  [[nodiscard]] const std::map<std::int64_t, NaiveTransfer>& transfers() const {
    return transfers_;
  }
  /// Transfers are numbered in the order in which they started.
  [[nodiscard]] std::int64_t num_started_transfers() const { return next_transfer_; }
  [[nodiscard]] const ResidentMap& pages(Tier tier) const {
    return residents_[IndexOf(Component::kFullAttention)][IndexOf(tier)];
  }
  /// The slot that the lease must report as its resumed snapshot.
  [[nodiscard]] StateSlot ResumedSlot(int lease) const;
  /// The order of a transfer. Destinations that were not learned yet have Resident::kUnknown.
  [[nodiscard]] TransferOrder OrderOf(std::int64_t transfer) const;

  // --- Which ids the real cache chose ------------------------------------------------------------

  /// After Acquire and Extend.
  void LearnPages(int lease, std::span<const PageId> pages);
  void LearnSlots(int lease, StateSlot working_slot, StateSlot resumed_slot);
  void LearnReservedSlot(int lease, StateSlot slot) { leases_.at(lease).reserved_slot = slot; }
  void LearnDestinations(std::int64_t transfer, const TransferOrder& order);
  /// Empty when every id is in range, free ones apart, and has one owner.
  [[nodiscard]] std::string FindIdTrouble() const;

 private:
  struct NaiveNamespace {
    std::uint64_t digest_seed = 0;
    std::array<std::optional<std::int64_t>, kNumTiers> quota_pages;
    bool is_adapter_resident = true;
    bool is_draining = false;
    std::int64_t num_handles = 0;
    std::int64_t num_hit_tokens = 0;
    std::int64_t num_missed_tokens = 0;
    std::array<std::int64_t, kNumTiers> num_evicted_pages{};
  };

  struct Match {
    std::size_t device_present = 0;  // pages
    std::size_t host_present = 0;
    std::size_t structural = 0;  // in some tier, in flight or not
    std::size_t resumable = 0;
    bool is_in_flight = false;
  };

  /// The smallest goes first.
  struct EvictionRank {
    bool is_within_quota = false;
    std::int64_t age_bucket = 0;
    bool is_adapter_resident = false;
    bool is_only_copy = false;
    std::int64_t last_use = 0;
    friend auto operator<=>(const EvictionRank&, const EvictionRank&) = default;
  };

  struct WriteBackTry {
    bool is_started = false;
    bool lacks_room = false;  // there was something to copy, but no room for any of it
  };

  // Which pages there are: naive_cache.cc.
  [[nodiscard]] std::size_t NumTokens(std::size_t num_pages) const;
  [[nodiscard]] std::size_t NumPages(std::span<const TokenId> tokens) const;
  [[nodiscard]] SequenceView Prefix(const SequenceView& sequence, std::size_t num_pages) const;
  [[nodiscard]] std::size_t NumPresent(Tier tier, const SequenceView& sequence) const;
  [[nodiscard]] std::size_t NumCovered(Tier tier, const SequenceView& sequence) const;
  [[nodiscard]] bool HasPresentSnapshot(Tier tier, const SequenceView& boundary) const;
  [[nodiscard]] Match FindMatch(const SequenceView& sequence, std::size_t max_pages,
                                MatchIntent intent) const;
  [[nodiscard]] bool HasState() const { return options_.num_device_state_slots > 0; }

  // Leases: naive_cache.cc.
  void AddLoadedPages(const SequenceView& path, std::size_t first_page);
  void StartLoadBack(int number, const SequenceView& path, std::size_t first_page,
                     bool loads_snapshot);
  void UnpinResumed(NaiveLease& lease);
  void NoteForWriteThrough(const SequenceKey& path);
  [[nodiscard]] bool AttachReserved(NaiveLease& lease);
  void DestroyIfAbandoned(NamespaceId id);

  // Transfers: naive_cache_transfers.cc.
  [[nodiscard]] bool IsBlocked(const SequenceView& path) const;
  WriteBackTry TryWriteBack(const SequenceKey& path, bool spares_victims = false);
  void WriteBackNotes();
  void WriteBackAhead();
  [[nodiscard]] std::int64_t NumPagesInRun(const SequenceKey& leaf) const;
  [[nodiscard]] std::int64_t NumPagesBeingWrittenBack() const;
  void EndFailedLoadBack(std::int64_t number, const NaiveTransfer& failed);
  void TransferEnded(NamespaceId id);

  // What goes: naive_cache_eviction.cc.
  [[nodiscard]] ResidentMap& Residents(Component component, Tier tier) {
    return residents_[IndexOf(component)][IndexOf(tier)];
  }
  [[nodiscard]] const ResidentMap& Residents(Component component, Tier tier) const {
    return residents_[IndexOf(component)][IndexOf(tier)];
  }
  [[nodiscard]] bool IsPageProtected(Tier tier, const SequenceKey& page) const;
  [[nodiscard]] bool IsSnapshotProtected(Tier tier, const SequenceKey& boundary) const;
  [[nodiscard]] bool IsEvictable(Component component, Tier tier, ResidentMap::const_iterator) const;
  [[nodiscard]] std::map<NamespaceId, bool> FindNamespacesOverQuota(Tier tier) const;
  [[nodiscard]] EvictionRank RankOf(Component component, Tier tier, bool is_over_quota,
                                    const ResidentMap::value_type& resident) const;
  [[nodiscard]] std::int64_t NumFree(Component component, Tier tier) const;
  [[nodiscard]] std::int64_t NumRoom(Component component, Tier tier) const;
  void MakeRoom(Component component, Tier tier, std::int64_t num_wanted);
  /// `spares_victims`: nothing goes when it would be the copy of a page that the device could
  /// evict.
  bool EvictOne(Component component, Tier tier, bool spares_victims = false);
  void DropPage(Tier tier, const SequenceKey& page);
  void DropUnprotected(NamespaceId id);
  void Touch(Tier tier, const SequenceView& path);
  void NoteEvent(KVEventKind kind, Tier tier, const SequenceView& page);

  const KVPrefixCacheOptions options_;
  const std::size_t page_size_;
  OperationCoverage& coverage_;
  std::int64_t clock_ = 0;
  std::int64_t next_transfer_ = 0;
  std::array<std::int64_t, kNumTiers> num_evicted_pages_{};
  bool is_events_enabled_ = false;
  std::map<NamespaceId, NaiveNamespace> namespaces_;
  std::array<std::array<ResidentMap, kNumTiers>, kNumComponents> residents_;
  std::map<int, NaiveLease> leases_;
  std::map<std::int64_t, NaiveTransfer> transfers_;  // by number, from 0
  std::vector<SequenceKey> notes_;                   // kWriteThrough: published paths, oldest first
  std::vector<NaiveEvent> events_;
};

}  // namespace lora_serve
