#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>

namespace lora_serve {

struct Node;
class LeafList;

/// Counts what makes pages or snapshots younger; the only "time" of the cache.
using Epoch = std::int64_t;

/// Who goes first among equals: the least recently used, ties broken by the order of creation.
/// No clock, no addresses.
struct EvictionRank {
  Epoch epoch = 0;
  std::int64_t sequence = 0;

  friend constexpr auto operator<=>(const EvictionRank&, const EvictionRank&) = default;
};

/// Leaves whose age differs by less than this are as good as equally old, so that their class
/// decides: ages are exact for the order within a class only.
inline constexpr Epoch kAgeBucketEpochs = 64;

/// Who goes first among the heads of all lists; false before true. Source: the order of DESIGN's
/// eviction policy, a segmented LRU with classes inside an age bucket.
struct HeadRank {
  bool is_within_quota = true;
  Epoch age_bucket = 0;
  /// Pages of an adapter that must be loaded before they can be used are worth less.
  bool is_adapter_resident = true;
  /// Pages that the host has too can be had back by a copy.
  bool is_unbacked = true;
  EvictionRank leaf;

  friend constexpr auto operator<=>(const HeadRank&, const HeadRank&) = default;
};

/// `Item*` values ordered by rank.
///
/// Entries are std::set nodes that are moved in and out by handle: an item that was listed once is
/// listed and unlisted again without an allocation.
template <typename Item, typename Rank>
class RankedSet {
 public:
  struct Entry {
    Rank rank;
    Item* item = nullptr;

    friend bool operator<(const Entry& a, const Entry& b) { return a.rank < b.rank; }
  };
  using Set = std::set<Entry>;
  using Iterator = typename Set::const_iterator;

  /// An item's place in a RankedSet. Holds the memory of the entry while the item is not listed,
  /// from its first listing on: most nodes are never leaves, and pay nothing.
  class Hook {
   public:
    [[nodiscard]] bool is_listed() const { return is_listed_; }
    /// Requires: is_listed().
    [[nodiscard]] const Rank& rank() const { return position_->rank; }

   private:
    friend class RankedSet;
    typename Set::node_type spare_;
    typename Set::iterator position_;
    bool is_listed_ = false;
  };

  [[nodiscard]] bool IsEmpty() const { return set_.empty(); }
  [[nodiscard]] std::size_t size() const { return set_.size(); }
  /// The first entry. Requires: not empty.
  [[nodiscard]] const Entry& head() const { return *set_.begin(); }
  [[nodiscard]] Iterator begin() const { return set_.begin(); }
  [[nodiscard]] Iterator end() const { return set_.end(); }

  /// Requires: not listed. Complexity: O(log n), O(1) for the newest rank.
  void List(Hook& hook, const Rank& rank, Item* item) noexcept {
    if (hook.spare_.empty()) {
      hook.position_ = set_.insert(set_.end(), Entry{rank, item});
    } else {
      hook.spare_.value() = Entry{rank, item};
      hook.position_ = set_.insert(set_.end(), std::move(hook.spare_));
    }
    hook.is_listed_ = true;
  }
  /// Requires: listed here. Complexity: O(1) amortised.
  void Unlist(Hook& hook) noexcept {
    hook.spare_ = set_.extract(hook.position_);
    hook.is_listed_ = false;
  }

 private:
  Set set_;
};

using LeafSet = RankedSet<Node, EvictionRank>;
using HeadSet = RankedSet<LeafList, HeadRank>;
using LeafHook = LeafSet::Hook;

/// The evictable leaves of one (namespace, component, tier) that are backed by the host, or that
/// are not. Only its head competes with other lists, so that what concerns a whole namespace
/// re-ranks a head, not every leaf.
class LeafList {
 public:
  [[nodiscard]] bool IsEmpty() const { return leaves_.IsEmpty(); }

 private:
  friend class EvictionPolicy;
  LeafSet leaves_;
  HeadSet::Hook head_hook_;
};

}  // namespace lora_serve
