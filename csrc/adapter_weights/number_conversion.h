#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "adapter_weights/number_format.h"

/// Conversion between number formats, bit by bit: no branch and no library call, so that compilers
/// make vector instructions of loops over it, and the machine's own half type is not needed.

namespace lora_serve::internal {

static_assert(std::endian::native == std::endian::little, "weights files are little-endian");
static_assert(std::numeric_limits<float>::is_iec559);

template <NumberFormat format>
using Bits = BitsOf<format>::Type;

/// What is exact: any number as a single.
template <NumberFormat source>
[[nodiscard]] constexpr std::uint32_t ToF32(Bits<source> bits) {
  if constexpr (source == NumberFormat::kF32) {
    return bits;
  } else if constexpr (source == NumberFormat::kBF16) {
    return std::uint32_t{bits} << 16;
  } else {
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    const std::uint32_t magnitude = bits & 0x7FFFu;
    // The exponent's bias is 127 instead of 15, the fraction has 13 more bits.
    const std::uint32_t normal = (magnitude << 13) + ((127u - 15u) << 23);
    // Without exponent it counts steps of 2^-24.
    const auto subnormal =
        std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24F);
    return sign | (magnitude < 0x0400u ? subnormal : normal);
  }
}

/// Rounds a single to nearest, ties to even; what is too large becomes infinite.
template <NumberFormat target>
[[nodiscard]] constexpr Bits<target> FromF32(std::uint32_t bits) {
  if constexpr (target == NumberFormat::kF32) {
    return bits;
  } else if constexpr (target == NumberFormat::kBF16) {
    // Half of the last place that stays, or just less where that place is even.
    return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  } else {
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFF'FFFFu;
    // As for bfloat16, but with another bias; beyond the largest half is infinity.
    const std::uint32_t rebased = magnitude - ((127u - 15u) << 23);
    const std::uint32_t normal =
        std::min((rebased + 0x0FFFu + ((rebased >> 13) & 1u)) >> 13, std::uint32_t{0x7C00});
    // The last place of 0.5 is 2^-24, the step of subnormal halves: the addition rounds to it.
    const auto subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) -
                           std::bit_cast<std::uint32_t>(0.5F);
    constexpr std::uint32_t kSmallestNormal = (127u - 14u) << 23;
    return static_cast<std::uint16_t>(sign | (magnitude < kSmallestNormal ? subnormal : normal));
  }
}

/// The nearest number of another format, ties to even; what is too large becomes infinite.
/// Requires: a finite number. Of others the result means nothing.
template <NumberFormat source, NumberFormat target>
[[nodiscard]] constexpr Bits<target> Convert(Bits<source> bits) {
  if constexpr (source == target) {
    return bits;
  } else {
    return FromF32<target>(ToF32<source>(bits));
  }
}

/// Its uppermost bit is set exactly if the number is NaN or infinite. Their exponents have all bits
/// set, so that one more carries into the sign's place; of many numbers the results are or-ed.
template <NumberFormat format>
[[nodiscard]] constexpr Bits<format> CarryIfNotFinite(Bits<format> bits) {
  using Format = BitsOf<format>;
  return static_cast<Bits<format>>((bits & Format::kExponent) + Format::kLowestExponentBit);
}

template <typename BitsType>
[[nodiscard]] constexpr bool HasCarry(BitsType carries) {
  return (carries >> (8 * sizeof(BitsType) - 1)) != 0;
}

/// Carries (see above) of all numbers of a matrix so far: as stored, and as converted.
template <NumberFormat source, NumberFormat target>
struct Carries {
  Bits<source> stored = 0;
  Bits<target> converted = 0;
};

/// Converts `count` numbers that lie one after another, at any address.
template <NumberFormat source, NumberFormat target>
void ConvertRun(const std::byte* stored, std::size_t count, Bits<target>* converted,
                Carries<source, target>& carries) {
  Carries<source, target> of_run;
  for (std::size_t index = 0; index < count; ++index) {
    Bits<source> bits;
    std::memcpy(&bits, stored + index * sizeof(bits), sizeof(bits));
    of_run.stored |= CarryIfNotFinite<source>(bits);
    const Bits<target> result = Convert<source, target>(bits);
    if constexpr (source != target) of_run.converted |= CarryIfNotFinite<target>(result);
    converted[index] = result;
  }
  carries.stored |= of_run.stored;
  carries.converted |= of_run.converted;
}

}  // namespace lora_serve::internal
