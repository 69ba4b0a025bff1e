#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>

namespace lora_serve::sim {

/// Adapters in order of their last use.
class LruSet {
 public:
  [[nodiscard]] bool Contains(std::int64_t id) const { return positions_.contains(id); }
  [[nodiscard]] std::size_t size() const { return order_.size(); }

  /// Makes it the most recently used; adds it when it is not there.
  void Touch(std::int64_t id) {
    const auto [position, is_new] = positions_.try_emplace(id, order_.end());
    if (is_new) {
      position->second = order_.insert(order_.end(), id);
    } else {
      order_.splice(order_.end(), order_, position->second);
    }
  }
  void Erase(std::int64_t id) {
    const auto position = positions_.find(id);
    if (position == positions_.end()) return;
    order_.erase(position->second);
    positions_.erase(position);
  }
  /// The least recently used one for which `may_go(id)`; 0 when there is none.
  template <typename MayGo>
  [[nodiscard]] std::int64_t Oldest(const MayGo& may_go) const {
    for (const std::int64_t id : order_) {
      if (may_go(id)) return id;
    }
    return 0;
  }

 private:
  std::list<std::int64_t> order_;
  std::unordered_map<std::int64_t, std::list<std::int64_t>::iterator> positions_;
};

}  // namespace lora_serve::sim
