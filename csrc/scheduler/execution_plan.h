#pragma once

#include <cstdint>
#include <vector>

#include "common/strong_id.h"
#include "scheduler/plan_block.h"

namespace lora_serve {

/// The id of a plan that owes no Advance.
inline constexpr PlanId kNoPlan{-1};

/// One step of work, as plain arrays: the only value that goes from the scheduler to the executor.
///
/// What the device needs lies in one block (PlanBlock, whose arrays are members here, too); the
/// rest is for the host. Axis letters: B rows (one a scheduled request), T tokens of the step, D
/// page-table deltas, C copies between the tiers.
/// Rows are ordered: decodes first, then prefill chunks; both in the order in which they were
/// admitted. A plan of single tokens only gets padded rows (SchedulerOptions::padded_batch_sizes),
/// which are seen through Padded() alone.
struct ExecutionPlan : PlanBlock {
  /// Counts up by one from plan to plan; events return in this order. kNoPlan when the plan is
  /// empty.
  std::int64_t plan_id = kNoPlan.value();

  // --- Rows [B], for the host -------------------------------------------------------------------
  std::vector<std::int64_t> request_ids;
  /// Tokens of the row's prompt that came from the prefix cache, for usage reports.
  std::vector<std::int32_t> num_cached_tokens;
  /// 1 when the row's last token is the newest one planned, so that a token is sampled; 0 inside a
  /// prefill.
  std::vector<std::uint8_t> samples_token;

  // --- Adapters, in the order in which they are carried out: drained, evicted, loaded -----------
  /// Drains that have completed: nothing refers to these generations any more.
  std::vector<std::int64_t> drained_adapter_ids;
  /// Take these generations off the device; they stay open and may be loaded again.
  std::vector<std::int64_t> evicted_adapter_ids;
  /// Bring these generations to these slots. The event of this or of a later plan reports each as
  /// loaded or failed; no row uses a slot before that. But the rows of this plan may use those of
  /// staged adapters, and this plan's event reports them.
  std::vector<std::int64_t> load_adapter_ids;
  std::vector<std::int32_t> load_adapter_slots;

  // --- Requests that have ended without a row ---------------------------------------------------
  /// Their deadline has passed before they ran; no Advance is owed for them.
  std::vector<std::int64_t> expired_request_ids;

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
    return request_ids.empty() && drained_adapter_ids.empty() && evicted_adapter_ids.empty() &&
           load_adapter_ids.empty() && transfer_ids.empty();
  }
};

/// What the executor did with a plan: the only value that comes back.
///
/// With kNoPlan it answers no plan and only reports loads and copies, for those that end while
/// nothing runs.
struct ExecutionEvent {
  std::int64_t plan_id = kNoPlan.value();
  /// [B], in the plan's row order; -1 where the row did not sample.
  std::vector<std::int32_t> sampled_token_ids;
  /// [B]; 1 = the request ends with this token (stop token; the scheduler ends it at max_tokens by
  /// itself).
  std::vector<std::uint8_t> is_finished;
  /// Loads of this or an earlier plan that have ended; each is reported once, in one of the two.
  std::vector<std::int64_t> loaded_adapter_ids;
  std::vector<std::int64_t> failed_adapter_ids;
  /// Copies of this or an earlier plan that have ended; each is reported once, in one of the two.
  /// What a failed one should have written means nothing.
  std::vector<std::int64_t> completed_transfer_ids;
  std::vector<std::int64_t> failed_transfer_ids;
};

}  // namespace lora_serve
