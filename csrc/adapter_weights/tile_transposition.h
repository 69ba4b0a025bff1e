#pragma once

#include <cstddef>
#include <cstring>

/// Transposition of a tile of numbers that fits the first-level cache, for any kind of number.

namespace lora_serve::internal {

/// Rows and columns of a tile: of 2 bytes each, a cache line is read of a row and written of a
/// column.
inline constexpr std::size_t kTileSide = 32;
/// Rows and columns of the squares that a tile is cut into: a row of 2 bytes each is a register.
inline constexpr std::size_t kSquareSide = 8;

/// Brings the two halves of a square together, one number of either in turn.
template <typename Number>
void Interleave(const Number* source, Number* target) {
  constexpr std::size_t kHalf = kSquareSide * kSquareSide / 2;
  for (std::size_t index = 0; index < kHalf; ++index) {
    target[2 * index] = source[index];
    target[2 * index + 1] = source[index + kHalf];
  }
}

/// Transposes 8 x 8 numbers. Interleaving moves the uppermost bit of a number's position (row, then
/// column, three bits each) to its lower end; after three times, rows and columns have changed
/// places. Compilers make of it what one would write with vector registers: two loops over numbers
/// take nearly twice as long.
template <typename Number>
void TransposeSquare(const Number* source, Number* target) {
  Number first[kSquareSide * kSquareSide];
  Number second[kSquareSide * kSquareSide];
  for (std::size_t row = 0; row < kSquareSide; ++row) {
    std::memcpy(first + row * kSquareSide, source + row * kTileSide, kSquareSide * sizeof(Number));
  }
  Interleave(first, second);
  Interleave(second, first);
  Interleave(first, second);
  for (std::size_t row = 0; row < kSquareSide; ++row) {
    std::memcpy(target + row * kTileSide, second + row * kSquareSide, kSquareSide * sizeof(Number));
  }
}

/// Transposes the upper left corner of a tile [kTileSide, kTileSide], whole squares of it.
template <typename Number>
void TransposeTile(const Number* source, std::size_t num_rows, std::size_t num_columns,
                   Number* target) {
  for (std::size_t row = 0; row < num_rows; row += kSquareSide) {
    for (std::size_t column = 0; column < num_columns; column += kSquareSide) {
      TransposeSquare(source + row * kTileSide + column, target + column * kTileSide + row);
    }
  }
}

}  // namespace lora_serve::internal
