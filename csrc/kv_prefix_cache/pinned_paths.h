#pragma once

#include <cstdint>

#include "kv_prefix_cache/node.h"
#include "kv_prefix_cache/tier.h"

namespace lora_serve {

/// A place on a path: after the first `num_edge_pages` pages of `node`'s edge.
struct PathPosition {
  const Node* node = nullptr;
  std::int32_t num_edge_pages = 0;
};

/// The pinned nodes of one component and tier, and how many pages lie on their paths.
///
/// A pin protects the path from the root to the end of its node, and paths share their beginnings,
/// so the pages are not simply those of each pin. A pin that comes or goes is only noted, whatever
/// its depth; the next question counts the noted ones, each from its node upwards to the first
/// node that another path has. A pin that came and went between two questions is never walked.
///
/// Owns: the links between pinned nodes, and the count. Does not know: who pins, what is listed.
///
/// Invariants: a node is in `counted_` when it is pinned and its path is counted, in `noted_` when
/// only one of the two is true. A node lies on a counted path when it is counted itself or
/// num_counted_children > 0; the latter are its children on counted paths (for KV pages of this
/// tier: a protected node is full there). num_pages_ are the pages of all nodes on counted paths.
class PinnedPaths {
 public:
  PinnedPaths(Component component, Tier tier) : component_(component), tier_(tier) {}
  PinnedPaths(const PinnedPaths&) = delete;
  PinnedPaths& operator=(const PinnedPaths&) = delete;

  /// The node has got its first pin. Complexity: O(1).
  void Add(Node& node) noexcept;
  /// The node has lost its last pin. Complexity: O(1).
  void Remove(Node& node) noexcept;
  /// The tier holds `delta` pages more of the node. Complexity: O(1).
  void PagesChanged(const Node& node, std::int32_t delta) noexcept {
    if (IsOnCountedPath(node)) num_pages_ += delta;
  }
  /// The node is about to be destroyed. Requires: no pin, no children.
  void Forget(Node& node) noexcept;

  /// Pages on the paths of all pins, and those that a pin at `extra` would add.
  /// Complexity: what was noted since the last call, each up to the next path that is counted
  /// already; for `extra` the same.
  [[nodiscard]] std::int64_t CountPages(const PathPosition& extra = {});

  /// The same by a walk along every path, which changes nothing. For checks.
  [[nodiscard]] std::int64_t CountPagesAfresh() const;
  /// For checks. Complexity: O(pinned nodes).
  [[nodiscard]] std::int64_t CountPinnedNodes() const;
  /// Throws: InternalError naming the broken invariant (E4, E6). Changes nothing.
  void CheckInvariants() const;

 private:
  [[nodiscard]] const Residency& Held(const Node& node) const { return node.Of(component_, tier_); }
  [[nodiscard]] Residency& Held(Node& node) const { return node.Of(component_, tier_); }
  [[nodiscard]] bool IsOnCountedPath(const Node& node) const {
    return Held(node).IsOnCountedPath();
  }
  void Link(Node*& first, Node& node) noexcept;
  void Unlink(Node*& first, Node& node) noexcept;
  void CountPath(Node& node) noexcept;
  void UncountPath(Node& node) noexcept;
  /// Counts what is noted.
  void Settle() noexcept;
  void CheckList(const Node* first, bool is_counted_list) const;

  const Component component_;
  const Tier tier_;
  Node* counted_ = nullptr;
  Node* noted_ = nullptr;
  std::int64_t num_pages_ = 0;
};

}  // namespace lora_serve
