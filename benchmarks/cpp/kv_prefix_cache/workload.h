#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <span>
#include <typeinfo>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"

// What the benchmarks of the KV prefix cache share: seeded tokens, the shapes of forests, fixtures
// that outlive one repetition. Everything goes through the façade, so the trees are real ones.

namespace lora_serve::bench {

inline constexpr std::int32_t kPageSize = 16;
/// How many prompts are published between two calls of FinishWriteBacks.
inline constexpr std::int64_t kPromptsPerStep = 64;

using Tokens = std::vector<TokenId>;
using TokenSpan = std::span<const TokenId>;

/// True when LORA_SERVE_BENCH_SMALLEST is set: sizes that only show that a benchmark still runs.
[[nodiscard]] bool IsSmallest();

[[nodiscard]] inline std::int64_t Sized(std::int64_t full, std::int64_t smallest) {
  return IsSmallest() ? smallest : full;
}

/// The same tokens for the same seed; other seeds differ from the first page on.
[[nodiscard]] Tokens RandomTokens(std::uint64_t seed, std::int64_t num_tokens);

/// A number that depends on all bits of `value`; for choices that must repeat from run to run.
[[nodiscard]] std::uint64_t Scramble(std::uint64_t value);

[[nodiscard]] inline std::int32_t NumTokensOf(TokenSpan tokens) {
  return static_cast<std::int32_t>(tokens.size());
}

/// Options for `num_device_pages` pages of kPageSize tokens; no host tier unless pages are given.
[[nodiscard]] KVPrefixCacheOptions OptionsFor(std::int64_t num_device_pages,
                                              std::int64_t num_host_pages = 0);

/// A lease with room for all of `tokens`, of which at most `max_cached_tokens` come from the cache.
/// Fails when there is no room.
[[nodiscard]] Lease AcquireLease(KVPrefixCache& cache, const NamespaceHandle& handle,
                                 TokenSpan tokens, std::int32_t max_cached_tokens);

/// A request that takes what it can from the cache and publishes the rest. Its lease is given back
/// to the caller, who ends it.
Lease PublishPrompt(KVPrefixCache& cache, const NamespaceHandle& handle, TokenSpan tokens);

/// Starts all write-backs that the policy wants and reports their copies as done.
void FinishWriteBacks(KVPrefixCache& cache);

/// Publishes `tokens` as a path of `num_nodes` nodes, each with one child, of about equal edges.
void PublishChain(KVPrefixCache& cache, const NamespaceHandle& handle, TokenSpan tokens,
                  std::int64_t num_nodes);

/// A tree in which every edge has the same length and every inner node `fanout` children (the last
/// inner node may have fewer). Fanout >= num_nodes: all are leaves below the virtual root.
struct TreeShape {
  std::int64_t num_nodes = 0;
  std::int64_t pages_per_edge = 1;
  std::int64_t fanout = 4;
  std::uint64_t seed = 0;

  [[nodiscard]] std::int64_t num_pages() const { return num_nodes * pages_per_edge; }
};

/// With a host tier, all of it is written back there too.
void PublishTree(KVPrefixCache& cache, const NamespaceHandle& handle, const TreeShape& shape);

/// Prompts of 2,048 tokens as a service with system prompts sees them: groups share the first half,
/// subgroups another quarter, the last quarter is each prompt's own.
[[nodiscard]] std::vector<Tokens> SharedPrefixPrompts(std::int64_t num_prompts);

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
