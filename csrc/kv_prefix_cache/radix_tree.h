#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "common/strong_id.h"
#include "kv_prefix_cache/node.h"

namespace lora_serve {

/// Numbers nodes in the order of their creation; one for all trees of a cache.
struct NodeSequencer {
  std::int64_t next = 0;
};

/// Where a walk along some tokens ended.
struct PrefixMatch {
  /// The deepest node of which at least one page matched; the node the walk began at when none did.
  Node* node = nullptr;
  /// Pages matched on the whole walk.
  std::int32_t num_pages = 0;
  /// Pages matched of `node`'s edge. Less than the edge: the walk ended inside it.
  std::int32_t num_edge_pages = 0;
};

/// The radix tree of one namespace: compressed edges of whole pages below a virtual root.
///
/// Owns: the nodes. Does not know: tiers, pins, eviction, namespaces beyond a pointer that it
/// copies to its nodes. Changing the tree never moves a node object, and a split makes the existing
/// object the lower half: what points to a node keeps pointing to the same last page.
///
/// The invariants S1 to S4 stand in this folder's README.
class RadixTree {
 public:
  /// Requires: page_size >= 1. `sequencer` outlives the tree; `owner` may be null.
  RadixTree(std::int32_t page_size, NodeSequencer* sequencer, Namespace* owner);
  /// Complexity: O(nodes), without recursion: chains may be very long.
  ~RadixTree();
  RadixTree(const RadixTree&) = delete;
  RadixTree& operator=(const RadixTree&) = delete;

  [[nodiscard]] std::int32_t page_size() const { return page_size_; }
  /// Nodes without the root.
  [[nodiscard]] std::int64_t num_nodes() const { return num_nodes_; }
  /// The virtual root: always there, depth 0, no edge.
  [[nodiscard]] Node& root() const { return *root_; }

  /// Follows the whole pages of `tokens` from the end of `from` downwards. Changes nothing.
  /// Complexity: O(tokens compared), one look-up a node.
  [[nodiscard]] PrefixMatch Match(Node& from, std::span<const TokenId> tokens) const;

  /// Cuts `node`'s edge after `num_upper_pages` pages and returns the new upper half.
  /// `node` becomes its only child and keeps its children, pins, snapshot and sequence number; the
  /// pages of each tier are divided. Requires: `node` is on no eviction list.
  /// Requires: 0 < num_upper_pages < node.num_pages.
  /// Complexity: O(pages of the edge).
  Node& Split(Node& node, std::int32_t num_upper_pages);

  /// Adds a leaf below `parent`.
  /// Requires: whole pages, at least one; no child starts with the same page.
  Node& AddChild(Node& parent, std::span<const TokenId> tokens);

  /// Makes the leaf's edge longer. Requires: no children, not the root, whole pages.
  void ExtendLeaf(Node& leaf, std::span<const TokenId> tokens);

  /// Makes the leaf's edge shorter. Requires: no children, 0 < num_pages < leaf.num_pages, no tier
  /// holds more.
  void TruncateLeaf(Node& leaf, std::int32_t num_pages);

  /// Destroys a leaf and what it holds. Requires: no children, not the root.
  void RemoveLeaf(Node& leaf);

  /// Calls `visit(Node&)` for every node, the root included, parents first, siblings in an
  /// unspecified order. For checks and statistics only.
  template <typename Visit>
  void ForEachNode(const Visit& visit) const {
    std::vector<Node*> pending{root_.get()};
    while (!pending.empty()) {
      Node* const node = pending.back();
      pending.pop_back();
      visit(*node);
      node->children.ForEach([&pending](Node& child) { pending.push_back(&child); });
    }
  }

  /// Throws: InternalError naming the broken invariant.
  void CheckInvariants() const;

 private:
  [[nodiscard]] std::unique_ptr<Node> NewNode(Node* parent);
  [[nodiscard]] std::size_t NumTokens(std::int32_t num_pages) const;
  void CheckNode(const Node& node) const;

  const std::int32_t page_size_;
  NodeSequencer* const sequencer_backptr_;
  Namespace* const namespace_backptr_;
  std::int64_t num_nodes_ = 0;
  std::unique_ptr<Node> root_;
};

}  // namespace lora_serve
