#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <span>
#include <typeinfo>
#include <vector>

#include "common/strong_id.h"

// What the benchmarks of all folders share: sizes, seeded tokens, fixtures that outlive one
// repetition, CPU time.

namespace lora_serve::bench {

using Tokens = std::vector<TokenId>;
using TokenSpan = std::span<const TokenId>;

/// True when LORA_SERVE_BENCH_SMALLEST is set: sizes that only show that a benchmark still runs.
[[nodiscard]] bool IsSmallest();

[[nodiscard]] inline std::int64_t Sized(std::int64_t full, std::int64_t smallest) {
  return IsSmallest() ? smallest : full;
}

/// The same tokens for the same seed; other seeds differ from the first page on.
[[nodiscard]] Tokens RandomTokens(std::uint64_t seed, std::int64_t num_tokens);

/// Adds `num_tokens` of these tokens.
void AppendTokens(Tokens& tokens, std::uint64_t seed, std::int64_t num_tokens);

/// A number that depends on all bits of `value`; for choices that must repeat from run to run.
[[nodiscard]] std::uint64_t Scramble(std::uint64_t value);

/// What is expensive to build and may serve all repetitions of one benchmark.
struct Fixture {
  Fixture() = default;
  virtual ~Fixture() = default;
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;
};

/// The one fixture that is alive.
struct FixtureSlot {
  const std::type_info* type = nullptr;
  std::vector<std::int64_t> sizes;
  std::unique_ptr<Fixture> fixture;
};
[[nodiscard]] FixtureSlot& CurrentFixture();

/// The fixture that the last call made, if it was the same class with the same sizes; else a new
/// F(sizes...) in its place. Only one is alive at a time: none takes memory or caches from another.
template <typename F, typename... Sizes>
[[nodiscard]] F& FixtureFor(Sizes... sizes) {
  FixtureSlot& slot = CurrentFixture();
  const std::vector<std::int64_t> wanted = {static_cast<std::int64_t>(sizes)...};
  if (slot.type == nullptr || *slot.type != typeid(F) || slot.sizes != wanted) {
    slot = {};
    slot.fixture = std::make_unique<F>(sizes...);
    slot.type = &typeid(F);
    slot.sizes = wanted;
  }
  return static_cast<F&>(*slot.fixture);
}

/// CPU time of this thread so far. Reading it costs about 0.5 us.
[[nodiscard]] double ThreadCpuSeconds();

/// CPU seconds that `call` takes; for benchmarks with work between two calls that does not count.
/// Not wall time, as Google Benchmark's own column for the others: what else the machine does then
/// only shows through the caches. Calls of a few microseconds are to be timed several at once.
template <typename Call>
[[nodiscard]] double SecondsOf(const Call& call) {
  const double start = ThreadCpuSeconds();
  call();
  return ThreadCpuSeconds() - start;
}

}  // namespace lora_serve::bench
