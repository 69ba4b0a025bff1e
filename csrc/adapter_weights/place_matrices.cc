#include "adapter_weights/place_matrices.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "adapter_weights/number_conversion.h"
#include "adapter_weights/tile_transposition.h"
#include "common/check.h"

namespace lora_serve {
namespace {

using internal::Bits;
using internal::Carries;
using internal::ConvertRun;
using internal::kTileSide;

/// Numbers converted at once where nothing is transposed; they stay in the first-level cache.
constexpr std::size_t kNumbersInRun = 2048;

/// Whether `count` things of `size` bytes each fit behind `offset`; none of it can overflow.
bool Fits(std::int64_t offset, std::int64_t count, std::size_t size, std::size_t num_bytes) {
  if (!std::in_range<std::size_t>(offset) || count < 0) return false;
  const auto first = static_cast<std::size_t>(offset);
  return first <= num_bytes && static_cast<std::uint64_t>(count) <= (num_bytes - first) / size;
}

void CheckPlacement(const MatrixPlacement& matrix, std::size_t index, std::size_t buffer_bytes,
                    std::size_t block_bytes, std::size_t number_bytes) {
  LS_CHECK(matrix.num_rows >= 1 && matrix.num_columns >= 1, "matrix ", index, " is ",
           matrix.num_rows, " x ", matrix.num_columns);
  // A row first: what it takes is a number then.
  LS_CHECK(
      Fits(matrix.buffer_offset, matrix.num_columns, BytesOf(matrix.format), buffer_bytes) &&
          Fits(matrix.buffer_offset, matrix.num_rows,
               static_cast<std::size_t>(matrix.num_columns) * BytesOf(matrix.format), buffer_bytes),
      "matrix ", index, ", ", matrix.num_rows, " x ", matrix.num_columns, " at byte ",
      matrix.buffer_offset, ", is not in the buffer of ", buffer_bytes, " bytes");
  std::int64_t num_rows_left = matrix.num_rows;
  for (const PlacedRows& part : matrix.parts) {
    LS_CHECK(part.num_rows >= 1 && part.num_rows <= num_rows_left, "matrix ", index,
             " has a part of ", part.num_rows, " rows, ", num_rows_left, " are left");
    LS_CHECK(Fits(part.block_offset, matrix.num_columns, number_bytes, block_bytes) &&
                 Fits(part.block_offset, part.num_rows,
                      static_cast<std::size_t>(matrix.num_columns) * number_bytes, block_bytes),
             "matrix ", index, " has a part of ", part.num_rows, " x ", matrix.num_columns,
             " at byte ", part.block_offset, ", which is not in the block of ", block_bytes,
             " bytes");
    num_rows_left -= part.num_rows;
  }
  LS_CHECK(num_rows_left == 0, "matrix ", index, " has ", num_rows_left, " rows in no part");
}

/// One matrix on its way from one format to another.
template <NumberFormat source, NumberFormat target>
class Placer {
 public:
  void Copy(const std::byte* stored, std::size_t count, std::byte* placed) {
    for (std::size_t first = 0; first < count; first += kNumbersInRun) {
      const std::size_t num_numbers = std::min(count - first, kNumbersInRun);
      Bits<target> run[kNumbersInRun];
      ConvertRun<source, target>(stored + first * kSourceBytes, num_numbers, run, carries_);
      std::memcpy(placed + first * kTargetBytes, run, num_numbers * kTargetBytes);
    }
  }

  void Transpose(const std::byte* stored, std::size_t num_rows, std::size_t num_columns,
                 std::byte* placed) {
    for (std::size_t column = 0; column < num_columns; column += kTileSide) {
      for (std::size_t row = 0; row < num_rows; row += kTileSide) {
        TransposeTile(stored + (row * num_columns + column) * kSourceBytes, num_columns,
                      placed + (column * num_rows + row) * kTargetBytes, num_rows,
                      std::min(num_rows - row, kTileSide),
                      std::min(num_columns - column, kTileSide));
      }
    }
  }

  [[nodiscard]] NumbersFound Found() const {
    if (internal::HasCarry(carries_.stored)) return NumbersFound::kNotFinite;
    if (internal::HasCarry(carries_.converted)) return NumbersFound::kTooLarge;
    return NumbersFound::kFinite;
  }

