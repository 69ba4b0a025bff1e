#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

// Seeded random numbers with distributions of our own: those of the standard library may differ
// from one implementation to the next, and runs are to repeat.

namespace lora_serve::sim {

/// A number that depends on all bits of `value` (the finalizer of SplitMix64).
[[nodiscard]] constexpr std::uint64_t Scramble(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

/// SplitMix64. Streams of one seed and different purposes are independent: changing the number of
/// draws of one (lengths, say) leaves the others (arrivals) as they were.
class RandomStream {
 public:
  RandomStream(std::uint64_t seed, std::uint64_t purpose)
      : state_(Scramble(seed) ^ Scramble(~purpose)) {}

  [[nodiscard]] std::uint64_t NextBits() {
    const std::uint64_t bits = Scramble(state_);
    state_ += 0x9e3779b97f4a7c15;
    return bits;
  }
  /// In [0, 1).
  [[nodiscard]] double NextUniform() { return static_cast<double>(NextBits() >> 11) * 0x1.0p-53; }
  /// In [0, bound).
  [[nodiscard]] std::int64_t NextBelow(std::int64_t bound) {
    return static_cast<std::int64_t>(NextUniform() * static_cast<double>(bound));
  }
  /// Exponential with this mean.
  [[nodiscard]] double NextExponential(double mean) { return -mean * std::log1p(-NextUniform()); }
  /// Standard normal (Box and Muller).
  [[nodiscard]] double NextNormal() {
    const double radius = std::sqrt(-2.0 * std::log1p(-NextUniform()));
    return radius * std::cos(2.0 * std::numbers::pi * NextUniform());
  }

 private:
  std::uint64_t state_;
};

}  // namespace lora_serve::sim
