#include "adapter_weights/number_conversion.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace lora_serve::internal {
namespace {

constexpr auto kF32 = NumberFormat::kF32;
constexpr auto kF16 = NumberFormat::kF16;
constexpr auto kBF16 = NumberFormat::kBF16;

/// What the bits of a 16-bit format mean, by the definition: fraction and exponent, in doubles.
double ValueOf(std::uint16_t bits, int num_fraction_bits) {
  const int bias = num_fraction_bits == 10 ? 15 : 127;
  const int exponent = (bits & 0x7FFF) >> num_fraction_bits;
  const int fraction = bits & ((1 << num_fraction_bits) - 1);
  const int whole = exponent == 0 ? fraction : fraction + (1 << num_fraction_bits);
  const double magnitude = std::ldexp(whole, std::max(exponent, 1) - bias - num_fraction_bits);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

template <NumberFormat format>
double ValueOf(std::uint16_t bits) {
  return ValueOf(bits, format == kF16 ? 10 : 7);
}

float FloatOf(std::uint32_t bits) { return std::bit_cast<float>(bits); }

/// The nearest of all numbers of a 16-bit format, ties to even, found by halving; infinity counts
/// as the number that would follow on the largest one.
template <NumberFormat format>
std::uint16_t NearestBySearch(std::uint32_t single_bits) {
  const double value = std::abs(static_cast<double>(FloatOf(single_bits)));
  std::uint32_t low = 0;
  std::uint32_t high = BitsOf<format>::kExponent;
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    (ValueOf<format>(static_cast<std::uint16_t>(middle)) <= value ? low : high) = middle;
  }
  const double below = value - ValueOf<format>(static_cast<std::uint16_t>(low));
  const double above = ValueOf<format>(static_cast<std::uint16_t>(high)) - value;
  const bool is_upper = above < below || (above == below && low % 2 == 1);
  return static_cast<std::uint16_t>((single_bits >> 16 & 0x8000) | (is_upper ? high : low));
}

/// Finite singles of either sign: around every number of both 16-bit formats and halfway to the
/// next one, and random ones.
std::vector<std::uint32_t> ChosenSingles() {
  std::vector<std::uint32_t> singles;
  const auto add = [&singles](std::uint32_t bits) {
    if ((bits & 0x7FFF'FFFF) < 0x7F80'0000) singles.push_back(bits);
  };
  for (std::uint32_t upper = 0; upper <= 0xFFFF; ++upper) {
    for (const std::uint32_t lower : {0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF})
      add(upper << 16 | lower);
  }
  for (std::uint32_t half = 0; half < 0x7C00; ++half) {
    const double value = ValueOf<kF16>(static_cast<std::uint16_t>(half));
    const double next = ValueOf<kF16>(static_cast<std::uint16_t>(half + 1));
    for (const double near : {value, (value + next) / 2}) {
      const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(near));
      for (const std::uint32_t neighbour : {bits - 1, bits, bits + 1}) {
        add(neighbour);
        add(neighbour | 0x8000'0000);
      }
    }
  }
  std::mt19937 random(20'240'611);
  for (int count = 0; count < 100'000; ++count) add(static_cast<std::uint32_t>(random()));
  return singles;
}

template <NumberFormat format>
bool IsFinite(std::uint16_t bits) {
  return (bits & BitsOf<format>::kExponent) != BitsOf<format>::kExponent;
}

TEST(NumberConversionTest, EveryFiniteHalfBecomesTheSingleOfItsValue) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if (!IsFinite<kF16>(half)) continue;
    const auto expected = static_cast<float>(ValueOf<kF16>(half));
    ASSERT_EQ((Convert<kF16, kF32>(half)), std::bit_cast<std::uint32_t>(expected)) << bits;
  }
}

TEST(NumberConversionTest, EveryFiniteBFloat16BecomesTheSingleOfItsValue) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const auto number = static_cast<std::uint16_t>(bits);
    if (!IsFinite<kBF16>(number)) continue;
    const auto expected = static_cast<float>(ValueOf<kBF16>(number));
    ASSERT_EQ((Convert<kBF16, kF32>(number)), std::bit_cast<std::uint32_t>(expected)) << bits;
  }
}

TEST(NumberConversionTest, SixteenBitFormatsAreConvertedByWayOfTheirSingles) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const auto number = static_cast<std::uint16_t>(bits);
    if (IsFinite<kF16>(number)) {
      const std::uint32_t single = Convert<kF16, kF32>(number);
      ASSERT_EQ((Convert<kF16, kBF16>(number)), NearestBySearch<kBF16>(single)) << bits;
      ASSERT_EQ((Convert<kF32, kF16>(single)), number) << bits;
    }
    if (IsFinite<kBF16>(number)) {
      const std::uint32_t single = Convert<kBF16, kF32>(number);
      ASSERT_EQ((Convert<kBF16, kF16>(number)), NearestBySearch<kF16>(single)) << bits;
      ASSERT_EQ((Convert<kF32, kBF16>(single)), number) << bits;
    }
  }
}

