#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "adapter_weights/number_format.h"

namespace lora_serve {

/// Rows of a stored matrix, which become one matrix of the block.
struct PlacedRows {
  /// At least 1; they follow on those of the part before.
  std::int64_t num_rows = 0;
  /// Bytes from the block's start, at any multiple.
  std::int64_t block_offset = 0;
};

/// Where a matrix lies as it is stored, row by row, and where it goes.
struct MatrixPlacement {
  /// Bytes from the buffer's start, at any multiple.
  std::int64_t buffer_offset = 0;
  /// At least 1 each.
  std::int64_t num_rows = 0;
  std::int64_t num_columns = 0;
  NumberFormat format = NumberFormat::kF32;
  /// True: the block has each part's columns as rows.
  bool is_transposed = false;
  /// Cover all rows.
  std::vector<PlacedRows> parts;
};

/// What the numbers of one matrix are.
enum class NumbersFound : std::uint8_t {
  kFinite,
  /// NaN or infinity is stored.
  kNotFinite,
  /// What is stored is finite, but too large for the block's format, so that infinity was written.
  kTooLarge,
};

/// Brings matrices from the buffer that they were read into to their places in an adapter's block,
/// each number converted to the block's format: to the nearest, ties to even.
///
/// Requires: buffer and block do not overlap, nor do the parts of the block.
/// Ensures: gives one entry a matrix. Bytes of the block outside the parts are not touched. What a
///     matrix of kNotFinite leaves in its parts means nothing.
/// Throws: InternalError where a matrix or a part does not lie in its memory, or parts do not cover
///     their matrix; nothing was written then.
/// Complexity: O(bytes), at some GB/s, in the calling thread; allocates nothing but the result.
[[nodiscard]] std::vector<NumbersFound> PlaceMatrices(std::span<const std::byte> buffer,
                                                      std::span<const MatrixPlacement> matrices,
                                                      std::span<std::byte> block,
                                                      NumberFormat block_format);

}  // namespace lora_serve
