#include "support/recorded_plan.h"

#include <algorithm>
#include <string_view>

namespace lora_serve::testing {
namespace {

/// Calls `visit(name, array)` for every array.
template <typename Visit>
void ForEachArray(const RecordedPlan& plan, const Visit& visit) {
  visit("request_ids", plan.request_ids);
  visit("page_table_rows", plan.page_table_rows);
  visit("num_scheduled_tokens", plan.num_scheduled_tokens);
  visit("num_computed_tokens", plan.num_computed_tokens);
  visit("num_cached_tokens", plan.num_cached_tokens);
  visit("adapter_slots", plan.adapter_slots);
  visit("samples_token", plan.samples_token);
  visit("token_ids", plan.token_ids);
  visit("delta_rows", plan.delta_rows);
  visit("delta_starts", plan.delta_starts);
  visit("delta_offsets", plan.delta_offsets);
  visit("delta_pages", plan.delta_pages);
  visit("drained_adapter_ids", plan.drained_adapter_ids);
  visit("evicted_adapter_ids", plan.evicted_adapter_ids);
  visit("load_adapter_ids", plan.load_adapter_ids);
  visit("load_adapter_slots", plan.load_adapter_slots);
  visit("expired_request_ids", plan.expired_request_ids);
  visit("transfer_ids", plan.transfer_ids);
  visit("transfer_kinds", plan.transfer_kinds);
  visit("transfer_offsets", plan.transfer_offsets);
  visit("transfer_source_pages", plan.transfer_source_pages);
  visit("transfer_destination_pages", plan.transfer_destination_pages);
  visit("block", plan.block);
}

template <typename To, typename From>
void CopyArray(const From& from, std::vector<To>& to) {
  to.assign(from.begin(), from.end());
}

}  // namespace

RecordedPlan::RecordedPlan(const ExecutionPlan& plan) : plan_id(plan.plan_id) {
  CopyArray(plan.request_ids, request_ids);
  CopyArray(plan.page_table_rows, page_table_rows);
  CopyArray(plan.num_scheduled_tokens, num_scheduled_tokens);
  CopyArray(plan.num_computed_tokens, num_computed_tokens);
  CopyArray(plan.num_cached_tokens, num_cached_tokens);
  CopyArray(plan.adapter_slots, adapter_slots);
  CopyArray(plan.samples_token, samples_token);
  CopyArray(plan.token_ids, token_ids);
  CopyArray(plan.delta_rows, delta_rows);
  CopyArray(plan.delta_starts, delta_starts);
  CopyArray(plan.delta_offsets, delta_offsets);
  CopyArray(plan.delta_pages, delta_pages);
  CopyArray(plan.drained_adapter_ids, drained_adapter_ids);
  CopyArray(plan.evicted_adapter_ids, evicted_adapter_ids);
  CopyArray(plan.load_adapter_ids, load_adapter_ids);
  CopyArray(plan.load_adapter_slots, load_adapter_slots);
  CopyArray(plan.expired_request_ids, expired_request_ids);
  CopyArray(plan.transfer_ids, transfer_ids);
  CopyArray(plan.transfer_kinds, transfer_kinds);
  CopyArray(plan.transfer_offsets, transfer_offsets);
  CopyArray(plan.transfer_source_pages, transfer_source_pages);
  CopyArray(plan.transfer_destination_pages, transfer_destination_pages);
  num_padded_rows = plan.num_padded_rows;
  CopyArray(plan.block(), block);
}

std::size_t RecordedPlan::NumEntries() const {
  std::size_t num_entries = 0;
  ForEachArray(*this, [&](std::string_view, const auto& array) { num_entries += array.size(); });
  return num_entries;
}

std::ptrdiff_t RecordedPlan::RowOf(std::int64_t request_id) const {
  const auto it = std::ranges::find(request_ids, request_id);
  return it == request_ids.end() ? -1 : it - request_ids.begin();
}

std::string RecordedPlan::ToText() const {
  std::string text = "plan " + std::to_string(plan_id);
  ForEachArray(*this, [&](std::string_view name, const auto& array) {
    if (array.empty()) return;
    text += ' ';
    text += name;
    for (const auto value : array) text += ' ' + std::to_string(static_cast<std::int64_t>(value));
  });
  return text;
}

}  // namespace lora_serve::testing
