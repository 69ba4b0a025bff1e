#pragma once

#include <cstdint>

namespace lora_serve {

/// A prefill about to compute its next chunk.
struct PrefillProgress {
  std::int32_t page_size = 1;
  /// Tokens whose state is known, at least 0.
  std::int32_t num_computed_tokens = 0;
  /// Tokens to be computed in the end (the prompt; after a preemption, the output so far too).
  std::int32_t num_tokens = 0;
  /// At most this many in the next chunk, at least 1.
  std::int32_t max_chunk_tokens = 0;
  /// Lease::branching_tokens().
  std::int32_t branching_tokens = 0;
};

struct PrefillChunk {
  /// The chunk is [num_computed_tokens, end_token).
  std::int32_t end_token = 0;
  /// Reserve a snapshot for `end_token` (KVPrefixCache::ReserveSnapshot).
  bool takes_snapshot = false;
};

/// Where a model with recurrent state shall stop next, and whether a snapshot is worth a slot
/// there. Unlike KV, the state of a boundary exists only at the moment when exactly that many
/// tokens are computed, so the chunk must end there. In this order:
///  - at a boundary where other sequences left this path before: the next one that does will
///    resume there;
///  - at the last whole page of the prompt (less its last token, whose logits are always computed):
///    the same prompt, and the next turn of the conversation, resume there;
///  - at the end of a long chunk, so that a preempted prefill does not start over.
/// How many of them stay is KVPrefixCacheOptions::max_snapshots_per_lease, and then eviction.
///
/// Requires: num_computed_tokens < num_tokens.
[[nodiscard]] PrefillChunk PlanPrefillChunk(const PrefillProgress& progress);

}  // namespace lora_serve
