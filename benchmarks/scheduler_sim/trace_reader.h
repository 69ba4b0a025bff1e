#pragma once

#include <cstdint>
#include <istream>
#include <optional>
#include <string>
#include <vector>

#include "common/strong_id.h"
#include "scheduler_sim/sim_request.h"

namespace lora_serve::sim {

/// Tokens that one hash id of a trace stands for.
inline constexpr std::int64_t kTraceBlockTokens = 512;

/// One request of a trace in the format that Mooncake's traces have: one JSON object a line, with
/// timestamp (milliseconds), input_length, output_length (tokens) and hash_ids.
struct TraceRequest {
  TimeUs arrival_us = 0;
  std::int32_t num_prompt_tokens = 0;
  std::int32_t num_output_tokens = 0;
  /// One for each kTraceBlockTokens prompt tokens begun; equal ids stand for equal tokens.
  std::vector<std::int64_t> hash_ids;
};

/// Reads a trace line by line, so that its length does not matter.
class TraceReader {
 public:
  explicit TraceReader(std::istream& input) : input_(input) {}

  /// The next request; nothing at the end. Empty lines are passed over.
  /// Throws: InvalidArgumentError naming the line when it is not such an object, or arrives before
  /// the line above.
  [[nodiscard]] std::optional<TraceRequest> Next();

 private:
  std::istream& input_;
  std::int64_t num_lines_ = 0;
  TimeUs last_arrival_us_ = 0;
};

/// The prompt's tokens: a pure function of its length and its hash ids.
[[nodiscard]] std::vector<TokenId> TracePromptTokens(const TraceRequest& request);

}  // namespace lora_serve::sim
