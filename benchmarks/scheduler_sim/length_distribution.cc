#include "scheduler_sim/length_distribution.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "common/errors.h"

namespace lora_serve::sim {

LengthDistribution LengthDistribution::Parse(const std::string& text) {
  LengthDistribution lengths;
  double variation = 0.0;
  char rest = 0;
  const bool is_fixed = std::sscanf(text.c_str(), "%lf%c", &lengths.mean_, &rest) == 1;
  const bool is_lognormal =
      std::sscanf(text.c_str(), "lognormal:%lf:%lf%c", &lengths.mean_, &variation, &rest) == 2;
  if ((!is_fixed && !is_lognormal) || lengths.mean_ < 1.0 || variation < 0.0) {
    throw InvalidArgumentError("a length is given as '" + text +
                               "'; expected a number of tokens or lognormal:MEAN:CV");
  }
  lengths.log_deviation_ = std::sqrt(std::log1p(variation * variation));
  return lengths;
}

std::int32_t LengthDistribution::Draw(RandomStream& random, std::int32_t limit) const {
  double length = mean_;
  if (log_deviation_ > 0.0) {
    // A lognormal of this mean: the mean of the logarithm lies below the logarithm of the mean.
    const double log_mean = std::log(mean_) - log_deviation_ * log_deviation_ / 2.0;
    length = std::exp(log_mean + log_deviation_ * random.NextNormal());
  }
  return static_cast<std::int32_t>(std::clamp(std::round(length), 1.0, static_cast<double>(limit)));
}

}  // namespace lora_serve::sim
