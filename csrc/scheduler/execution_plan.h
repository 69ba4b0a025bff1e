#pragma once

#include <cstdint>
#include <vector>

#include "common/strong_id.h"

namespace lora_serve {

/// The id of a plan that owes no Advance.
inline constexpr PlanId kNoPlan{-1};

/// One step of work, as plain arrays: the only value that goes from the scheduler to the executor.
///
/// Axis letters: B rows (one a scheduled request), T tokens of the step, D page-table deltas, C
/// copies between the tiers.
/// Rows are ordered: decodes first, then prefill chunks; both in the order in which they were
/// admitted.
struct ExecutionPlan {
  /// Counts up by one from plan to plan; events return in this order. kNoPlan when the plan is
  /// empty.
  std::int64_t plan_id = kNoPlan.value();

  // --- Rows [B]
  // -----------------------------------------------------------------------------------------
  std::vector<std::int64_t> request_ids;
  /// Row of the executor's page table, in [0, max_num_seqs).
  std::vector<std::int32_t> page_table_rows;
  /// Tokens of this row in this step, at least 1.
  std::vector<std::int32_t> num_scheduled_tokens;
  /// Position of the row's first token: tokens whose KV is already in its pages.
  std::vector<std::int32_t> num_computed_tokens;
  /// Tokens of the row's prompt that came from the prefix cache, for usage reports.
  std::vector<std::int32_t> num_cached_tokens;
  /// Index into the adapter tables; -1 = no adapter.
  std::vector<std::int32_t> adapter_slots;
  /// 1 when the row's last token is the newest known one, so that a token is sampled; 0 inside a
  /// prefill.
  std::vector<std::uint8_t> samples_token;

  // --- Tokens [T]
  // ---------------------------------------------------------------------------------------
  /// Input tokens, row after row. -1 = the token that the previous plan sampled for this row
  /// (overlap).
  std::vector<std::int32_t> token_ids;

  // --- Page-table deltas [D]: row `delta_rows[d]` gets, from entry `delta_starts[d]` on, the pages
  //     delta_pages[delta_offsets[d] : delta_offsets[d + 1]]. Entries before the start are
  //     unchanged. ------
  std::vector<std::int32_t> delta_rows;
  std::vector<std::int32_t> delta_starts;
  std::vector<std::int32_t> delta_offsets;  // [D + 1]
  std::vector<std::int32_t> delta_pages;

  // --- Adapters
  // -----------------------------------------------------------------------------------------
  /// Bring these generations to these slots; the event reports each as loaded or failed.
  std::vector<std::int64_t> load_adapter_ids;
  std::vector<std::int32_t> load_adapter_slots;
  /// Drains that have completed: nothing refers to these generations any more. Free them before the
  /// loads.
  std::vector<std::int64_t> drained_adapter_ids;

  // --- Copies between the tiers [C], by id: pages
  //     transfer_source_pages[transfer_offsets[c] : transfer_offsets[c + 1]] to the destination
  //     pages of the same range. They start before the plan's rows run, and end whenever they end:
  //     the event of this or of a later plan reports each. Until then neither the rows of this plan
  //     nor those of later ones write a source page, or touch a destination page. -----------------
  /// Count up by one; never reused.
  std::vector<std::int64_t> transfer_ids;
  /// 0 = write back (device page to host page), 1 = load back (host page to device page).
  std::vector<std::int8_t> transfer_kinds;
  std::vector<std::int32_t> transfer_offsets;  // [C + 1]
  std::vector<std::int32_t> transfer_source_pages;
  std::vector<std::int32_t> transfer_destination_pages;

  [[nodiscard]] bool HasRows() const { return !request_ids.empty(); }
  /// True when there is nothing to execute and nothing to report: no Advance is owed.
  [[nodiscard]] bool IsEmpty() const {
    return request_ids.empty() && load_adapter_ids.empty() && drained_adapter_ids.empty() &&
           transfer_ids.empty();
  }
};

/// What the executor did with a plan: the only value that comes back.
///
/// With kNoPlan it answers no plan and only reports copies, for those that end while nothing runs.
struct ExecutionEvent {
  std::int64_t plan_id = kNoPlan.value();
  /// [B], in the plan's row order; -1 where the row did not sample.
  std::vector<std::int32_t> sampled_token_ids;
  /// [B]; 1 = the request ends with this token (stop token; the scheduler ends it at max_tokens by
  /// itself).
  std::vector<std::uint8_t> is_finished;
  /// Generations of the plan's loads, each in exactly one of the two.
  std::vector<std::int64_t> loaded_adapter_ids;
  std::vector<std::int64_t> failed_adapter_ids;
  /// Copies of this or an earlier plan that have ended; each is reported once, in one of the two.
  /// What a failed one should have written means nothing.
  std::vector<std::int64_t> completed_transfer_ids;
  std::vector<std::int64_t> failed_transfer_ids;
};

}  // namespace lora_serve
