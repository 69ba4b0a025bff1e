#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "scheduler_sim/adapter_catalog.h"
#include "scheduler_sim/lru_set.h"

namespace lora_serve::sim {

/// The adapters in host memory: bounded in bytes, the least recently used one goes first.
class HostTier {
 public:
  /// Starts with as many adapters as fit, by id. `max_bytes` 0 = all fit.
  HostTier(const AdapterCatalog& catalog, std::int64_t max_bytes)
      : catalog_(catalog), max_bytes_(max_bytes) {
    for (std::int64_t id = 1; id <= catalog.size(); ++id) {
      if (max_bytes > 0 && num_bytes_ + catalog.BytesOf(id) > max_bytes) break;
      num_bytes_ += catalog.BytesOf(id);
      adapters_.Touch(id);
    }
  }

  [[nodiscard]] bool Contains(std::int64_t id) const { return adapters_.Contains(id); }
  void Touch(std::int64_t id) { adapters_.Touch(id); }

  /// Takes room for `id` from the oldest ones for which `may_go(id)`. False when they do not give
  /// enough; those that went are gone.
  template <typename MayGo>
  [[nodiscard]] bool Add(std::int64_t id, const MayGo& may_go) {
    while (max_bytes_ > 0 && num_bytes_ + catalog_.BytesOf(id) > max_bytes_) {
      const std::int64_t victim = adapters_.Oldest(may_go);
      if (victim == 0) return false;
      num_bytes_ -= catalog_.BytesOf(victim);
      adapters_.Erase(victim);
      evicted_.push_back(victim);
    }
    num_bytes_ += catalog_.BytesOf(id);
    adapters_.Touch(id);
    return true;
  }
  /// Those that have gone since the last call.
  [[nodiscard]] std::vector<std::int64_t> TakeEvicted() { return std::exchange(evicted_, {}); }

 private:
  const AdapterCatalog& catalog_;
  std::int64_t max_bytes_;
  std::int64_t num_bytes_ = 0;
  LruSet adapters_;
  std::vector<std::int64_t> evicted_;
};

}  // namespace lora_serve::sim
