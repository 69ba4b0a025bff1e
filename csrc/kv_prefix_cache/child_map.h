#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

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
    return many_ != nullptr ? many_->num_children : (only_child_ != nullptr ? 1 : 0);
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
    for (const Slot& slot : many_->slots) {
      if (slot.child != nullptr) visit(*slot.child);
    }
  }

 private:
  struct Slot {
    std::uint64_t hash = 0;
    std::unique_ptr<Node> child;
  };
  /// Open addressing: a child stands at the first free slot from `hash` on, modulo the number of
  /// slots (a power of two, at least a quarter of them free); no slot between is empty.
  struct Table {
    std::vector<Slot> slots;
    std::size_t num_children = 0;

    [[nodiscard]] std::size_t mask() const { return slots.size() - 1; }
    void Insert(std::uint64_t hash, std::unique_ptr<Node> child);
    [[nodiscard]] std::unique_ptr<Node> Remove(std::size_t index);
    void Resize(std::size_t num_slots);
  };
  /// The index of `child` in the table. Throws: InternalError when it is not there.
  [[nodiscard]] std::size_t FindSlot(const Node& child, std::size_t page_size) const;

  /// Long chains have one child a node: comparing it is cheaper than hashing, and it needs no
  /// table.
  std::unique_ptr<Node> only_child_;
  /// Two children or more; null for fewer.
  std::unique_ptr<Table> many_;
};

/// A fixed function of the tokens: no seed, so that every process builds the same tables.
[[nodiscard]] std::uint64_t HashPage(std::span<const TokenId> page);

}  // namespace lora_serve
