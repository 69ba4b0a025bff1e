#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kv_prefix_cache/event_log.h"
#include "kv_prefix_cache/eviction_policy.h"
#include "kv_prefix_cache/kv_prefix_cache.h"
#include "kv_prefix_cache/matcher.h"
#include "kv_prefix_cache/namespace.h"
#include "kv_prefix_cache/page_pool.h"
#include "kv_prefix_cache/radix_tree.h"
#include "kv_prefix_cache/transfer.h"

namespace lora_serve {

/// Brings structure, policy and placement together; the only class that knows all three.
///
/// Every change of what a tier holds of a node goes through GainPages, ArrivePages, DropTail,
/// GainSnapshot, ArriveSnapshot and DropSnapshot (cache_residency.cc): they keep lists, counts,
/// versions and events right. The other files say when.
class KVPrefixCache::Impl {
 public:
  explicit Impl(const KVPrefixCacheOptions& options);
  /// Fatal when a lease or a handle is still alive.
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  // kv_prefix_cache_impl.cc: namespaces
  [[nodiscard]] Namespace& AddNamespace(const NamespaceOptions& options);
  /// Null when `id` is unknown.
  [[nodiscard]] Namespace* FindNamespace(NamespaceId id) const;
  /// Throws: NotFoundError when `id` is unknown; `action` says what was tried.
  [[nodiscard]] Namespace& GetNamespace(NamespaceId id, const char* action) const;
  void Drain(Namespace& ns);
  void SetAdapterResident(Namespace& ns, bool is_resident);
  void SetQuota(Namespace& ns, Tier tier, std::optional<std::int64_t> num_pages);
  void ReleaseHandle(Namespace& ns) noexcept;
  void SetEventsEnabled(bool is_enabled);
  [[nodiscard]] std::vector<KVEvent> TakeEvents() { return events_.Take(); }

  // cache_leases.cc: requests
  [[nodiscard]] ProbeResult Probe(const Namespace& ns, std::span<const TokenId> tokens,
                                  MatchIntent intent) const;
  void RefreshHint(PrefixHint& hint) const;
  [[nodiscard]] AcquireResult Acquire(Namespace& ns, std::span<const TokenId> tokens,
                                      const AcquireOptions& options);
  [[nodiscard]] bool Extend(Lease& lease, std::int32_t num_capacity_tokens);
  void Publish(Lease& lease, std::span<const TokenId> tokens);
  void ReleaseLease(Lease& lease) noexcept;

  // cache_state.cc: recurrent state
  [[nodiscard]] std::optional<StateSlot> ReserveSnapshot(Lease& lease, std::int32_t num_tokens);

  // cache_write_policy.cc, cache_transfers.cc: copies between the tiers
  void PlanWriteBacks();
  bool StartWriteBack(const Lease& lease);
  [[nodiscard]] std::vector<TransferOrder> TakeTransferOrders();
  void CompleteTransfer(TransferId id);
  void FailTransfer(TransferId id);

  // cache_residency.cc: room
  std::int64_t Evict(Tier tier, std::int64_t num_pages) noexcept;
  [[nodiscard]] std::int64_t NumAvailablePages() const;

  // cache_invariants.cc, cache_dump.cc
  [[nodiscard]] const KVPrefixCacheOptions& options() const { return options_; }
  [[nodiscard]] CacheStats Stats() const;
  [[nodiscard]] std::vector<NamespaceStats> NamespaceStatsList() const;
  void CheckInvariants() const;
  [[nodiscard]] std::string Dump() const;

 private:
  /// What a match found that a request may resume from.
  struct ResumePoint {
    MatchedPath path;
    /// The boundary, in pages.
    std::int32_t num_pages = 0;
    /// Of these, leading ones on the device already.
    std::int32_t num_device_pages = 0;
    /// Holds the snapshot to resume from; null for models without recurrent state, and at 0 pages.
    Node* snapshot_node = nullptr;
    bool is_in_flight = false;

    /// The snapshot must be brought from the host.
    [[nodiscard]] bool NeedsSnapshotCopy() const {
      return snapshot_node != nullptr && snapshot_node->Snapshot(Tier::kDevice).pages.IsEmpty();
    }
    [[nodiscard]] bool NeedsLoadBack() const {
      return num_pages > num_device_pages || NeedsSnapshotCopy();
    }
  };
  enum class WriteBackStart : std::uint8_t { kStarted, kNothingToCopy, kBlocked, kNoRoom };
  /// What a copy to the host may take the place of: whatever goes first there, or that only as long
  /// as it is not the copy of what the device could evict.
  enum class HostRoom : std::uint8_t { kAny, kNotOfVictims };
  using NodePath = std::vector<Node*>;  // from the root downwards

