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

/// What one tier holds of one component of a node, and what its policy notes about it.
///
///     pages:   [ present ............ | in flight ... ]  then nothing
///              0           num_present()         pages.size() <= num_pages of the edge
///
/// Full attention: one page for every page of the edge, from its start. Recurrent state: one slot
/// for the snapshot at the end of the edge, or none.
struct Residency {
  OwnedPages pages;
  /// The last of `pages`, whose bytes are on their way here.
  std::int32_t num_in_flight = 0;
  /// Leases and transfers whose deepest page here is the last of this node; for snapshots, those
  /// that use this one. While it is not 0 the node stays, and with it the whole path to the root,
  /// because only leaves are evicted.
  std::int32_t num_pins = 0;
  /// Children that have pages here. A node without any is a leaf of this tier.
  std::int32_t num_continuations = 0;
  /// Children on counted paths, and whether the path to this node is counted for a pin here.
  std::int32_t num_counted_children = 0;
  bool is_pin_counted = false;
  /// Which of its two lists the node stands in, while it is listed.
  bool is_listed_as_backed = false;
  /// Last use of this node here, or of a removed descendant.
  Epoch epoch = 0;
  LeafHook leaf_hook;
  /// Links between pinned nodes, and those that were when they were last counted.
  Node* previous_pinned = nullptr;
  Node* next_pinned = nullptr;

  [[nodiscard]] std::int32_t num_present() const { return pages.size() - num_in_flight; }
  [[nodiscard]] bool IsOnCountedPath() const { return is_pin_counted || num_counted_children > 0; }
};

/// A node of the radix tree: the edge that leads to it, and the children behind it.
///
///     parent ──[ page start_page | ... | page end_page() - 1 ]──> this node ──> children
///
/// Its edge is as long as the longest of its tiers' pages, and a child that has pages in a tier
/// hangs below a node whose edge is full there: in each tier the pages of a path start at the root.
///
/// RadixTree owns nodes and writes the first group; EvictionPolicy writes pins and hooks,
/// PinnedPaths links and counts of paths; the cache writes pages and epochs. A node object never
/// changes its address, and after a split it is the lower half.
struct Node {
  Node* parent_backptr = nullptr;  // null: this is a virtual root
  Namespace* namespace_backptr = nullptr;
  std::int64_t sequence = 0;    // unique in the cache, in order of creation
  std::int32_t start_page = 0;  // pages between the root and this edge
  std::int32_t num_pages = 0;   // pages of the edge; 0 only for a virtual root
  std::vector<TokenId> tokens;  // of the edge, num_pages * page_size
  ChildMap children;

  std::array<std::array<Residency, kNumTiers>, kNumComponents> residency;  // [component][tier]
  /// Place among the paths that wait to be written through; 0 = it does not.
  std::int64_t write_back_note = 0;
  /// Chained hash of the last page (see ChainHash), while somebody listens to events.
  std::uint64_t end_hash = 0;

  [[nodiscard]] bool IsRoot() const { return parent_backptr == nullptr; }
  [[nodiscard]] std::int32_t end_page() const { return start_page + num_pages; }
  [[nodiscard]] Residency& Of(Component component, Tier tier) {
    return residency[IndexOf(component)][IndexOf(tier)];
  }
  [[nodiscard]] const Residency& Of(Component component, Tier tier) const {
    return residency[IndexOf(component)][IndexOf(tier)];
  }
  /// The KV pages of the edge.
  [[nodiscard]] Residency& On(Tier tier) { return Of(Component::kFullAttention, tier); }
  [[nodiscard]] const Residency& On(Tier tier) const { return Of(Component::kFullAttention, tier); }
  /// The snapshot of recurrent state at the end of the edge.
  [[nodiscard]] Residency& Snapshot(Tier tier) { return Of(Component::kState, tier); }
  [[nodiscard]] const Residency& Snapshot(Tier tier) const { return Of(Component::kState, tier); }
};

}  // namespace lora_serve
