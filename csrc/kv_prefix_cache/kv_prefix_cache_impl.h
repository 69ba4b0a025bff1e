#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kv_prefix_cache/eviction_policy.h"
#include "kv_prefix_cache/kv_prefix_cache.h"
#include "kv_prefix_cache/namespace.h"
#include "kv_prefix_cache/page_pool.h"
#include "kv_prefix_cache/radix_tree.h"

namespace lora_serve {

/// Brings structure, policy and placement together; the only class that knows all three.
///
/// Every change of who owns a page goes through one of four functions: AllocateFor (pool to lease),
/// Publish (lease to tree), DropTail (tree to pool) and ReleaseLease (lease to pool). Page counts
/// change only there.
class KVPrefixCache::Impl {
 public:
  explicit Impl(const KVPrefixCacheOptions& options);
  /// Fatal when a lease or a handle is still alive.
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  [[nodiscard]] Namespace& AddNamespace(const NamespaceOptions& options);
  /// Null when `id` is unknown.
  [[nodiscard]] Namespace* FindNamespace(NamespaceId id) const;
  /// Throws: NotFoundError when `id` is unknown; `action` says what was tried.
  [[nodiscard]] Namespace& GetNamespace(NamespaceId id, const char* action) const;
  void Drain(Namespace& ns);

  [[nodiscard]] PrefixMatch Match(const Namespace& ns, std::span<const TokenId> tokens) const;
  [[nodiscard]] std::optional<Lease> Acquire(Namespace& ns, std::span<const TokenId> tokens,
                                             const AcquireOptions& options);
  [[nodiscard]] bool Extend(Lease& lease, std::int32_t num_capacity_tokens);
  void Publish(Lease& lease, std::span<const TokenId> tokens);
  std::int64_t Evict(std::int64_t num_pages) noexcept;

  void ReleaseLease(Lease& lease) noexcept;
  void ReleaseHandle(Namespace& ns) noexcept;

  [[nodiscard]] const KVPrefixCacheOptions& options() const { return options_; }
  [[nodiscard]] std::int64_t NumAvailablePages() const;
  [[nodiscard]] CacheStats Stats() const;
  [[nodiscard]] std::vector<NamespaceStats> NamespaceStatsList() const;
  void CheckInvariants() const;

 private:
  [[nodiscard]] std::int32_t NumPagesFor(std::int32_t num_tokens) const;
  [[nodiscard]] std::size_t NumTokens(std::int32_t num_pages) const;

  /// Could `num_pages` be allocated after a pin at `match`? Changes nothing.
  [[nodiscard]] bool CanAllocate(std::int32_t num_pages, const PrefixMatch& match) const;
  /// Adds private pages to the lease. Requires: CanAllocate.
  void AllocateFor(Lease& lease, std::int32_t num_pages);

  /// The node whose edge ends exactly where `match` ends: cuts an edge if it must.
  [[nodiscard]] Node& EndNode(Namespace& ns, const PrefixMatch& match);
  /// Hands the lease's next `num_pages` private pages to the tree, below its pinned node.
  void InsertBelowPin(Lease& lease, std::span<const TokenId> tokens);
  void MovePin(Lease& lease, Node& node) noexcept;
  /// Frees the last `num_pages` pages of a listed leaf; a leaf without pages is removed, and its
  /// parent refreshed. The only way for a page to leave the tree.
  void DropTail(Node& leaf, std::int32_t num_pages) noexcept;
  /// Removes everything that no lease protects. Complexity: proportional to what is removed.
  void DropUnpinned(Namespace& ns) noexcept;
  void DestroyIfAbandoned(Namespace& ns) noexcept;

  void CheckNamespace(const Namespace& ns, std::vector<std::uint8_t>& is_in_tree) const;
  void CheckPages(const std::vector<std::uint8_t>& is_in_tree) const;
  void CheckPins() const;

  const KVPrefixCacheOptions options_;
  PagePool device_pool_;  // outlives everything that owns pages
  EvictionPolicy device_policy_{Tier::kDevice};
  NodeSequencer sequencer_;
  Epoch clock_ = 0;
  std::int64_t next_namespace_id_ = kBaseNamespace.value();
  std::int64_t num_tree_pages_ = 0;
  std::int64_t num_private_pages_ = 0;
  std::int64_t num_evicted_pages_ = 0;
  std::map<NamespaceId, std::unique_ptr<Namespace>> namespaces_;
};

}  // namespace lora_serve
