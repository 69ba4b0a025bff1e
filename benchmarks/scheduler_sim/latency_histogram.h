#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace lora_serve::sim {

/// Counts of times in classes that are at most 1/128 of their value wide: percentiles of any number
/// of samples, in the same small memory, with a relative error of at most 0.4%. The maximum is
/// exact.
class LatencyHistogram {
 public:
  /// Requires: value >= 0.
  void Add(std::int64_t value) {
    ++counts_[ClassOf(static_cast<std::uint64_t>(value))];
    ++num_samples_;
    if (value > max_) max_ = value;
  }

  /// The value below which a share of `fraction` lies (nearest rank); 0 without samples.
  [[nodiscard]] double Percentile(double fraction) const {
    const double wanted = fraction * static_cast<double>(num_samples_);
    std::int64_t num_below = 0;
    for (std::size_t index = 0; index < counts_.size(); ++index) {
      num_below += counts_[index];
      if (num_below > 0 && static_cast<double>(num_below) >= wanted) return MiddleOf(index);
    }
    return 0.0;
  }
  [[nodiscard]] std::int64_t max() const { return max_; }
  [[nodiscard]] std::int64_t num_samples() const { return num_samples_; }

 private:
  static constexpr int kMantissaBits = 7;
  static constexpr std::size_t kPerOctave = std::size_t{1} << kMantissaBits;

  static std::size_t ClassOf(std::uint64_t value) {
    if (value < 2 * kPerOctave) return static_cast<std::size_t>(value);
    const int shift = static_cast<int>(std::bit_width(value)) - 1 - kMantissaBits;
    return static_cast<std::size_t>(shift) * kPerOctave + static_cast<std::size_t>(value >> shift);
  }
  static double MiddleOf(std::size_t index) {
    if (index < 2 * kPerOctave) return static_cast<double>(index);
    const std::size_t shift = index / kPerOctave - 1;
    const std::size_t mantissa = index - shift * kPerOctave;
    const auto width = static_cast<double>(std::uint64_t{1} << shift);
    return (static_cast<double>(mantissa) + 0.5) * width;
  }

  std::array<std::int64_t, (64 - kMantissaBits + 1) * kPerOctave> counts_{};
  std::int64_t num_samples_ = 0;
  std::int64_t max_ = 0;
};

}  // namespace lora_serve::sim
