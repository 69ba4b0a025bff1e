#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/kv_prefix_cache.h"

namespace lora_serve {

/// The copies between the tiers that the cache has started and no event has reported.
///
///     started --Collect--> under way, order kept --TakeOrders--> under way, in a plan --Remove-->
///
/// Owns: which copies are under way, the orders that no plan has given out yet, and how many device
/// pages each holds back from others. Does not know: requests, plans, who waits for what.
class TransferTable {
 public:
  /// `cache` must outlive the table.
  explicit TransferTable(KVPrefixCache* cache) : cache_backptr_(cache) {}
  TransferTable(const TransferTable&) = delete;
  TransferTable& operator=(const TransferTable&) = delete;

  /// Takes over what the cache has started since the last call.
  void Collect();
  /// The collected orders, by id. Each is given out once.
  [[nodiscard]] std::vector<TransferOrder> TakeOrders();

  /// True from Collect to Remove.
  [[nodiscard]] bool IsUnderWay(TransferId id) const { return under_way_.contains(id); }
  /// Requires: it is under way.
  [[nodiscard]] bool IsWriteBack(TransferId id) const {
    return under_way_.at(id).kind == TransferKind::kWriteBack;
  }
  [[nodiscard]] bool IsEmpty() const { return under_way_.empty(); }
  [[nodiscard]] std::int64_t size() const { return std::ssize(under_way_); }
  /// The newest one under way; kNoTransfer when there is none.
  [[nodiscard]] TransferId Newest() const;
  /// The newest one of the namespace. Complexity: O(copies under way).
  [[nodiscard]] TransferId NewestOf(NamespaceId id) const;

  /// Device pages that nobody uses any more and that can be had when the copies under way have
  /// ended: what the two functions below have noted. An estimate: of the pages of a lease that has
  /// ended, running requests may use some, too.
  [[nodiscard]] std::int64_t NumPagesHeld() const;
  /// Notes that copy `id` holds back at least `num_pages` such pages. That can be more than it
  /// copies: it protects the whole path before its pages. Requires: it is under way.
  void NotePagesHeld(TransferId id, std::int64_t num_pages);
  /// Ends a lease of `num_pages` pages in `id` by `end`, and notes those that are not available
  /// afterwards as held by the namespace's newest copy.
  template <typename End>
  void EndLease(NamespaceId id, std::int64_t num_pages, const End& end) {
    const TransferId holding = NewestOf(id);
    if (holding == kNoTransfer || num_pages == 0) {
      end();
      return;
    }
    const std::int64_t num_available = cache_backptr_->NumAvailablePages();
    end();
    const std::int64_t num_freed = cache_backptr_->NumAvailablePages() - num_available;
    NotePagesHeld(holding, num_pages - num_freed);
  }

  /// The copy was reported. Requires: it is under way.
  void Remove(TransferId id);

  /// Throws: InternalError when the cache has other copies under way than this table.
  void CheckInvariants() const;

 private:
  struct Entry {
    TransferKind kind = TransferKind::kWriteBack;
    NamespaceId namespace_id;
    std::int64_t num_pages_held = 0;
  };

  KVPrefixCache* cache_backptr_;
  std::map<TransferId, Entry> under_way_;
  std::vector<TransferOrder> orders_;
};

}  // namespace lora_serve
