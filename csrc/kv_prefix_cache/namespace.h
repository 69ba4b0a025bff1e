#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "common/strong_id.h"
#include "kv_prefix_cache/kv_prefix_cache.h"
#include "kv_prefix_cache/leaf_list.h"
#include "kv_prefix_cache/radix_tree.h"
#include "kv_prefix_cache/tier.h"

namespace lora_serve {

enum class NamespaceState : std::uint8_t {
  kLive,      // takes new handles
  kDraining,  // no new handles, nothing is published; gone with its last handle, lease and transfer
};

/// What a namespace counts of its own tree and leases; written where pages change hands.
struct NamespaceCounts {
  /// Pages that the tree owns, by tier; those in flight included.
  std::array<std::int64_t, kNumTiers> tree_pages{};
  std::array<std::int64_t, kNumTiers> snapshots{};
  std::array<std::int64_t, kNumTiers> evicted_pages{};
  std::int64_t private_pages = 0;
  std::int64_t hit_tokens = 0;
  std::int64_t missed_tokens = 0;
};

/// One cache domain: a tree of its own below a virtual root of its own, the lists of its evictable
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
  [[nodiscard]] LeafList& leaf_list(Component component, Tier tier, bool is_backed) {
    return leaf_lists_[IndexOf(component)][IndexOf(tier)][is_backed ? 1 : 0];
  }
  [[nodiscard]] const LeafList& leaf_list(Component component, Tier tier, bool is_backed) const {
    return leaf_lists_[IndexOf(component)][IndexOf(tier)][is_backed ? 1 : 0];
  }

  [[nodiscard]] bool IsDraining() const { return state_ == NamespaceState::kDraining; }
  /// Live -> Draining. There is no way back.
  void StartDraining();

  void AddHandle() noexcept { ++num_handles_; }
  void AddLease() noexcept { ++num_leases_; }
  void AddTransfer() noexcept { ++num_transfers_; }
  /// Fatal when there is none.
  void RemoveHandle() noexcept;
  void RemoveLease() noexcept;
  void RemoveTransfer() noexcept;
  /// Draining, and nothing keeps it alive any more.
  [[nodiscard]] bool IsAbandoned() const {
    return IsDraining() && num_handles_ == 0 && num_leases_ == 0 && num_transfers_ == 0;
  }

  [[nodiscard]] NamespaceCounts& counts() { return counts_; }
  [[nodiscard]] const NamespaceCounts& counts() const { return counts_; }

  // What ranks its pages among those of others. Whoever changes it, or a page count, re-ranks the
  // leaf lists (EvictionPolicy::RerankNamespace).
  [[nodiscard]] bool is_adapter_resident() const { return is_adapter_resident_; }
  void set_is_adapter_resident(bool is_resident) { is_adapter_resident_ = is_resident; }
  void set_quota(Tier tier, std::optional<std::int64_t> num_pages) {
    quota_pages_[IndexOf(tier)] = num_pages;
  }
  /// Pages of the tier beyond the quota; 0 when it is kept, or when there is none.
  [[nodiscard]] std::int64_t NumPagesOverQuota(Tier tier) const;

  /// Changes whenever the answer of a probe may have changed. Never 0.
  [[nodiscard]] std::uint64_t version() const { return version_; }
  void ContentChanged() noexcept { ++version_; }

  [[nodiscard]] NamespaceStats Stats() const;

 private:
  const NamespaceId id_;
  const std::uint64_t digest_seed_;
  KVPrefixCache::Impl* const cache_backptr_;
  NamespaceState state_ = NamespaceState::kLive;
  bool is_adapter_resident_ = true;
  std::array<std::optional<std::int64_t>, kNumTiers> quota_pages_;
  std::uint64_t version_ = 1;
  std::int64_t num_handles_ = 0;
  std::int64_t num_leases_ = 0;
  std::int64_t num_transfers_ = 0;
  NamespaceCounts counts_;
  /// [component][tier][backed]; outlive the tree, whose nodes they list.
  std::array<std::array<std::array<LeafList, 2>, kNumTiers>, kNumComponents> leaf_lists_;
  RadixTree tree_;
};

}  // namespace lora_serve
