#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/child_map.h"
#include "kv_prefix_cache/leaf_list.h"
#include "kv_prefix_cache/owned_pages.h"
#include "kv_prefix_cache/tier.h"

namespace lora_serve {

class Namespace;

/// What one tier holds of a node, and what the tier's policy notes about it.
struct Residency {
  /// One page for every page of the edge, or none.
  OwnedPages pages;
  /// Leases whose deepest page in this tier is the last of this node. While it is not 0 the node
  /// stays, and with it the whole path to the root, because only leaves are evicted.
  std::int32_t num_pins = 0;
  LeafHook leaf_hook;
  /// Links of the policy's list of pinned nodes; null when not pinned or at an end.
  Node* previous_pinned = nullptr;
  Node* next_pinned = nullptr;
};

/// A node of the radix tree: the edge that leads to it, and the children behind it.
///
///     parent ──[ page start_page | ... | page end_page() - 1 ]──> this node ──> children
///
/// RadixTree owns nodes and writes the first group; EvictionPolicy writes pins, hooks and links;
/// the façade writes pages and epochs. A node object never changes its address, and after a split
/// it is the lower half.
struct Node {
  Node* parent_backptr = nullptr;  // null: this is a virtual root
  Namespace* namespace_backptr = nullptr;
  std::int64_t sequence = 0;    // unique in the cache, in order of creation
  std::int32_t start_page = 0;  // pages between the root and this edge
  std::int32_t num_pages = 0;   // pages of the edge; 0 only for a virtual root
  std::vector<TokenId> tokens;  // of the edge, num_pages * page_size
  ChildMap children;

  Epoch epoch = 0;                             // last use of this node, or of a removed descendant
  std::array<Residency, kNumTiers> residency;  // by tier
  mutable std::uint64_t visit_mark = 0;        // scratch of EvictionPolicy::CountProtectedPages

  [[nodiscard]] bool IsRoot() const { return parent_backptr == nullptr; }
  [[nodiscard]] std::int32_t end_page() const { return start_page + num_pages; }
  [[nodiscard]] Residency& On(Tier tier) { return residency[IndexOf(tier)]; }
  [[nodiscard]] const Residency& On(Tier tier) const { return residency[IndexOf(tier)]; }
};

}  // namespace lora_serve
