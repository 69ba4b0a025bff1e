#include "scheduler_sim/trace_reader.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "common/errors.h"
#include "scheduler_sim/prompt_tokens.h"

namespace lora_serve::sim {
namespace {

/// Where the value of `"key":` starts in the line; npos when the key is missing.
std::size_t ValueStart(std::string_view line, std::string_view key) {
  const std::size_t at = line.find('"' + std::string(key) + '"');
  if (at == std::string_view::npos) return at;
  const std::size_t colon = line.find_first_not_of(" \t", at + key.size() + 2);
  if (colon == std::string_view::npos || line[colon] != ':') return std::string_view::npos;
  return line.find_first_not_of(" \t", colon + 1);
}

std::optional<double> NumberOf(const std::string& line, std::string_view key) {
  const std::size_t start = ValueStart(line, key);
  if (start == std::string::npos) return std::nullopt;
  char* end = nullptr;
  const double value = std::strtod(line.c_str() + start, &end);
  if (end == line.c_str() + start || !(value >= 0.0)) return std::nullopt;
  return value;
}

std::optional<std::vector<std::int64_t>> IdsOf(const std::string& line, std::string_view key) {
  std::size_t at = ValueStart(line, key);
  if (at == std::string::npos || line[at] != '[') return std::nullopt;
  std::vector<std::int64_t> ids;
  for (;;) {
    at = line.find_first_not_of(" \t,", at + 1);
    if (at == std::string::npos) return std::nullopt;
    if (line[at] == ']') return ids;
    char* end = nullptr;
    ids.push_back(std::strtoll(line.c_str() + at, &end, 10));
    if (end == line.c_str() + at) return std::nullopt;
    at = static_cast<std::size_t>(end - line.c_str()) - 1;
  }
}

}  // namespace

std::optional<TraceRequest> TraceReader::Next() {
  std::string line;
  do {
    if (!std::getline(input_, line)) return std::nullopt;
    ++num_lines_;
  } while (line.find_first_not_of(" \t\r") == std::string::npos);
  const auto fail = [this](const std::string& what) {
    throw InvalidArgumentError("trace, line " + std::to_string(num_lines_) + ": " + what);
  };
  const auto timestamp_ms = NumberOf(line, "timestamp");
  const auto input_length = NumberOf(line, "input_length");
  const auto output_length = NumberOf(line, "output_length");
  auto hash_ids = IdsOf(line, "hash_ids");
  if (!timestamp_ms || !input_length || !output_length || !hash_ids) {
    fail(
        "expected an object with numbers timestamp, input_length, output_length and a list "
        "hash_ids");
  }
  TraceRequest request{.arrival_us = std::llround(*timestamp_ms * 1000.0),
                       .num_prompt_tokens = static_cast<std::int32_t>(*input_length),
                       .num_output_tokens = static_cast<std::int32_t>(*output_length),
                       .hash_ids = std::move(*hash_ids)};
  const std::int64_t num_tokens = request.num_prompt_tokens;
  const std::int64_t num_blocks = (num_tokens + kTraceBlockTokens - 1) / kTraceBlockTokens;
  if (std::ssize(request.hash_ids) < num_blocks) {
    fail("an input_length of " + std::to_string(num_tokens) + " has " + std::to_string(num_blocks) +
         " blocks of " + std::to_string(kTraceBlockTokens) + " tokens, but hash_ids has " +
         std::to_string(request.hash_ids.size()) + " ids");
  }
  if (request.arrival_us < last_arrival_us_) fail("the timestamp is before that of the line above");
  last_arrival_us_ = request.arrival_us;
  return request;
}

std::vector<TokenId> TracePromptTokens(const TraceRequest& request) {
  std::vector<TokenId> tokens;
  std::int64_t num_left = request.num_prompt_tokens;
  tokens.reserve(static_cast<std::size_t>(num_left));
  for (const std::int64_t id : request.hash_ids) {
    AppendTokens(tokens, static_cast<std::uint64_t>(id), std::min(num_left, kTraceBlockTokens));
    num_left -= std::min(num_left, kTraceBlockTokens);
  }
  return tokens;
}

}  // namespace lora_serve::sim
