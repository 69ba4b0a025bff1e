#pragma once

#include <cstdint>
#include <vector>

#include "common/strong_id.h"
#include "scheduler_sim/random_stream.h"

namespace lora_serve::sim {

inline constexpr std::uint64_t kVocabularySize = 151'936;

/// Adds `num_tokens` tokens that depend on `seed` only; other seeds differ from the first tokens
/// on.
inline void AppendTokens(std::vector<TokenId>& tokens, std::uint64_t seed,
                         std::int64_t num_tokens) {
  const std::uint64_t first = Scramble(seed);
  for (std::int64_t index = 0; index < num_tokens; ++index) {
    const std::uint64_t bits = Scramble(first + static_cast<std::uint64_t>(index)) >> 32;
    tokens.push_back(static_cast<TokenId>((bits * kVocabularySize) >> 32));
  }
}

/// What the model "samples" at this place of a request's output.
[[nodiscard]] inline TokenId OutputToken(std::int64_t request_id, std::int64_t output_index) {
  const std::uint64_t bits = Scramble(static_cast<std::uint64_t>(request_id) * 0x100000 +
                                      static_cast<std::uint64_t>(output_index)) >>
                             32;
  return static_cast<TokenId>((bits * kVocabularySize) >> 32);
}

}  // namespace lora_serve::sim
