#pragma once

#include <cstdint>

#include "kv_prefix_cache/leaf_list.h"
#include "kv_prefix_cache/radix_tree.h"
#include "kv_prefix_cache/tier.h"

namespace lora_serve {

/// Says which leaf of one tier goes first, and which nodes are protected.
///
/// Owns: the ranking of the namespaces' leaf lists, and the list of pinned nodes. Does not know:
/// pages' ids, tokens, requests; it never removes anything.
///
/// A node is listed, so evictable, exactly while it is not a root, has no children and no pins
/// (E1). Refresh() is the only function that lists or unlists by that rule: every path that changes
/// children or pins ends in it. The pages and the epoch of a listed node never change: first
/// Unlist, then change, then Refresh.
class EvictionPolicy {
 public:
  explicit EvictionPolicy(Tier tier) : tier_(tier) {}
  EvictionPolicy(const EvictionPolicy&) = delete;
  EvictionPolicy& operator=(const EvictionPolicy&) = delete;

  /// Protects the path from the root to the end of `node`. Complexity: O(1) but for an unlisting.
  void Pin(Node& node) noexcept;
  /// Fatal when `node` has no pin. Complexity: O(1) but for a listing.
  void Unpin(Node& node) noexcept;

  /// Brings the listing of `node` in line with its children, pins and epoch.
  /// Complexity: O(log leaves), O(1) for the youngest.
  void Refresh(Node& node) noexcept;
  /// To be called after a child of `parent`, last used in `child_epoch`, was removed: the parent is
  /// as young as what was used below it, and may have become a leaf.
  void ChildRemoved(Node& parent, Epoch child_epoch) noexcept;
  /// Takes `node` off its list if it is on it.
  void Unlist(Node& node) noexcept;

  /// The least recently used listed leaf of all namespaces, or null. Complexity: O(1).
  [[nodiscard]] Node* Victim() const;
  /// The least recently used listed leaf of one list, or null. Complexity: O(1).
  [[nodiscard]] static Node* VictimOf(const LeafList& list);

  /// Pages of listed leaves: what eviction can free before it looks at any parent.
  [[nodiscard]] std::int64_t num_listed_pages() const { return num_listed_pages_; }

  /// Pages of this tier that eviction must not touch: those on the path of a pin, and those that a
  /// pin at `match` would protect. All others can be evicted, suffix first. Complexity: O(protected
  /// nodes). Called only when free and listed pages are not enough.
  [[nodiscard]] std::int64_t CountProtectedPages(const PrefixMatch& match = {}) const;

  /// Throws: InternalError naming the broken invariant (E2, E3, E4).
  void CheckInvariants() const;
  /// For checks. Complexity: O(pinned nodes).
  [[nodiscard]] std::int64_t CountPinnedNodes() const;

 private:
  [[nodiscard]] LeafList& ListOf(const Node& node) const;
  /// Pages of `node` and its ancestors that carry no current mark; marks them.
  [[nodiscard]] std::int64_t MarkPath(const Node* node) const;
  void RerankHead(LeafList& list) noexcept;

  const Tier tier_;
  RankedSet<LeafList> heads_;
  Node* first_pinned_ = nullptr;
  std::int64_t num_listed_pages_ = 0;
  mutable std::uint64_t current_mark_ = 0;
};

}  // namespace lora_serve
