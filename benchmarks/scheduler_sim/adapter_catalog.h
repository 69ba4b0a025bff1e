#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "scheduler_sim/device_model.h"

namespace lora_serve::sim {

/// The adapters of a run: their ids 1 to size(), lora_ranks and bytes.
class AdapterCatalog {
 public:
  /// The ranks are given out in turns. Requires: at least one rank.
  AdapterCatalog(const DeviceModel& model, std::int64_t num_adapters,
                 std::vector<std::int64_t> ranks)
      : num_adapters_(num_adapters), ranks_(std::move(ranks)) {
    for (const std::int64_t rank : ranks_) bytes_of_rank_.push_back(model.AdapterBytes(rank));
  }

  [[nodiscard]] std::int64_t size() const { return num_adapters_; }
  [[nodiscard]] std::int64_t RankOf(std::int64_t id) const { return ranks_[IndexOf(id)]; }
  [[nodiscard]] std::int64_t BytesOf(std::int64_t id) const { return bytes_of_rank_[IndexOf(id)]; }
  [[nodiscard]] std::int64_t MaxRank() const { return *std::ranges::max_element(ranks_); }
  [[nodiscard]] std::int64_t MaxBytes() const { return *std::ranges::max_element(bytes_of_rank_); }

 private:
  [[nodiscard]] std::size_t IndexOf(std::int64_t id) const {
    return static_cast<std::size_t>(id) % ranks_.size();
  }

  std::int64_t num_adapters_;
  std::vector<std::int64_t> ranks_;
  std::vector<std::int64_t> bytes_of_rank_;
};

}  // namespace lora_serve::sim
