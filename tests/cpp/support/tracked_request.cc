#include "support/tracked_request.h"

#include <utility>

#include "support/oracle_executor.h"

namespace lora_serve::testing {
namespace {

/// Tries seeds until a run alone samples exactly `num_output_tokens` tokens of `max_tokens`.
std::vector<TokenId> FindPrompt(AdapterId adapter, std::int32_t num_prompt_tokens,
                                std::int32_t num_output_tokens, bool ends_with_stop_token,
                                TokenId seed) {
  for (;; seed += 1000) {
    std::vector<TokenId> prompt = MakePrompt(num_prompt_tokens, seed);
    const std::vector<TokenId> output =
        OracleExecutor::RunAlone(adapter, prompt, num_output_tokens);
    if (std::cmp_equal(output.size(), num_output_tokens) &&
        OracleExecutor::IsStopToken(output.back()) == ends_with_stop_token) {
      return prompt;
    }
  }
}

}  // namespace

std::vector<TokenId> MakePrompt(std::int32_t num_tokens, TokenId seed) {
  std::vector<TokenId> prompt(static_cast<std::size_t>(num_tokens));
  for (std::size_t index = 0; index < prompt.size(); ++index) {
    prompt[index] = static_cast<TokenId>(
        (static_cast<std::uint32_t>(seed) * 7919U + static_cast<std::uint32_t>(index) * 104729U) %
        static_cast<std::uint32_t>(OracleExecutor::kVocabSize));
  }
  return prompt;
}

std::vector<TokenId> MakeLongRunningPrompt(AdapterId adapter, std::int32_t num_prompt_tokens,
                                           std::int32_t num_output_tokens, TokenId seed) {
  return FindPrompt(adapter, num_prompt_tokens, num_output_tokens, false, seed);
}

std::vector<TokenId> MakeStoppingPrompt(AdapterId adapter, std::int32_t num_prompt_tokens,
                                        std::int32_t num_output_tokens, TokenId seed) {
  return FindPrompt(adapter, num_prompt_tokens, num_output_tokens, true, seed);
}

}  // namespace lora_serve::testing
