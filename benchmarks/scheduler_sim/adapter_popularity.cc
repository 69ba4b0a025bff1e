#include "scheduler_sim/adapter_popularity.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>

#include "common/errors.h"

namespace lora_serve::sim {
namespace {

constexpr std::uint64_t kChoicePurpose = 1;
constexpr std::uint64_t kPermutationPurpose = 2;

void Check(bool is_good, const std::string& message) {
  if (!is_good) throw InvalidArgumentError("popularity of adapters: " + message);
}

void CheckOptions(const PopularityOptions& options) {
  Check(options.num_adapters >= 1,
        "at least 1 adapter is needed, found " + std::to_string(options.num_adapters));
  Check(options.zipf_exponent >= 0.0, "the zipf exponent must be at least 0");
  Check(options.skew_fraction > 0.0 && options.skew_fraction < 1.0,
        "the skewed fraction must be between 0 and 1");
  Check(options.skew_share >= 0.0 && options.skew_share <= 1.0,
        "the skewed share must be in [0, 1]");
  Check(options.drift_period_us >= 1, "the period of the drift must be above 0");
  Check(options.base_share >= 0.0 && options.base_share <= 1.0,
        "the share of the base model must be in [0, 1]");
}

double WeightOf(const PopularityOptions& options, std::int64_t rank) {
  switch (options.kind) {
    case PopularityKind::kUniform:
      return 1.0;
    case PopularityKind::kZipf:
    case PopularityKind::kDrifting:
      return std::pow(static_cast<double>(rank + 1), -options.zipf_exponent);
    case PopularityKind::kSkewed:
      break;
  }
  const auto num_adapters = static_cast<double>(options.num_adapters);
  const double num_hot = std::max(1.0, std::round(options.skew_fraction * num_adapters));
  if (static_cast<double>(rank) < num_hot) return options.skew_share / num_hot;
  return (1.0 - options.skew_share) / (num_adapters - num_hot);
}

}  // namespace

AdapterPopularity::AdapterPopularity(const PopularityOptions& options, std::uint64_t seed)
    : options_(options), random_(seed, kChoicePurpose) {
  CheckOptions(options);
  double sum = 0.0;
  for (std::int64_t rank = 0; rank < options.num_adapters; ++rank) {
    sum += WeightOf(options, rank);
    cumulative_weights_.push_back(sum);
  }
  adapter_of_rank_.resize(cumulative_weights_.size());
  std::iota(adapter_of_rank_.begin(), adapter_of_rank_.end(), 1);
  RandomStream permutation(seed, kPermutationPurpose);
  for (std::size_t index = adapter_of_rank_.size(); index > 1; --index) {
    const auto other = permutation.NextBelow(static_cast<std::int64_t>(index));
    std::swap(adapter_of_rank_[index - 1], adapter_of_rank_[static_cast<std::size_t>(other)]);
  }
}

AdapterPopularity::Choice AdapterPopularity::Choose(TimeUs now_us) {
  // Both draws are always made, so that a share of base requests does not move the adapters.
  const double base_draw = random_.NextUniform();
  const double wanted = random_.NextUniform() * cumulative_weights_.back();
  if (base_draw < options_.base_share) return {};
  const auto found = std::ranges::upper_bound(cumulative_weights_, wanted);
  const std::int64_t num_adapters = options_.num_adapters;
  const std::int64_t rank =
      std::min<std::int64_t>(found - cumulative_weights_.begin(), num_adapters - 1);
  std::int64_t index = rank;
  if (options_.kind == PopularityKind::kDrifting) {
    index = (rank + now_us / options_.drift_period_us * options_.drift_step) % num_adapters;
  }
  const std::int64_t num_rare = (num_adapters + 9) / 10;
  return {.adapter_id = adapter_of_rank_[static_cast<std::size_t>(index)],
          .is_rare = rank >= num_adapters - num_rare};
}

}  // namespace lora_serve::sim
