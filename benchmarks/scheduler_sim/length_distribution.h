#pragma once

#include <cstdint>
#include <string>

#include "scheduler_sim/random_stream.h"

namespace lora_serve::sim {

/// Lengths in tokens: always the same, or lognormal.
class LengthDistribution {
 public:
  /// `text` is a number of tokens, or "lognormal:MEAN:CV" (CV = standard deviation / mean).
  /// Throws: InvalidArgumentError when it is neither.
  [[nodiscard]] static LengthDistribution Parse(const std::string& text);

  /// At least 1, at most `limit`.
  [[nodiscard]] std::int32_t Draw(RandomStream& random, std::int32_t limit) const;

 private:
  double mean_ = 1.0;
  /// Standard deviation of the logarithm; 0 = always the mean.
  double log_deviation_ = 0.0;
};

}  // namespace lora_serve::sim
