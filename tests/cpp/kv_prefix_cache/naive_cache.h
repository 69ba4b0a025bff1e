#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "common/strong_id.h"

namespace lora_serve {

/// The contract of KVPrefixCache on flat maps: no tree, no edges, no lists, every question answered
/// by a scan.
///
/// A page is known by (namespace, all tokens from the first to its last). It can be evicted when no
/// cached page and no lease's published prefix continues it; the least recently used such page
/// goes, one at a time. Using a prefix uses all its pages. That this gives the same pages in the
/// same order as leaf-LRU over compressed edges is what the random test shows.
class NaiveCache {
 public:
  using Tokens = std::vector<TokenId>;

  struct NaiveLease {
    NamespaceId ns;
    Tokens published;  // whole pages in the tree, as this lease's or as twins
    std::vector<PageId> pages;
    std::vector<bool> is_private;  // by logical page
  };

  NaiveCache(std::int32_t page_size, std::int32_t num_pages);

  void Open(NamespaceId id) { namespaces_[id] = {}; }
  void Retain(NamespaceId id) { ++namespaces_.at(id).num_handles; }
  void DropHandle(NamespaceId id);
  void Drain(NamespaceId id);
  [[nodiscard]] bool Has(NamespaceId id) const { return namespaces_.contains(id); }
  [[nodiscard]] bool IsDraining(NamespaceId id) const { return namespaces_.at(id).is_draining; }
  [[nodiscard]] std::vector<NamespaceId> NamespaceIds() const;

  /// Tokens of the longest cached prefix.
  [[nodiscard]] std::int32_t Probe(NamespaceId id, std::span<const TokenId> tokens) const;

  /// The pages that Acquire must take from the cache, or nothing when it must fail. On success
  /// everything that has to be evicted is gone, and the lease is added; GiveFreshPages completes
  /// it.
  std::optional<std::vector<PageId>> Acquire(int lease, NamespaceId id,
                                             std::span<const TokenId> tokens,
                                             std::int32_t max_cached_tokens,
                                             std::int32_t num_capacity_tokens);
  /// False when Extend must fail; else what has to be evicted is gone.
  bool Extend(int lease, std::int32_t num_capacity_tokens);
  /// The real cache chose these free pages. Returns an error when they were not free.
  [[nodiscard]] std::string GiveFreshPages(int lease, std::span<const PageId> all_pages);
  void Publish(int lease, std::span<const TokenId> tokens);
  void Release(int lease);
  std::int64_t Evict(std::int64_t num_pages);

  [[nodiscard]] const NaiveLease& LeaseOf(int lease) const { return leases_.at(lease); }
  [[nodiscard]] std::int64_t num_free_pages() const;
  [[nodiscard]] std::int64_t num_evicted_pages() const { return num_evicted_pages_; }
  [[nodiscard]] std::int64_t NumAvailablePages() const;
  [[nodiscard]] std::int64_t NumTreePages(NamespaceId id) const;
  [[nodiscard]] std::int64_t NumPrivatePages(NamespaceId id) const;
  [[nodiscard]] std::int64_t NumLeases(NamespaceId id) const;
  [[nodiscard]] std::int64_t NumHandles(NamespaceId id) const {
    return namespaces_.at(id).num_handles;
  }

 private:
  struct NaiveNamespace {
    bool is_draining = false;
    std::int64_t num_handles = 0;
  };
  struct Key {
    NamespaceId ns;
    Tokens prefix;
    friend auto operator<=>(const Key&, const Key&) = default;
  };
  struct Page {
    PageId id;
    std::int64_t last_use = 0;
  };

  [[nodiscard]] Tokens Prefix(std::span<const TokenId> tokens, std::size_t num_pages) const;
  [[nodiscard]] bool IsProtected(const Key& key) const;
  [[nodiscard]] bool HasContinuation(const Key& key) const;
  void Use(NamespaceId id, const Tokens& prefix);
  bool MakeRoom(std::int64_t num_pages);
  void DropUnprotected(NamespaceId id);
  void DestroyIfAbandoned(NamespaceId id);

  const std::size_t page_size_;
  const std::int64_t num_pages_;
  std::int64_t now_ = 0;
  std::int64_t num_evicted_pages_ = 0;
  std::map<NamespaceId, NaiveNamespace> namespaces_;
  std::map<Key, Page> pages_;
  std::map<int, NaiveLease> leases_;
};

}  // namespace lora_serve
