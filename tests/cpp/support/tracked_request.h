#pragma once

#include <cstdint>
#include <vector>

#include "common/strong_id.h"
#include "scheduler/scheduler_options.h"

namespace lora_serve::testing {

/// `num_tokens` tokens that depend on `seed`.
[[nodiscard]] std::vector<TokenId> MakePrompt(std::int32_t num_tokens, TokenId seed = 1);

/// A prompt after which a run alone samples `num_output_tokens` tokens without a stop token.
[[nodiscard]] std::vector<TokenId> MakeLongRunningPrompt(AdapterId adapter,
                                                         std::int32_t num_prompt_tokens,
                                                         std::int32_t num_output_tokens,
                                                         TokenId seed);

/// A prompt after which a run alone samples a stop token as its token number `num_output_tokens`.
[[nodiscard]] std::vector<TokenId> MakeStoppingPrompt(AdapterId adapter,
                                                      std::int32_t num_prompt_tokens,
                                                      std::int32_t num_output_tokens, TokenId seed);

/// What the harness, like an engine, knows of a request.
struct TrackedRequest {
  AdapterId adapter;
  std::vector<TokenId> prompt;
  std::int32_t max_tokens = 0;
  bool reuse_prefix = true;
  std::int32_t priority = 0;
  /// As the caller told it; -1 = when it was added.
  std::int64_t arrival_us = -1;
  std::int64_t deadline_us = kNoDeadline;
  std::vector<TokenId> output;
  /// Of the first plan with a row of it; -1 before.
  std::int32_t num_cached_tokens = -1;
  std::int32_t num_steps = 0;
  /// Of its newest plan.
  std::int32_t newest_num_computed_tokens = 0;
  std::int32_t newest_num_scheduled_tokens = 0;
  std::int32_t newest_page_table_row = -1;
  std::int64_t newest_plan_id = -1;
  bool newest_row_samples = false;
  /// The most tokens whose KV it ever had.
  std::int32_t max_computed_tokens = 0;
  /// Tokens that outstanding plans sample for it.
  std::int32_t num_pending_tokens = 0;
  std::int64_t arrival = 0;
  /// The number of plans before its arrival, and before its first row; -1 before that.
  std::int64_t arrival_step = 0;
  std::int64_t first_step = -1;
  /// Newer requests of the same adapter and priority that had their first row while it waited.
  std::int32_t num_times_overtaken = 0;
  /// What SchedulerHarness::NumBeforeIn was when it came, less those that waited then.
  std::int64_t num_before = 0;
  bool is_finished = false;
  bool is_aborted = false;
  bool is_expired = false;

  [[nodiscard]] bool HasEnded() const { return is_finished || is_aborted || is_expired; }
  [[nodiscard]] std::int32_t num_known_tokens() const {
    return static_cast<std::int32_t>(prompt.size() + output.size());
  }
  /// Requires: it is known.
  [[nodiscard]] TokenId TokenAt(std::int32_t position) const {
    const auto index = static_cast<std::size_t>(position);
    return index < prompt.size() ? prompt[index] : output[index - prompt.size()];
  }
  /// Behind the last token of its newest row.
  [[nodiscard]] std::int32_t newest_end() const {
    return newest_num_computed_tokens + newest_num_scheduled_tokens;
  }
  /// True when a plan may still have a row of it.
  [[nodiscard]] bool HasTokensToPlan() const {
    return !HasEnded() &&
           static_cast<std::int32_t>(output.size()) + num_pending_tokens < max_tokens;
  }
};

}  // namespace lora_serve::testing