  [[nodiscard]] bool HasHostTier() const { return options_.num_host_pages > 0; }
  [[nodiscard]] bool HasState() const { return options_.num_device_state_slots > 0; }
  [[nodiscard]] std::size_t NumTokens(std::int32_t num_pages) const;
  [[nodiscard]] PagePool& Pool(Component component, Tier tier) {
    return *pools_[IndexOf(component)][IndexOf(tier)];
  }
  /// Null when the configuration has none.
  [[nodiscard]] const PagePool* FindPool(Component component, Tier tier) const {
    return pools_[IndexOf(component)][IndexOf(tier)].get();
  }
  [[nodiscard]] EvictionPolicy& PagePolicy(Tier tier) {
    return policies_.Of(Component::kFullAttention, tier);
  }
  [[nodiscard]] const EvictionPolicy& PagePolicy(Tier tier) const {
    return policies_.Of(Component::kFullAttention, tier);
  }
  [[nodiscard]] EvictionPolicy& SnapshotPolicy(Tier tier) {
    return policies_.Of(Component::kState, tier);
  }
  [[nodiscard]] const EvictionPolicy& SnapshotPolicy(Tier tier) const {
    return policies_.Of(Component::kState, tier);
  }

  // --- kv_prefix_cache_impl.cc
  /// Removes everything that no pin protects. Complexity: proportional to what is removed.
  void DropUnpinned(Namespace& ns) noexcept;
  /// After something has let go of a namespace.
  void ContinueDrain(Namespace& ns) noexcept;
  /// One event for what each tier has of each node, in an order that depends on no address.
  void LogWholeNamespace(Namespace& ns, KVEventKind kind);

  // --- cache_leases.cc
  [[nodiscard]] ResumePoint FindResumePoint(const Namespace& ns, std::span<const TokenId> tokens,
                                            MatchIntent intent) const;
  /// Are there pages and slots for it, with what it resumes from kept? Changes nothing.
  [[nodiscard]] bool HasRoomFor(const ResumePoint& point, std::int32_t num_new_pages) const;
  void AddPrivatePages(Lease& lease, OwnedPages pages);
  /// The node on the path to `node` that ends after `num_pages` pages; cuts an edge if it must.
  [[nodiscard]] Node& NodeEndingAt(Node& node, std::int32_t num_pages);
  /// The nodes below `from` down to `to`.
  [[nodiscard]] static NodePath PathBetween(const Node& from, Node& to);
  void MovePin(Lease& lease, Node& node) noexcept;
  void PublishPages(Lease& lease, std::span<const TokenId> tokens);
  /// Hands the lease's next private pages to the tree's nodes on the way to `end`, which the host
  /// has already.
  void AdoptPages(Lease& lease, Node& end);
  /// Hands the lease's next private pages to the tree as new nodes, below its pinned node.
  void InsertBelowPin(Lease& lease, std::span<const TokenId> tokens);
  [[nodiscard]] static bool CanGrowInPlace(const Node& node);
  void CountPrivatePages(Namespace& ns, std::int64_t delta) noexcept;

  // --- cache_residency.cc
  /// Adds pages behind those that the tier holds of `node`.
  /// Requires: room on the edge; the parent is full in the tier.
  void GainPages(Node& node, Tier tier, OwnedPages pages, bool in_flight);
  /// The pages in flight to the node have come.
  void ArrivePages(Node& node, Tier tier);
  /// Frees the last `num_pages` pages that the tier holds of `node`, present or in flight. An edge
  /// that no tier holds to its end becomes shorter, loses the snapshot there, and disappears when
  /// nothing is left. Requires: no pin of the tier, and no child with pages there.
  void DropTail(Node& node, Tier tier, std::int32_t num_pages) noexcept;
  void ShrinkEdge(Node& node) noexcept;
  void GainSnapshot(Node& node, Tier tier, OwnedPages slot, bool in_flight);
  void ArriveSnapshot(Node& node, Tier tier);
  void DropSnapshot(Node& node, Tier tier) noexcept;
  /// `node` was used in `epoch` on this tier.
  void Touch(Node& node, Component component, Tier tier, Epoch epoch) noexcept;
  /// The pages of the tier on the path to `end` were used in `epoch`: only the deepest is marked,
  /// because a parent takes over the age of what is removed below it.
  void TouchPath(Node& end, Tier tier, Epoch epoch) noexcept;
  [[nodiscard]] Epoch Tick() noexcept { return ++clock_; }
  void CountTreePages(Namespace& ns, Tier tier, std::int64_t delta) noexcept;
  void EvictTail(Node& leaf, Tier tier, std::int32_t num_pages) noexcept;
  void EvictSnapshots(Tier tier, std::int64_t num_snapshots) noexcept;
  /// Could so many pages be allocated after a pin at `kept`? Changes nothing.
  [[nodiscard]] bool CanAllocate(std::int32_t num_pages, const PathPosition& kept) const;
  /// Evicts what is missing and allocates. Requires: there is room.
  [[nodiscard]] OwnedPages Allocate(Component component, Tier tier, std::int32_t num_pages);

