#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>

#include "common/strong_id.h"

namespace lora_serve {

struct Node;

/// The children of one node, found by the tokens of their edge's first page.
///
/// Owns: the child nodes. Does not know: what lies behind their first page.
/// The hash only finds candidates; equality is decided on the tokens, so a collision costs time,
/// never a wrong hit. The order of iteration is unspecified and must not influence a decision.
class ChildMap {
 public:
  ChildMap();
  ~ChildMap();
  ChildMap(const ChildMap&) = delete;
  ChildMap& operator=(const ChildMap&) = delete;

  [[nodiscard]] bool IsEmpty() const { return only_child_ == nullptr && many_ == nullptr; }
  [[nodiscard]] std::size_t size() const {
    return many_ != nullptr ? many_->size() : (only_child_ != nullptr ? 1 : 0);
  }

  /// The child whose edge starts with `page`, or null. Complexity: O(page) on average.
  [[nodiscard]] Node* Find(std::span<const TokenId> page) const;

  /// Requires: no child starts with the first `page_size` tokens of `child`'s edge.
  void Insert(std::unique_ptr<Node> child, std::size_t page_size);

  /// Takes `child` out. Requires: it is one of these children.
  [[nodiscard]] std::unique_ptr<Node> Remove(const Node& child, std::size_t page_size);

  /// Puts `replacement` in the place of `child`, which it gives back. Requires: both edges start
  /// with the same page.
  [[nodiscard]] std::unique_ptr<Node> Replace(const Node& child, std::unique_ptr<Node> replacement,
                                              std::size_t page_size);

  /// Calls `visit(Node&)` for every child, in an unspecified order.
  template <typename Visit>
  void ForEach(const Visit& visit) const {
    if (only_child_ != nullptr) visit(*only_child_);
    if (many_ == nullptr) return;
    for (const auto& [hash, child] : *many_) visit(*child);
  }

 private:
  using Map = std::unordered_multimap<std::uint64_t, std::unique_ptr<Node>>;
  [[nodiscard]] Map::iterator FindPosition(const Node& child, std::size_t page_size);

  /// Long chains have one child a node: comparing it is cheaper than hashing, and it needs no
  /// table.
  std::unique_ptr<Node> only_child_;
  /// Two children or more; null for fewer.
  std::unique_ptr<Map> many_;
};

/// A fixed function of the tokens: no seed, so that every process builds the same tables.
[[nodiscard]] std::uint64_t HashPage(std::span<const TokenId> page);

}  // namespace lora_serve
