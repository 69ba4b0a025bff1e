#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kv_prefix_cache/cache_options.h"
#include "kv_prefix_cache/node.h"

namespace lora_serve {

/// The hash that the first page of a namespace's sequences continues.
[[nodiscard]] std::uint64_t ChainRoot(std::uint64_t digest_seed);

/// The hash of a page given the hash of the page before it, or ChainRoot. 64 bits, not
/// cryptographic: every token t in turn makes h = Mix(h ^ uint32(t)), and the root is Mix(seed),
/// with Mix(x) = y ^ (y >> 32), y = (x + 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9 (mod 2^64).
/// Source: the constants and the shape of SplitMix64's output function.
[[nodiscard]] std::uint64_t ChainHash(std::uint64_t parent, std::span<const TokenId> page);

/// Collects what routers want to know, while somebody listens.
///
/// Owns: the events not taken yet, and the `end_hash` of the nodes. Does not know: why pages come
/// and go. Every function does nothing, at the cost of one comparison, while nobody listens.
class EventLog {
 public:
  [[nodiscard]] bool is_enabled() const { return is_enabled_; }
  /// Switching off forgets what was not taken.
  void set_is_enabled(bool is_enabled);

  /// To be called when the edge of `node` has got other tokens or another parent. Complexity:
  /// O(tokens of the edge).
  void EdgeChanged(Node& node);
  /// Pages [first_page, first_page + num_pages) of the node's edge came to a tier or left it.
  void Add(KVEventKind kind, Tier tier, const Node& node, std::int32_t first_page,
           std::int32_t num_pages);

  [[nodiscard]] std::vector<KVEvent> Take();

 private:
  bool is_enabled_ = false;
  std::vector<KVEvent> events_;
};

}  // namespace lora_serve
