#include "adapter_weights/place_matrices.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "adapter_weights/number_conversion.h"
#include "common/errors.h"

namespace lora_serve {
namespace {

constexpr auto kF32 = NumberFormat::kF32;
constexpr auto kF16 = NumberFormat::kF16;
constexpr auto kBF16 = NumberFormat::kBF16;
constexpr NumberFormat kFormats[] = {kF32, kF16, kBF16};
constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();

using Bytes = std::vector<std::byte>;
using Shape = std::pair<std::int64_t, std::int64_t>;

std::uint32_t Read(const Bytes& bytes, std::size_t at, NumberFormat format) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, bytes.data() + at, BytesOf(format));
  return bits;
}

void Write(Bytes& bytes, std::size_t at, NumberFormat format, std::uint32_t bits) {
  std::memcpy(bytes.data() + at, &bits, BytesOf(format));
}

template <NumberFormat source>
std::uint32_t ConvertFrom(std::uint32_t bits, NumberFormat target) {
  const auto stored = static_cast<internal::Bits<source>>(bits);
  if (target == kF32) return internal::Convert<source, kF32>(stored);
  if (target == kF16) return internal::Convert<source, kF16>(stored);
  return internal::Convert<source, kBF16>(stored);
}

std::uint32_t ConvertOne(std::uint32_t bits, NumberFormat source, NumberFormat target) {
  if (source == kF32) return ConvertFrom<kF32>(bits, target);
  if (source == kF16) return ConvertFrom<kF16>(bits, target);
  return ConvertFrom<kBF16>(bits, target);
}

