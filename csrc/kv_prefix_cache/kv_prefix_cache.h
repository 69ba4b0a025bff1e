#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "kv_prefix_cache/lease.h"
#include "kv_prefix_cache/namespace_handle.h"

namespace lora_serve {

struct AcquireResult {
  AcquireOutcome outcome = AcquireOutcome::kNoRoom;
  /// Valid iff the outcome is kAcquired.
  Lease lease;
};

/// The radix-tree KV prefix cache: a tree per namespace, a page pool per tier, leases for requests.
///
/// Owns: the forest, the pages, the state slots, the namespaces. Does not know: requests, adapters,
/// tensors, time. Only this façade brings structure (RadixTree), policy (EvictionPolicy, matchers)
/// and placement (PagePool) into one place.
///
/// Life of a device page: free in the pool -> private to a lease (Acquire/Extend) -> owned by the
/// tree (Publish, or a load-back) -> free again (evict or drain). At any moment tree + private +
/// free = num_device_pages. Host pages are free or owned by the tree.
///
/// Single-threaded by contract, deterministic: two caches fed the same calls make the same
/// decisions. Leases and handles must be gone before the cache is; transfers may be under way.
class KVPrefixCache {
 public:
  /// Throws: InvalidArgumentError when an option is out of range.
  explicit KVPrefixCache(const KVPrefixCacheOptions& options);
  ~KVPrefixCache();
  KVPrefixCache(const KVPrefixCache&) = delete;
  KVPrefixCache& operator=(const KVPrefixCache&) = delete;

  // --- Namespaces ------------------------------------------------------------------------------

  /// Opens a live namespace with a virtual root of its own. Ids are never reused.
  /// Throws: InvalidArgumentError when a quota is negative.
  [[nodiscard]] NamespaceId OpenNamespace(const NamespaceOptions& options);

  /// Keeps the namespace alive for one request, from its arrival to its end.
  /// Throws: NotFoundError when `id` is unknown or draining.
  [[nodiscard]] NamespaceHandle RetainNamespace(NamespaceId id);

  /// Closes `id` to new handles and frees every unleased page of every tier now, the rest as leases
  /// and transfers end. The namespace destroys itself when its last handle, lease and transfer are
  /// gone (at once when there are none). Draining a draining namespace changes nothing.
  /// Throws: NotFoundError (unknown), InvalidArgumentError (the base namespace is permanent).
  /// Complexity: proportional to the namespace, never to the forest.
  void DrainNamespace(NamespaceId id);

  /// False once a drained namespace has destroyed itself.
  [[nodiscard]] bool HasNamespace(NamespaceId id) const;

  /// Says whether the namespace's adapter is on the device (true until said otherwise). Pages of a
  /// namespace whose adapter is not go before equally old ones of others.
  /// Throws: NotFoundError. Complexity: O(log namespaces), whatever the namespace holds.
  void SetAdapterResident(NamespaceId id, bool is_resident);

  /// Replaces the namespace's soft quota of one tier; nothing = no quota.
  /// Throws: NotFoundError, InvalidArgumentError (negative). Complexity: O(log namespaces).
  void SetQuota(NamespaceId id, Tier tier, std::optional<std::int64_t> num_pages);

  // --- Lookup, in two steps --------------------------------------------------------------------

  /// How many leading tokens are cached, and where. Changes nothing: no split, no touch, no root.
  /// Throws: NotFoundError when `id` is unknown.
  [[nodiscard]] ProbeResult Probe(NamespaceId id, std::span<const TokenId> tokens,
                                  MatchIntent intent) const;

  /// Brings hints up to date, probing only those whose namespace changed since (intent
  /// kPrefixReuse). A hint of a namespace that is gone gets 0 tokens.
  /// Complexity: O(1) for a hint that is still true.
  void RefreshHints(std::span<PrefixHint> hints) const;

  /// Pins the longest resumable prefix allowed by `options` and adds private pages up to the
  /// capacity asked for, evicting unpinned leaves if it must. Where the prefix goes on in the host
  /// tier, its pages get room on the device and a load-back starts: the lease IsLoading() until
  /// CompleteTransfer. Leaves no trace unless the outcome is kAcquired.
  /// Requires: 0 <= max_cached_tokens <= tokens.size(), 0 <= num_capacity_tokens.
  [[nodiscard]] AcquireResult Acquire(const NamespaceHandle& handle,
                                      std::span<const TokenId> tokens,
                                      const AcquireOptions& options);