 private:
  static constexpr std::size_t kSourceBytes = BytesOf(source);
  static constexpr std::size_t kTargetBytes = BytesOf(target);

  /// `stored_stride` and `placed_stride` are numbers from one row to the next.
  void TransposeTile(const std::byte* stored, std::size_t stored_stride, std::byte* placed,
                     std::size_t placed_stride, std::size_t num_rows, std::size_t num_columns) {
    for (std::size_t row = 0; row < num_rows; ++row) {
      ConvertRun<source, target>(stored + row * stored_stride * kSourceBytes, num_columns,
                                 tile_ + row * kTileSide, carries_);
    }
    internal::TransposeTile(tile_, num_rows, num_columns, transposed_);
    for (std::size_t column = 0; column < num_columns; ++column) {
      const Bits<target>* from = transposed_ + column * kTileSide;
      std::byte* to = placed + column * placed_stride * kTargetBytes;
      if (num_rows == kTileSide) {  // A copy of known size is a few instructions, and most are it.
        std::memcpy(to, from, kTileSide * kTargetBytes);
      } else {
        std::memcpy(to, from, num_rows * kTargetBytes);
      }
    }
  }

  Carries<source, target> carries_;
  // Where a tile is not full, what is left of the one before is transposed with it, and not copied.
  alignas(64) Bits<target> tile_[kTileSide * kTileSide] = {};
  alignas(64) Bits<target> transposed_[kTileSide * kTileSide] = {};
};

template <NumberFormat source, NumberFormat target>
NumbersFound Place(const std::byte* buffer, const MatrixPlacement& matrix, std::byte* block) {
  Placer<source, target> placer;
  const auto num_columns = static_cast<std::size_t>(matrix.num_columns);
  const std::byte* stored = buffer + matrix.buffer_offset;
  for (const PlacedRows& part : matrix.parts) {
    const auto num_rows = static_cast<std::size_t>(part.num_rows);
    if (matrix.is_transposed) {
      placer.Transpose(stored, num_rows, num_columns, block + part.block_offset);
    } else {
      placer.Copy(stored, num_rows * num_columns, block + part.block_offset);
    }
    stored += num_rows * num_columns * BytesOf(source);
  }
  return placer.Found();
}

template <NumberFormat source>
NumbersFound PlaceAs(NumberFormat target, const std::byte* buffer, const MatrixPlacement& matrix,
                     std::byte* block) {
  switch (target) {
    case NumberFormat::kF32:
      return Place<source, NumberFormat::kF32>(buffer, matrix, block);
    case NumberFormat::kF16:
      return Place<source, NumberFormat::kF16>(buffer, matrix, block);
    case NumberFormat::kBF16:
      break;
  }
  return Place<source, NumberFormat::kBF16>(buffer, matrix, block);
}

NumbersFound PlaceMatrix(const std::byte* buffer, const MatrixPlacement& matrix, std::byte* block,
                         NumberFormat block_format) {
  switch (matrix.format) {
    case NumberFormat::kF32:
      return PlaceAs<NumberFormat::kF32>(block_format, buffer, matrix, block);
    case NumberFormat::kF16:
      return PlaceAs<NumberFormat::kF16>(block_format, buffer, matrix, block);
    case NumberFormat::kBF16:
      break;
  }
  return PlaceAs<NumberFormat::kBF16>(block_format, buffer, matrix, block);
}

}  // namespace

std::vector<NumbersFound> PlaceMatrices(std::span<const std::byte> buffer,
                                        std::span<const MatrixPlacement> matrices,
                                        std::span<std::byte> block, NumberFormat block_format) {
  for (std::size_t index = 0; index < matrices.size(); ++index) {
    CheckPlacement(matrices[index], index, buffer.size(), block.size(), BytesOf(block_format));
  }
  std::vector<NumbersFound> found;
  found.reserve(matrices.size());
  for (const MatrixPlacement& matrix : matrices) {
    found.push_back(PlaceMatrix(buffer.data(), matrix, block.data(), block_format));
  }
  return found;
}

}  // namespace lora_serve