/// Different small numbers of either sign.
std::uint32_t SomeNumber(std::size_t index, NumberFormat format) {
  const auto mixed = static_cast<std::uint32_t>(index * 2'654'435'761u);
  const std::uint32_t single = (mixed & 0x8000'0000) | (0x3C00'0000 + (mixed >> 4 & 0x01FF'FFFF));
  return ConvertOne(single, kF32, format);
}

Bytes SomeNumbers(std::int64_t count, NumberFormat format, std::size_t offset = 0) {
  Bytes bytes(offset + static_cast<std::size_t>(count) * BytesOf(format));
  for (std::size_t index = 0; index < static_cast<std::size_t>(count); ++index)
    Write(bytes, offset + index * BytesOf(format), format, SomeNumber(index, format));
  return bytes;
}

/// The block by the definition, one number after another; bytes that nobody writes are 0xAA.
Bytes PlacedOneByOne(const Bytes& buffer, const MatrixPlacement& matrix, std::size_t block_bytes,
                     NumberFormat target) {
  Bytes block(block_bytes, std::byte{0xAA});
  std::int64_t first_row = 0;
  for (const PlacedRows& part : matrix.parts) {
    for (std::int64_t row = 0; row < part.num_rows; ++row) {
      for (std::int64_t column = 0; column < matrix.num_columns; ++column) {
        const auto from =
            static_cast<std::size_t>((first_row + row) * matrix.num_columns + column) *
                BytesOf(matrix.format) +
            static_cast<std::size_t>(matrix.buffer_offset);
        const std::int64_t to =
            matrix.is_transposed ? column * part.num_rows + row : row * matrix.num_columns + column;
        const std::uint32_t bits = Read(buffer, from, matrix.format);
        Write(block,
              static_cast<std::size_t>(part.block_offset) +
                  static_cast<std::size_t>(to) * BytesOf(target),
              target, ConvertOne(bits, matrix.format, target));
      }
    }
    first_row += part.num_rows;
  }
  return block;
}

class PlaceMatricesTest : public testing::TestWithParam<Shape> {};

TEST_P(PlaceMatricesTest, EveryNumberIsConvertedAndAtItsPlaceAndNothingElseIsWritten) {
  const auto [num_rows, num_columns] = GetParam();
  const std::int64_t count = num_rows * num_columns;
  for (const NumberFormat source : kFormats) {
    for (const NumberFormat target : kFormats) {
      for (const bool is_transposed : {false, true}) {
        for (const std::int64_t offset : {0, 3}) {  // also where no number is aligned
          const Bytes buffer = SomeNumbers(count, source, static_cast<std::size_t>(offset));
          const std::size_t block_bytes = static_cast<std::size_t>(count) * BytesOf(target) + 64;
          const MatrixPlacement matrix = {.buffer_offset = offset,
                                          .num_rows = num_rows,
                                          .num_columns = num_columns,
                                          .format = source,
                                          .is_transposed = is_transposed,
                                          .parts = {{num_rows, 16 + offset}}};
          Bytes block(block_bytes, std::byte{0xAA});
          const auto found = PlaceMatrices(buffer, {&matrix, 1}, block, target);
          ASSERT_EQ(found, std::vector{NumbersFound::kFinite});
          ASSERT_EQ(block, PlacedOneByOne(buffer, matrix, block_bytes, target))
              << "format " << static_cast<int>(source) << " to " << static_cast<int>(target)
              << (is_transposed ? ", transposed" : "") << ", offset " << offset;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PlaceMatricesTest,
                         testing::Values(Shape{1, 1}, Shape{1, 100}, Shape{100, 1}, Shape{7, 9},
                                         Shape{8, 8}, Shape{31, 33}, Shape{32, 32}, Shape{33, 31},
                                         Shape{64, 5}, Shape{5, 64}, Shape{63, 65}, Shape{1, 2049},
                                         Shape{129, 16}, Shape{3, 1366}));

TEST(PlaceMatricesTest, PartsAreMatricesOfTheirOwn) {
  for (const bool is_transposed : {false, true}) {
    const MatrixPlacement matrix = {.num_rows = 75,
                                    .num_columns = 6,
                                    .format = kF32,
                                    .is_transposed = is_transposed,
                                    .parts = {{33, 600}, {1, 32}, {41, 64}}};
    const Bytes buffer = SomeNumbers(75 * 6, kF32);
    Bytes block(1024, std::byte{0xAA});
    EXPECT_EQ(PlaceMatrices(buffer, {&matrix, 1}, block, kBF16).front(), NumbersFound::kFinite);
    EXPECT_EQ(block, PlacedOneByOne(buffer, matrix, 1024, kBF16));
  }
}

TEST(PlaceMatricesTest, EachMatrixHasItsOwnFormatAndAnswer) {
  Bytes buffer(64);
  Write(buffer, 0, kF32, 0x7F7F'FFFF);
  Write(buffer, 16, kF16, 0x3C00);
  Write(buffer, 32, kBF16, 0xFF80);
  Write(buffer, 48, kF32, 0x3F80'0000);
  const std::vector<MatrixPlacement> matrices = {
      {.buffer_offset = 0, .num_rows = 1, .num_columns = 1, .format = kF32, .parts = {{1, 0}}},
      {.buffer_offset = 16, .num_rows = 1, .num_columns = 1, .format = kF16, .parts = {{1, 16}}},
      {.buffer_offset = 32, .num_rows = 1, .num_columns = 1, .format = kBF16, .parts = {{1, 32}}},
      {.buffer_offset = 48, .num_rows = 1, .num_columns = 1, .format = kF32, .parts = {{1, 48}}}};
  Bytes block(64);
  EXPECT_EQ(PlaceMatrices(buffer, matrices, block, kBF16),
            (std::vector{NumbersFound::kTooLarge, NumbersFound::kFinite, NumbersFound::kNotFinite,
                         NumbersFound::kFinite}));
  EXPECT_EQ(Read(block, 0, kBF16), 0x7F80u);
  EXPECT_EQ(Read(block, 16, kBF16), 0x3F80u);
  EXPECT_EQ(Read(block, 48, kBF16), 0x3F80u);
  EXPECT_TRUE(PlaceMatrices(buffer, {}, block, kBF16).empty());
}

/// The largest numbers, and those that are none, at every position of a matrix in two parts that
/// has full tiles and squares, and such that are not.
TEST(PlaceMatricesTest, WhatIsNotFiniteIsFoundWhereverItIs) {
  constexpr std::int64_t kRows = 43;
  constexpr std::int64_t kColumns = 35;
  const auto found_with = [](NumberFormat source, NumberFormat target, bool is_transposed,
                             std::size_t position, std::uint32_t bits) {
    Bytes buffer = SomeNumbers(kRows * kColumns, source);
    Write(buffer, position * BytesOf(source), source, bits);
    const std::int64_t upper_bytes = 40 * kColumns * static_cast<std::int64_t>(BytesOf(target));
    const MatrixPlacement matrix = {.num_rows = kRows,
                                    .num_columns = kColumns,
                                    .format = source,
                                    .is_transposed = is_transposed,
                                    .parts = {{40, 0}, {3, upper_bytes}}};
    Bytes block(static_cast<std::size_t>(kRows * kColumns) * BytesOf(target));
    return PlaceMatrices(buffer, {&matrix, 1}, block, target).front();
  };
  for (const bool is_transposed : {false, true}) {
    for (std::size_t position = 0; position < kRows * kColumns; ++position) {
      const auto found = [&](NumberFormat source, NumberFormat target, std::uint32_t bits) {
        return found_with(source, target, is_transposed, position, bits);
      };
      // All bits set: to round it up wraps around to a small number.
      ASSERT_EQ(found(kF32, kBF16, 0xFFFF'FFFF), NumbersFound::kNotFinite) << position;
      ASSERT_EQ(found(kF32, kF16, 0x7F80'0001), NumbersFound::kNotFinite) << position;
      ASSERT_EQ(found(kF16, kF32, 0xFC00), NumbersFound::kNotFinite) << position;
      ASSERT_EQ(found(kBF16, kBF16, 0x7FFF), NumbersFound::kNotFinite) << position;
      ASSERT_EQ(found(kF32, kF16, 0xC780'0000), NumbersFound::kTooLarge) << position;
      ASSERT_EQ(found(kBF16, kF16, 0x7F7F), NumbersFound::kTooLarge) << position;
      ASSERT_EQ(found(kF32, kBF16, 0x7F7F'8000), NumbersFound::kTooLarge) << position;
      ASSERT_EQ(found(kF32, kBF16, 0x7F7F'7FFF), NumbersFound::kFinite) << position;
      ASSERT_EQ(found(kF32, kF32, 0xFF7F'FFFF), NumbersFound::kFinite) << position;
      ASSERT_EQ(found(kF16, kBF16, 0xFBFF), NumbersFound::kFinite) << position;
    }
  }
}

TEST(PlaceMatricesTest, NaNWinsOverWhatIsTooLarge) {
  Bytes buffer(8);
  Write(buffer, 0, kF32, 0x7F7F'FFFF);
  Write(buffer, 4, kF32, 0x7FC0'0000);
  const MatrixPlacement matrix = {
      .num_rows = 2, .num_columns = 1, .format = kF32, .parts = {{1, 0}, {1, 2}}};
  Bytes block(4);
  EXPECT_EQ(PlaceMatrices(buffer, {&matrix, 1}, block, kBF16).front(), NumbersFound::kNotFinite);
}

struct BadPlacement {
  std::string name;
  MatrixPlacement matrix;
  std::string message_has;
};

void PrintTo(const BadPlacement& bad, std::ostream* os) { *os << bad.name; }

class BadPlacementTest : public testing::TestWithParam<BadPlacement> {};

/// Buffer: 4 x 6 singles behind 8 bytes. Block: as many halves behind 16.
TEST_P(BadPlacementTest, IsRefusedBeforeAnythingIsWritten) {
  const MatrixPlacement good = {
      .buffer_offset = 8, .num_rows = 4, .num_columns = 6, .format = kF32, .parts = {{4, 16}}};
  const std::vector<MatrixPlacement> matrices = {good, GetParam().matrix};
  const Bytes buffer = SomeNumbers(24, kF32, 8);
  Bytes block(16 + 48, std::byte{0xAA});
  try {
    static_cast<void>(PlaceMatrices(buffer, matrices, block, kF16));
    ADD_FAILURE() << "accepted";
  } catch (const InternalError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("matrix 1"), std::string::npos) << message;
    EXPECT_NE(message.find(GetParam().message_has), std::string::npos) << message;
  }
  EXPECT_EQ(block, Bytes(block.size(), std::byte{0xAA}));
  EXPECT_EQ(PlaceMatrices(buffer, {&good, 1}, block, kF16).front(), NumbersFound::kFinite);
}

MatrixPlacement Bad(std::int64_t buffer_offset, std::int64_t num_rows, std::int64_t num_columns,
                    std::vector<PlacedRows> parts) {
  return {.buffer_offset = buffer_offset,
          .num_rows = num_rows,
          .num_columns = num_columns,
          .format = kF32,
          .parts = std::move(parts)};
}

INSTANTIATE_TEST_SUITE_P(
    Bounds, BadPlacementTest,
    testing::Values(
        BadPlacement{"no_rows", Bad(8, 0, 6, {}), "is 0 x 6"},
        BadPlacement{"no_columns", Bad(8, 4, 0, {{4, 16}}), "is 4 x 0"},
        BadPlacement{"negative_rows", Bad(8, -4, -6, {{-4, 16}}), "is -4 x -6"},
        BadPlacement{"before_the_buffer", Bad(-4, 4, 6, {{4, 16}}), "not in the buffer of 104"},
        BadPlacement{"at_the_buffers_end", Bad(104, 1, 1, {{1, 16}}), "not in the buffer"},
        BadPlacement{"far_behind", Bad(kLargest, 4, 6, {{4, 16}}), "not in the buffer"},
        BadPlacement{"one_byte_too_far", Bad(9, 4, 6, {{4, 16}}), "not in the buffer"},
        BadPlacement{"row_too_many", Bad(8, 5, 6, {{5, 16}}), "5 x 6 at byte 8, is not in"},
        BadPlacement{"columns_overflow", Bad(8, 1, kLargest, {{1, 16}}), "not in the buffer"},
        BadPlacement{"rows_overflow", Bad(8, kLargest, 6, {{kLargest, 16}}), "not in the buffer"},
        BadPlacement{"product_wraps", Bad(8, std::int64_t{1} << 62, 4, {}), "not in the buffer"},
        BadPlacement{"no_part", Bad(8, 4, 6, {}), "has 4 rows in no part"},
        BadPlacement{"rows_in_no_part", Bad(8, 4, 6, {{1, 16}, {2, 28}}), "has 1 rows in no part"},
        BadPlacement{"rows_in_two", Bad(8, 4, 6, {{2, 16}, {3, 40}}), "part of 3 rows, 2 are left"},
        BadPlacement{"part_without_rows", Bad(8, 4, 6, {{0, 16}, {4, 16}}), "part of 0 rows"},
        BadPlacement{"negative_part", Bad(8, 4, 6, {{5, 16}, {-1, 16}}), "part of 5 rows"},
        BadPlacement{"before_the_block", Bad(8, 4, 6, {{4, -2}}), "not in the block of 64"},
        BadPlacement{"behind_the_block", Bad(8, 4, 6, {{4, 17}}), "4 x 6 at byte 17, which is not"},
        BadPlacement{"far_behind_it", Bad(8, 4, 6, {{4, kLargest}}), "not in the block"}),
    [](const auto& param_info) { return param_info.param.name; });

}  // namespace
}  // namespace lora_serve