  /// Gives the lease room for `num_capacity_tokens` tokens in total. Returns false, and changes
  /// nothing, when there is no room even after eviction.
  [[nodiscard]] bool Extend(Lease& lease, std::int32_t num_capacity_tokens);

  /// Hands the lease's full, computed pages to the tree. `tokens` is the sequence from its first
  /// token (prompt, then output), of which the KV of all is computed; only whole pages not
  /// published before are looked at. Where the tree already has a page on the device, the tree
  /// keeps its own and the lease keeps the duplicate until it ends: pages already handed to a
  /// request never change under it. Where the tree has a page on the host only, it takes the
  /// lease's. Publishing stops in front of pages that are on their way to the device, and goes on
  /// with the next call. In a draining namespace nothing is published. A reserved snapshot is
  /// attached once its boundary is published, unless the tree has one there on the device.
  /// Requires: the lease is not loading. Complexity: O(newly published tokens).
  void Publish(Lease& lease, std::span<const TokenId> tokens);

  // --- Recurrent state -------------------------------------------------------------------------

  /// A slot for a snapshot of the lease's state after `num_tokens` tokens (whole pages, not yet
  /// published, or just published by nobody but this lease). The caller copies state_slot() to it
  /// when exactly that many tokens are computed, before Publish gets them. Nothing when no slot is
  /// to be had, or one is reserved already.
  [[nodiscard]] std::optional<StateSlot> ReserveSnapshot(Lease& lease, std::int32_t num_tokens);

  // --- Transfers between the tiers -------------------------------------------------------------

  /// Starts the write-backs that the write policy wants now. To be called once a step.
  void PlanWriteBacks();

  /// Starts a write-back of what the lease has published and the host lacks, whatever the policy:
  /// for a request that is about to be preempted. False when there is nothing to copy, no room on
  /// the host, or a copy on this path is under way.
  bool StartWriteBack(const Lease& lease);

  /// The orders of all transfers started since the last call and not ended yet, by id. Each is
  /// given out once.
  [[nodiscard]] std::vector<TransferOrder> TakeTransferOrders();

  /// The copy is done: its pages count as present and can be matched.
  /// Throws: NotFoundError when `id` is not under way.
  void CompleteTransfer(TransferId id);

  /// The copy did not happen. A write-back leaves the host as it was. A load-back gives its device
  /// pages back, drops the unreadable host pages with all that continue them, and cuts its lease
  /// back to what was on the device before.
  /// Throws: NotFoundError when `id` is not under way.
  void FailTransfer(TransferId id);

  // --- Events ----------------------------------------------------------------------------------

  /// From now on changes are noted for TakeEvents, starting with one kStored for everything that is
  /// present. Switching off forgets what was not taken. Costs nothing while off.
  void SetEventsEnabled(bool is_enabled);
  /// The events since the last call, in order. Every page is stored once in a tier and removed
  /// once.
  [[nodiscard]] std::vector<KVEvent> TakeEvents();

  // --- Accounting ------------------------------------------------------------------------------

  /// Free device pages plus those that eviction could free now.
  [[nodiscard]] std::int64_t NumAvailablePages() const;
  [[nodiscard]] std::int32_t page_size() const;
  [[nodiscard]] CacheStats Stats() const;
  /// Ordered by id.
  [[nodiscard]] std::vector<NamespaceStats> NamespaceStatsList() const;

  /// Evicts up to `num_pages` pages of unpinned leaves of the tier, in the policy's order; returns
  /// how many were freed.
  std::int64_t Evict(Tier tier, std::int64_t num_pages);

  /// Throws: InternalError naming the broken invariant (numbered in this folder's README).
  void CheckInvariants() const;
  /// The whole state as text, equal for equal histories. For tests.
  [[nodiscard]] std::string Dump() const;

 private:
  friend class Lease;
  friend class Namespace;
  friend class NamespaceHandle;
  class Impl;
  /// Throws: InternalError when the lease is empty or of another cache.
  void CheckLease(const Lease& lease, const char* action) const;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lora_serve
