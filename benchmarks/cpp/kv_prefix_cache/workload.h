#pragma once

#include <cstdint>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "support/fixture.h"

// What the benchmarks of the KV prefix cache share: the shapes of forests. Everything goes through
// the façade, so the trees are real ones.

namespace lora_serve::bench {

inline constexpr std::int32_t kPageSize = 16;
/// How many prompts are published between two calls of FinishWriteBacks.
inline constexpr std::int64_t kPromptsPerStep = 64;

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

}  // namespace lora_serve::bench
