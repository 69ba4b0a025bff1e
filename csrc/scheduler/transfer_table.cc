#include "scheduler/transfer_table.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace lora_serve {

void TransferTable::Collect() {
  for (TransferOrder& order : cache_backptr_->TakeTransferOrders()) {
    const Entry entry = {.kind = order.kind, .namespace_id = order.namespace_id};
    LS_CHECK(under_way_.emplace(order.id, entry).second, "copy ", order.id, " started twice");
    orders_.push_back(std::move(order));
  }
}

std::vector<TransferOrder> TransferTable::TakeOrders() { return std::exchange(orders_, {}); }

TransferId TransferTable::Newest() const {
  return under_way_.empty() ? kNoTransfer : under_way_.rbegin()->first;
}

TransferId TransferTable::NewestOf(NamespaceId id) const {
  for (auto it = under_way_.rbegin(); it != under_way_.rend(); ++it) {
    if (it->second.namespace_id == id) return it->first;
  }
  return kNoTransfer;
}

std::int64_t TransferTable::NumPagesHeld() const {
  std::int64_t num_pages = 0;
  for (const auto& [id, entry] : under_way_) num_pages += entry.num_pages_held;
  return num_pages;
}

void TransferTable::NotePagesHeld(TransferId id, std::int64_t num_pages) {
  const auto it = under_way_.find(id);
  LS_CHECK(it != under_way_.end(), "copy ", id, " is not under way");
  it->second.num_pages_held = std::max(it->second.num_pages_held, num_pages);
}

void TransferTable::Remove(TransferId id) {
  LS_CHECK(under_way_.erase(id) == 1, "copy ", id, " is not under way");
}

void TransferTable::CheckInvariants() const {
  std::map<NamespaceId, std::int64_t> counts;
  for (const auto& [id, entry] : under_way_) ++counts[entry.namespace_id];
  std::int64_t num_transfers = 0;
  for (const NamespaceStats& stats : cache_backptr_->NamespaceStatsList()) {
    LS_CHECK(stats.num_transfers == counts[stats.id], "namespace ", stats.id, " has ",
             stats.num_transfers, " copies under way, ", counts[stats.id], " are known");
    num_transfers += stats.num_transfers;
  }
  LS_CHECK(num_transfers == size(), num_transfers, " copies under way, ", size(), " are known");
}

}  // namespace lora_serve
