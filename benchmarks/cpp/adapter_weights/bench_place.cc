#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "adapter_weights/place_matrices.h"
#include "common/check.h"
#include "support/fixture.h"

// Matrices of an adapter's shapes from the buffer of a task to a block in bfloat16, one core.

namespace lora_serve::bench {
namespace {

constexpr std::size_t kTaskBytes = std::size_t{4} << 20;

/// A task of equal matrices: what was just read lies in the cache, the block mostly does not.
struct Task : Fixture {
  Task(std::int64_t num_rows, std::int64_t num_columns, std::int64_t source,
       std::int64_t transposed)
      : format(static_cast<NumberFormat>(source)) {
    const auto count = static_cast<std::size_t>(num_rows * num_columns);
    const std::size_t matrix_bytes = count * BytesOf(format);
    const std::size_t num_matrices = IsSmallest() ? 1 : kTaskBytes / matrix_bytes;
    stored.resize(num_matrices * matrix_bytes);
    for (std::size_t index = 0; index < stored.size(); ++index) {
      // Bytes of at most 0x3F: all numbers are finite.
      stored[index] = static_cast<std::byte>(Scramble(index) & 0x3F);
    }
    for (std::size_t index = 0; index < num_matrices; ++index) {
      matrices.push_back({.buffer_offset = static_cast<std::int64_t>(index * matrix_bytes),
                          .num_rows = num_rows,
                          .num_columns = num_columns,
                          .format = format,
                          .is_transposed = transposed != 0,
                          .parts = {{num_rows, static_cast<std::int64_t>(index * count * 2)}}});
    }
    task_bytes = num_matrices * count * 2;
    block.resize(task_bytes * static_cast<std::size_t>(Sized(16, 1)));
  }

  NumberFormat format;
  std::vector<std::byte> stored;
  std::vector<MatrixPlacement> matrices;
  std::size_t task_bytes = 0;
  std::vector<std::byte> block;  // of several such tasks
};

void Place(benchmark::State& state) {
  auto& task = FixtureFor<Task>(state.range(0), state.range(1), state.range(2), state.range(3));
  std::size_t offset = 0;
  for (auto _ : state) {
    const std::span<std::byte> block(task.block.data() + offset, task.task_bytes);
    const auto found = PlaceMatrices(task.stored, task.matrices, block, NumberFormat::kBF16);
    LS_CHECK(found.front() == NumbersFound::kFinite);
    offset = (offset + task.task_bytes) % task.block.size();
  }
  state.counters["stored_bytes"] = static_cast<double>(task.stored.size());
}

constexpr auto kF32 = static_cast<std::int64_t>(NumberFormat::kF32);
constexpr auto kBF16 = static_cast<std::int64_t>(NumberFormat::kBF16);

BENCHMARK(Place)
    ->Name("place")
    ->ArgNames({"rows", "columns", "format", "transposed"})
    ->ArgsProduct({{4096}, {64}, {kF32, kBF16}, {1}})
    ->ArgsProduct({{12288}, {8, 16}, {kF32, kBF16}, {1}})
    ->ArgsProduct({{64}, {4096}, {kF32, kBF16}, {0, 1}});

}  // namespace
}  // namespace lora_serve::bench
