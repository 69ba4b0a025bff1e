#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/lease.h"
#include "kv_prefix_cache/namespace_handle.h"

namespace lora_serve {

struct KVPrefixCacheOptions {
  /// Tokens in one page, at least 1.
  std::int32_t page_size = 16;
  /// Pages of the device tier, at least 1.
  std::int32_t num_device_pages = 0;
};

struct NamespaceOptions {
  /// Seeds the hash chain of KV events: derived from the adapter's name and content digest.
  std::uint64_t digest_seed = 0;
};

/// What a request could resume from, if it were admitted now. Whole pages only.
struct ProbeResult {
  /// Tokens at the start of the sequence whose pages are on the device.
  std::int32_t num_device_tokens = 0;
};

struct AcquireOptions {
  /// At most this many tokens are taken from the cache (rounded down to whole pages). A fully
  /// cached prompt still recomputes its last token, so the scheduler passes at most num_tokens - 1.
  std::int32_t max_cached_tokens = 0;
  /// The lease must have room for this many tokens, cached ones included. May be less than the
  /// sequence: a chunked prefill asks for its first chunk.
  std::int32_t num_capacity_tokens = 0;
};

struct NamespaceStats {
  NamespaceId id;
  bool is_draining = false;
  std::int64_t num_handles = 0;
  std::int64_t num_leases = 0;
  /// Pages that the tree owns, leased ones included.
  std::int64_t num_tree_pages = 0;
  /// Pages that leases own: tails not published yet, and duplicates of pages the tree already had.
  std::int64_t num_private_pages = 0;
};

struct CacheStats {
  std::int64_t num_device_pages = 0;
  std::int64_t num_free_pages = 0;
  std::int64_t num_tree_pages = 0;
  std::int64_t num_private_pages = 0;
  std::int64_t num_evicted_pages = 0;
  std::int64_t num_nodes = 0;
};

/// The radix-tree KV prefix cache: a tree per namespace, a page pool per tier, leases for requests.
///
/// Owns: the forest, the pages, the namespaces. Does not know: requests, adapters, tensors, time.
/// Only this façade brings structure (RadixTree), policy (EvictionPolicy) and placement (PagePool)
/// into one place.
///
/// Life of a page: free in the pool -> private to a lease (Acquire/Extend) -> owned by the tree
/// (Publish) -> free again (evict or drain). At any moment tree + private + free =
/// num_device_pages.
///
/// Single-threaded by contract, deterministic: two caches fed the same calls make the same
/// decisions. Leases and handles must be gone before the cache is.
class KVPrefixCache {
 public:
  /// Throws: InvalidArgumentError when an option is out of range.
  explicit KVPrefixCache(const KVPrefixCacheOptions& options);
  ~KVPrefixCache();
  KVPrefixCache(const KVPrefixCache&) = delete;
  KVPrefixCache& operator=(const KVPrefixCache&) = delete;

  // --- Namespaces ------------------------------------------------------------------------------

  /// Opens a live namespace with a virtual root of its own. Ids are never reused.
  [[nodiscard]] NamespaceId OpenNamespace(const NamespaceOptions& options);

  /// Keeps the namespace alive for one request, from its arrival to its end.
  /// Throws: NotFoundError when `id` is unknown or draining.
  [[nodiscard]] NamespaceHandle RetainNamespace(NamespaceId id);

  /// Closes `id` to new handles and frees every unleased page now, the rest as leases end. The
  /// namespace destroys itself when its last handle and lease are gone (at once when there are
  /// none). Draining a draining namespace changes nothing. Throws: NotFoundError (unknown),
  /// InvalidArgumentError (the base namespace is permanent). Complexity: proportional to the
  /// namespace, never to the forest.
  void DrainNamespace(NamespaceId id);

  /// False once a drained namespace has destroyed itself.
  [[nodiscard]] bool HasNamespace(NamespaceId id) const;

  // --- Lookup, in two steps --------------------------------------------------------------------

  /// How many leading tokens are cached. Changes nothing: no split, no touch.
  /// Throws: NotFoundError when `id` is unknown.
  [[nodiscard]] ProbeResult Probe(NamespaceId id, std::span<const TokenId> tokens) const;

  /// Pins the longest cached prefix allowed by `options` and adds private pages up to the capacity
  /// asked for, evicting unpinned leaves if it must. Returns nothing, and leaves no trace, when
  /// there is no room. Requires: 0 <= max_cached_tokens <= tokens.size(), 0 <= num_capacity_tokens.
  [[nodiscard]] std::optional<Lease> Acquire(const NamespaceHandle& handle,
                                             std::span<const TokenId> tokens,
                                             const AcquireOptions& options);

  /// Gives the lease room for `num_capacity_tokens` tokens in total. Returns false, and changes
  /// nothing, when there is no room even after eviction.
  [[nodiscard]] bool Extend(Lease& lease, std::int32_t num_capacity_tokens);

  /// Hands the lease's full, computed pages to the tree. `tokens` is the sequence from its first
  /// token (prompt, then output), of which the KV of all is computed; only whole pages not
  /// published before are looked at. Where the tree already has a page, the tree keeps its own and
  /// the lease keeps the duplicate until it ends: pages already handed to a request never change
  /// under it. In a draining namespace nothing is published.
  /// Complexity: O(newly published tokens).
  void Publish(Lease& lease, std::span<const TokenId> tokens);

  // --- Accounting ------------------------------------------------------------------------------

  /// Free pages plus those that eviction could free now.
  [[nodiscard]] std::int64_t NumAvailablePages() const;
  [[nodiscard]] std::int32_t page_size() const;
  [[nodiscard]] CacheStats Stats() const;
  /// Ordered by id.
  [[nodiscard]] std::vector<NamespaceStats> NamespaceStatsList() const;

  /// Evicts up to `num_pages` pages of unpinned leaves, oldest first; returns how many were freed.
  std::int64_t Evict(std::int64_t num_pages);

  /// Throws: InternalError naming the broken invariant (numbered in this folder's README).
  void CheckInvariants() const;

 private:
  friend class Lease;
  friend class Namespace;
  friend class NamespaceHandle;
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lora_serve
