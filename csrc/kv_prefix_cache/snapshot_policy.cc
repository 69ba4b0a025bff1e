#include "kv_prefix_cache/snapshot_policy.h"

#include <algorithm>

#include "common/check.h"

namespace lora_serve {

PrefillChunk PlanPrefillChunk(const PrefillProgress& progress) {
  LS_CHECK(progress.page_size >= 1 && progress.max_chunk_tokens >= 1 &&
               progress.num_computed_tokens < progress.num_tokens,
           "no chunk of up to ", progress.max_chunk_tokens, " tokens follows ",
           progress.num_computed_tokens, " of ", progress.num_tokens, " computed tokens");
  const std::int32_t page_size = progress.page_size;
  const std::int32_t begin = progress.num_computed_tokens;
  const std::int32_t end = begin + std::min(progress.max_chunk_tokens, progress.num_tokens - begin);
  const std::int32_t last_whole_page = (progress.num_tokens - 1) / page_size * page_size;
  const auto is_ahead = [begin, end](std::int32_t token) { return begin < token && token <= end; };
  if (progress.branching_tokens < last_whole_page && is_ahead(progress.branching_tokens)) {
    return {.end_token = progress.branching_tokens, .takes_snapshot = true};
  }
  if (is_ahead(last_whole_page)) return {.end_token = last_whole_page, .takes_snapshot = true};
  const std::int32_t chunk_end = end / page_size * page_size;
  if (end < progress.num_tokens && is_ahead(chunk_end)) {
    return {.end_token = chunk_end, .takes_snapshot = true};
  }
  return {.end_token = end, .takes_snapshot = false};
}

}  // namespace lora_serve