TEST(NumberConversionTest, SinglesAreRoundedToTheNearestTiesToEven) {
  for (const std::uint32_t bits : ChosenSingles()) {
    ASSERT_EQ((Convert<kF32, kBF16>(bits)), NearestBySearch<kBF16>(bits)) << FloatOf(bits);
    ASSERT_EQ((Convert<kF32, kF16>(bits)), NearestBySearch<kF16>(bits)) << FloatOf(bits);
    ASSERT_EQ((Convert<kF32, kF32>(bits)), bits);
  }
}

TEST(NumberConversionTest, WhatIsTooLargeBecomesInfinite) {
  const auto to_half = [](float value) {
    return Convert<kF32, kF16>(std::bit_cast<std::uint32_t>(value));
  };
  EXPECT_EQ(to_half(65504.0F), 0x7BFF);
  EXPECT_EQ(to_half(65519.99F), 0x7BFF);
  EXPECT_EQ(to_half(65520.0F), 0x7C00);
  EXPECT_EQ(to_half(-65520.0F), 0xFC00);
  EXPECT_EQ(to_half(std::numeric_limits<float>::max()), 0x7C00);
  EXPECT_EQ(to_half(std::numeric_limits<float>::lowest()), 0xFC00);
  EXPECT_EQ((Convert<kF32, kBF16>(0x7F7F'7FFF)), 0x7F7F);
  EXPECT_EQ((Convert<kF32, kBF16>(0x7F7F'8000)), 0x7F80);
  EXPECT_EQ((Convert<kF32, kBF16>(0xFF7F'FFFF)), 0xFF80);
}

TEST(NumberConversionTest, SubnormalHalvesAndWhatRoundsToZeroKeepTheirSigns) {
  const auto to_half = [](float value) {
    return Convert<kF32, kF16>(std::bit_cast<std::uint32_t>(value));
  };
  EXPECT_EQ(to_half(0x1p-14F), 0x0400);
  EXPECT_EQ(to_half(0x1.FFFFFEp-15F), 0x0400);
  EXPECT_EQ(to_half(0x1.FF4p-15F), 0x03FE);  // 1022.5 steps: the even one
  EXPECT_EQ(to_half(0x1p-24F), 0x0001);
  EXPECT_EQ(to_half(0x1.8p-24F), 0x0002);
  EXPECT_EQ(to_half(0x1p-25F), 0x0000);
  EXPECT_EQ(to_half(-0x1p-25F), 0x8000);
  EXPECT_EQ(to_half(0x1.000002p-25F), 0x0001);
  EXPECT_EQ(to_half(-std::numeric_limits<float>::denorm_min()), 0x8000);
  EXPECT_EQ(to_half(-0.0F), 0x8000);
}

template <NumberFormat format>
void ExpectCarriesOfNaNAndInfinityOnly() {
  const auto exponent = BitsOf<format>::kExponent;
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const auto number = static_cast<std::uint16_t>(bits);
    ASSERT_EQ(HasCarry(CarryIfNotFinite<format>(number)), (bits & exponent) == exponent) << bits;
  }
}

TEST(NumberConversionTest, EveryNaNAndInfinityIsFoundAndNothingElse) {
  ExpectCarriesOfNaNAndInfinityOnly<kF16>();
  ExpectCarriesOfNaNAndInfinityOnly<kBF16>();
  for (const std::uint32_t bits : ChosenSingles())
    ASSERT_FALSE(HasCarry(CarryIfNotFinite<kF32>(bits))) << bits;
  for (const std::uint32_t sign : {0u, 0x8000'0000u}) {
    for (const std::uint32_t payload : {0u, 1u, 0x8000u, 0x40'0000u, 0x7F'FFFFu})
      EXPECT_TRUE(HasCarry(CarryIfNotFinite<kF32>(sign | 0x7F80'0000u | payload))) << payload;
  }
}

TEST(NumberConversionTest, RunKeepsWhatWasFoundBefore) {
  const std::uint32_t stored[] = {0x3F80'0000, 0x7F7F'FFFF, 0x0000'0000};
  std::uint16_t converted[3];
  Carries<kF32, kBF16> carries;
  ConvertRun<kF32, kBF16>(reinterpret_cast<const std::byte*>(stored), 3, converted, carries);
  EXPECT_EQ(converted[0], 0x3F80);
  EXPECT_EQ(converted[1], 0x7F80);
  EXPECT_FALSE(HasCarry(carries.stored));
  EXPECT_TRUE(HasCarry(carries.converted));
  ConvertRun<kF32, kBF16>(reinterpret_cast<const std::byte*>(stored), 1, converted, carries);
  EXPECT_TRUE(HasCarry(carries.converted));
}

}  // namespace
}  // namespace lora_serve::internal
