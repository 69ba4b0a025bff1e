#pragma once

#include <array>
#include <cstdint>

#include "common/strong_id.h"
#include "kv_prefix_cache/kv_prefix_cache.h"
#include "kv_prefix_cache/leaf_list.h"
#include "kv_prefix_cache/radix_tree.h"
#include "kv_prefix_cache/tier.h"

namespace lora_serve {

enum class NamespaceState : std::uint8_t {
  kLive,      // takes new handles
  kDraining,  // no new handles, nothing is published; gone with its last handle and lease
};

/// One cache domain: a tree of its own below a virtual root of its own, the list of its evictable
/// leaves, its counts.
///
/// Owns: the tree, the leaf lists. Does not know: when it may be destroyed (the cache asks
/// IsAbandoned), or what others do. The base namespace has id 0 and is always live.
class Namespace {
 public:
  /// `cache` is only handed back to leases and handles that end; null in unit tests of parts.
  Namespace(NamespaceId id, const NamespaceOptions& options, std::int32_t page_size,
            NodeSequencer* sequencer, KVPrefixCache::Impl* cache);
  ~Namespace();
  Namespace(const Namespace&) = delete;
  Namespace& operator=(const Namespace&) = delete;

  [[nodiscard]] NamespaceId id() const { return id_; }
  [[nodiscard]] std::uint64_t digest_seed() const { return digest_seed_; }
  [[nodiscard]] KVPrefixCache::Impl* cache_backptr() const { return cache_backptr_; }
  [[nodiscard]] RadixTree& tree() { return tree_; }
  [[nodiscard]] const RadixTree& tree() const { return tree_; }
  [[nodiscard]] LeafList& leaf_list(Tier tier) { return leaf_lists_[IndexOf(tier)]; }
  [[nodiscard]] const LeafList& leaf_list(Tier tier) const { return leaf_lists_[IndexOf(tier)]; }

  [[nodiscard]] bool IsDraining() const { return state_ == NamespaceState::kDraining; }
  /// Live -> Draining. There is no way back.
  void StartDraining();

  void AddHandle() noexcept { ++num_handles_; }
  void AddLease() noexcept { ++num_leases_; }
  /// Fatal when there is none.
  void RemoveHandle() noexcept;
  void RemoveLease() noexcept;
  /// Draining, and nothing keeps it alive any more.
  [[nodiscard]] bool IsAbandoned() const {
    return IsDraining() && num_handles_ == 0 && num_leases_ == 0;
  }

  /// `delta` may be negative.
  void AddTreePages(std::int64_t delta) noexcept { num_tree_pages_ += delta; }
  void AddPrivatePages(std::int64_t delta) noexcept { num_private_pages_ += delta; }

  [[nodiscard]] NamespaceStats Stats() const;

 private:
  const NamespaceId id_;
  const std::uint64_t digest_seed_;
  KVPrefixCache::Impl* const cache_backptr_;
  NamespaceState state_ = NamespaceState::kLive;
  std::int64_t num_handles_ = 0;
  std::int64_t num_leases_ = 0;
  std::int64_t num_tree_pages_ = 0;
  std::int64_t num_private_pages_ = 0;
  std::array<LeafList, kNumTiers> leaf_lists_;  // outlive the tree, whose nodes they list
  RadixTree tree_;
};

}  // namespace lora_serve
