#pragma once

#include <cstdint>
#include <vector>

#include "scheduler_sim/random_stream.h"
#include "scheduler_sim/sim_request.h"

namespace lora_serve::sim {

enum class PopularityKind : std::uint8_t {
  kUniform,
  /// Share of the adapter at rank k: proportional to 1 / k^exponent.
  kZipf,
  /// `skew_share` of the requests on `skew_fraction` of the adapters, uniform within both groups.
  kSkewed,
  /// Zipf whose ranking moves on by `drift_step` adapters every `drift_period_us`.
  kDrifting,
};

struct PopularityOptions {
  PopularityKind kind = PopularityKind::kUniform;
  std::int64_t num_adapters = 1;
  double zipf_exponent = 1.0;
  double skew_fraction = 0.1;
  double skew_share = 0.9;
  TimeUs drift_period_us = 10'000'000;
  std::int64_t drift_step = 1;
  /// Share of the requests that use the base model.
  double base_share = 0.0;
};

/// Which adapter a request uses. The ranking is a seeded permutation of the ids, so that a popular
/// adapter is not a low id.
class AdapterPopularity {
 public:
  struct Choice {
    /// 0 = the base model.
    std::int64_t adapter_id = 0;
    /// At a rank of the last tenth (never the base model).
    bool is_rare = false;
  };

  /// Throws: InvalidArgumentError when an option is out of range.
  AdapterPopularity(const PopularityOptions& options, std::uint64_t seed);

  /// Complexity: O(log adapters).
  [[nodiscard]] Choice Choose(TimeUs now_us);

 private:
  PopularityOptions options_;
  RandomStream random_;
  /// Of the ranks, most popular first; the last is the sum of all.
  std::vector<double> cumulative_weights_;
  std::vector<std::int64_t> adapter_of_rank_;
};

}  // namespace lora_serve::sim
