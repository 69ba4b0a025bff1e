#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "common/strong_id.h"

namespace lora_serve::sim {

/// Virtual time in microseconds since the start of the run.
using TimeUs = std::int64_t;
inline constexpr TimeUs kNever = std::numeric_limits<TimeUs>::max();

/// What a client sends, and what only the simulator knows of it.
struct SimRequest {
  /// Counts up from 0 in order of arrival.
  std::int64_t id = 0;
  /// 0 = the base model; adapters count from 1.
  std::int64_t adapter_id = 0;
  /// Its adapter is one of the rarest tenth at its arrival.
  bool is_rare = false;
  TimeUs arrival_us = 0;
  std::vector<TokenId> prompt_token_ids;
  /// Output tokens that it asks for.
  std::int32_t max_tokens = 1;
  /// Output tokens after which it ends: max_tokens, or earlier by a stop token.
  std::int32_t num_output_tokens = 1;
};

}  // namespace lora_serve::sim
