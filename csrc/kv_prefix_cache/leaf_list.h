#pragma once

#include <compare>
#include <cstdint>
#include <set>
#include <utility>

namespace lora_serve {

struct Node;
class LeafList;

/// Counts the leases that have ended; the only "time" of the cache.
using Epoch = std::int64_t;

/// Who goes first: the least recently used, ties broken by the order of creation.
/// No clock, no addresses.
struct EvictionRank {
  Epoch epoch = 0;
  std::int64_t sequence = 0;

  friend constexpr auto operator<=>(const EvictionRank&, const EvictionRank&) = default;
};

/// `Item*` values ordered by rank.
///
/// Entries are std::set nodes that are moved in and out by handle, so that listing and unlisting
/// allocate nothing: both happen while leases end, where nothing may throw.
template <typename Item>
class RankedSet {
 public:
  struct Entry {
    EvictionRank rank;
    Item* item = nullptr;

    friend bool operator<(const Entry& a, const Entry& b) { return a.rank < b.rank; }
  };
  using Set = std::set<Entry>;

  /// An item's place in a RankedSet. Holds the memory of the entry while the item is not listed.
  class Hook {
   public:
    Hook() {
      Set set;
      set.emplace();
      spare_ = set.extract(set.begin());
    }
    [[nodiscard]] bool is_listed() const { return spare_.empty(); }
    /// Requires: is_listed().
    [[nodiscard]] const EvictionRank& rank() const { return position_->rank; }

   private:
    friend class RankedSet;
    typename Set::node_type spare_;
    typename Set::iterator position_;
  };

  [[nodiscard]] bool IsEmpty() const { return set_.empty(); }
  [[nodiscard]] std::size_t size() const { return set_.size(); }
  /// The first entry. Requires: not empty.
  [[nodiscard]] const Entry& head() const { return *set_.begin(); }

  /// Requires: not listed. Complexity: O(log n), O(1) for the newest rank.
  void List(Hook& hook, const EvictionRank& rank, Item* item) noexcept {
    hook.spare_.value() = Entry{rank, item};
    hook.position_ = set_.insert(set_.end(), std::move(hook.spare_));
  }
  /// Requires: listed here. Complexity: O(1) amortised.
  void Unlist(Hook& hook) noexcept { hook.spare_ = set_.extract(hook.position_); }

  template <typename Visit>
  void ForEach(const Visit& visit) const {
    for (const Entry& entry : set_) visit(entry);
  }

 private:
  Set set_;
};

using LeafHook = RankedSet<Node>::Hook;

/// The evictable leaves of one (namespace, tier). Only its head competes with other namespaces, so
/// that what concerns a whole namespace re-ranks one head, not every leaf.
class LeafList {
 public:
  [[nodiscard]] bool IsEmpty() const { return leaves_.IsEmpty(); }

 private:
  friend class EvictionPolicy;
  RankedSet<Node> leaves_;
  RankedSet<LeafList>::Hook head_hook_;
};

}  // namespace lora_serve