  // --- cache_state.cc
  /// Slots that could be had while the snapshot of `kept` (may be null) stays.
  [[nodiscard]] std::int64_t NumAvailableSlots(Tier tier, const Node* kept) const;
  void PinResumedSnapshot(Lease& lease, Node& node);
  /// `is_used`: the lease has read it; false when it could not be had.
  void ReleaseResumedSnapshot(Lease& lease, bool is_used) noexcept;
  /// Returns true when the tree got a snapshot.
  bool AttachReservedSnapshot(Lease& lease);
  void DropOldestAttached(Lease& lease) noexcept;

  // --- cache_write_policy.cc
  void NoteForWriteThrough(Node& node);
  void ForgetNote(Node& node) noexcept;
  void WriteThroughNotes();
  void WriteBackAhead();
  /// Device pages from the leaf upwards up to the next protected page or fork.
  [[nodiscard]] std::int64_t CountRunPages(const Node& leaf) const;

  // --- cache_transfers.cc
  /// Writes back the path to the end of `end`, as far as there is room.
  WriteBackStart TryWriteBack(Node& end, HostRoom host_room = HostRoom::kAny);
  /// Makes up to `num_pages` host pages free, none of them from the path to `covered_end`; returns
  /// how many of the wanted ones can be had.
  [[nodiscard]] std::int32_t MakeHostRoom(Node& covered_end, std::int32_t num_pages,
                                          HostRoom host_room);
  /// Evicts from the host in its order, up to the first page that the device could evict, too.
  void EvictHostPagesNotOfVictims(std::int64_t num_pages) noexcept;
  /// How many of the last host pages of a listed leaf the device lacks, or protects.
  [[nodiscard]] std::int32_t NumPagesNotOfVictim(const Node& leaf) const;
  /// The same for host slots and the snapshots on the path to `end`.
  [[nodiscard]] std::int32_t MakeHostSlots(Node& end, std::size_t num_slots);
  [[nodiscard]] NodePath SnapshotsToWriteBack(Node& end, std::int32_t end_page) const;
  void StartLoadBack(Lease& lease, Node& end, std::int32_t begin_page, bool copies_snapshot);
  /// Pins both ends and orders the copy of pages [begin_page, end of `end`).
  Transfer& AddTransfer(TransferKind kind, Node& end, std::int32_t begin_page, NodePath snapshots);
  void AddOrder(const Transfer& transfer);
  /// Throws: NotFoundError when `id` is not under way.
  [[nodiscard]] Transfer TakeTransfer(TransferId id);
  /// Does the transfer pin the end of its pages on this tier?
  [[nodiscard]] static bool PinsPages(const Transfer& transfer, Tier tier);
  void UnpinTransfer(const Transfer& transfer) noexcept;
  /// Takes from the lease what the failed load-back should have brought, and all behind it.
  void CutBackLease(Lease& lease, const Transfer& transfer) noexcept;
  /// Drops the host pages of `top` and of all that continue them.
  void DropHostSubtree(Node& top) noexcept;

  void CheckNamespace(const Namespace& ns) const;
  void CheckNode(const Node& node) const;
  void CheckResidency(const Node& node, Component component, Tier tier) const;
  void CheckPages() const;
  void CheckPins() const;
  void CheckTransfers() const;

  const KVPrefixCacheOptions options_;
  const Matchers matchers_;
  /// [component][tier]; null where there is no such room. Outlive everything that owns pages.
  std::array<std::array<std::unique_ptr<PagePool>, kNumTiers>, kNumComponents> pools_;
  EvictionPolicies policies_;
  EventLog events_;
  NodeSequencer sequencer_;
  Epoch clock_ = 0;
  std::int64_t next_namespace_id_ = kBaseNamespace.value();
  std::int64_t next_transfer_id_ = 0;
  std::int64_t next_note_ = 1;
  std::array<std::int64_t, kNumTiers> num_tree_pages_{};
  std::int64_t num_private_pages_ = 0;
  std::array<std::int64_t, kNumTiers> num_evicted_pages_{};
  std::int64_t num_pages_being_written_back_ = 0;
  std::map<NamespaceId, std::unique_ptr<Namespace>> namespaces_;
  std::map<TransferId, Transfer> transfers_;
  std::vector<TransferOrder> orders_;
  /// Ends of paths that wait to be written through, oldest note first.
  std::map<std::int64_t, Node*> notes_;
};

}  // namespace lora_serve
