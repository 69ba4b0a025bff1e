#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scheduler/execution_plan.h"

namespace lora_serve::testing {

/// A copy of a plan that outlives it. Members as in ExecutionPlan.
struct RecordedPlan {
  RecordedPlan() = default;
  explicit RecordedPlan(const ExecutionPlan& plan);

  std::int64_t plan_id = kNoPlan.value();
  std::vector<std::int64_t> request_ids;
  std::vector<std::int32_t> page_table_rows;
  std::vector<std::int32_t> num_scheduled_tokens;
  std::vector<std::int32_t> num_computed_tokens;
  std::vector<std::int32_t> num_cached_tokens;
  std::vector<std::int32_t> adapter_slots;
  std::vector<std::uint8_t> samples_token;
  std::vector<std::int32_t> token_ids;
  std::vector<std::int32_t> delta_rows;
  std::vector<std::int32_t> delta_starts;
  std::vector<std::int32_t> delta_offsets;
  std::vector<std::int32_t> delta_pages;
  std::vector<std::int64_t> drained_adapter_ids;
  std::vector<std::int64_t> evicted_adapter_ids;
  std::vector<std::int64_t> load_adapter_ids;
  std::vector<std::int32_t> load_adapter_slots;
  std::vector<std::int64_t> expired_request_ids;
  std::vector<std::int64_t> transfer_ids;
  std::vector<std::int8_t> transfer_kinds;
  std::vector<std::int32_t> transfer_offsets;
  std::vector<std::int32_t> transfer_source_pages;
  std::vector<std::int32_t> transfer_destination_pages;
  std::int32_t num_padded_rows = 0;
  /// All that goes to the device, padding included.
  std::vector<std::int32_t> block;

  [[nodiscard]] bool HasRows() const { return !request_ids.empty(); }
  [[nodiscard]] bool IsEmpty() const { return plan_id == kNoPlan.value(); }
  /// Integers that the plan carries, in all arrays together: what a step costs to write and copy.
  [[nodiscard]] std::size_t NumEntries() const;
  /// Index of the request's row; -1 when it has none.
  [[nodiscard]] std::ptrdiff_t RowOf(std::int64_t request_id) const;
  [[nodiscard]] bool HasRowOf(std::int64_t request_id) const { return RowOf(request_id) >= 0; }

  /// Every array, by name: equal texts iff equal plans.
  [[nodiscard]] std::string ToText() const;

  friend bool operator==(const RecordedPlan&, const RecordedPlan&) = default;
};

}  // namespace lora_serve::testing
