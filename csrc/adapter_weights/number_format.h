#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_serve {

/// How a weights file, or a model, stores a number: IEEE single, IEEE half, or the upper half of
/// a single.
enum class NumberFormat : std::uint8_t { kF32, kF16, kBF16 };

namespace internal {

/// The bits of one format: sign, exponent, fraction, from the uppermost on.
template <NumberFormat format>
struct BitsOf;

template <>
struct BitsOf<NumberFormat::kF32> {
  using Type = std::uint32_t;
  static constexpr Type kExponent = 0x7F80'0000;
  static constexpr Type kLowestExponentBit = 0x0080'0000;
};

template <>
struct BitsOf<NumberFormat::kF16> {
  using Type = std::uint16_t;
  static constexpr Type kExponent = 0x7C00;
  static constexpr Type kLowestExponentBit = 0x0400;
};

template <>
struct BitsOf<NumberFormat::kBF16> {
  using Type = std::uint16_t;
  static constexpr Type kExponent = 0x7F80;
  static constexpr Type kLowestExponentBit = 0x0080;
};

}  // namespace internal

[[nodiscard]] constexpr std::size_t BytesOf(NumberFormat format) {
  return format == NumberFormat::kF32 ? 4 : 2;
}

}  // namespace lora_serve
