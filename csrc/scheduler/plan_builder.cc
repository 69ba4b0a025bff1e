#include "scheduler/plan_builder.h"

#include <cstdint>

#include "common/check.h"

namespace lora_serve {
namespace {

void WriteTokens(const ScheduledRow& row, ExecutionPlan& plan) {
  const Request& request = *row.request_backptr;
  const auto tokens =
      request.tokens().subspan(static_cast<std::size_t>(request.running().num_computed_tokens),
                               static_cast<std::size_t>(row.num_tokens));
  plan.token_ids.insert(plan.token_ids.end(), tokens.begin(), tokens.end());
}

void WriteDelta(RunningResources& running, ExecutionPlan& plan) {
  const auto pages = running.lease.pages();
  const auto num_pages = static_cast<std::int32_t>(pages.size());
  if (num_pages == running.num_planned_pages) return;
  plan.delta_rows.push_back(running.row.row().value());
  plan.delta_starts.push_back(running.num_planned_pages);
  for (const PageId page : pages.subspan(static_cast<std::size_t>(running.num_planned_pages))) {
    plan.delta_pages.push_back(page.value());
  }
  plan.delta_offsets.push_back(static_cast<std::int32_t>(plan.delta_pages.size()));
  running.num_planned_pages = num_pages;
}

}  // namespace

void ClearPlan(ExecutionPlan& plan) {
  plan.plan_id = kNoPlan.value();
  plan.request_ids.clear();
  plan.page_table_rows.clear();
  plan.num_scheduled_tokens.clear();
  plan.num_computed_tokens.clear();
  plan.num_cached_tokens.clear();
  plan.adapter_slots.clear();
  plan.samples_token.clear();
  plan.token_ids.clear();
  plan.delta_rows.clear();
  plan.delta_starts.clear();
  plan.delta_offsets.assign(1, 0);
  plan.delta_pages.clear();
  plan.load_adapter_ids.clear();
  plan.load_adapter_slots.clear();
  plan.drained_adapter_ids.clear();
  plan.transfer_ids.clear();
  plan.transfer_kinds.clear();
  plan.transfer_offsets.assign(1, 0);
  plan.transfer_source_pages.clear();
  plan.transfer_destination_pages.clear();
}

void WriteRows(std::span<const ScheduledRow> rows, ExecutionPlan& plan) {
  for (const ScheduledRow& row : rows) {
    Request& request = *row.request_backptr;
    RunningResources& running = request.running();
    LS_DCHECK(row.num_tokens >= 1, "request ", request.id());
    plan.request_ids.push_back(request.id().value());
    plan.page_table_rows.push_back(running.row.row().value());
    plan.num_scheduled_tokens.push_back(row.num_tokens);
    plan.num_computed_tokens.push_back(running.num_computed_tokens);
    plan.num_cached_tokens.push_back(request.num_cached_prompt_tokens);
    plan.adapter_slots.push_back(request.adapter().slot.value());
    plan.samples_token.push_back(row.samples_token ? 1 : 0);
    WriteTokens(row, plan);
    WriteDelta(running, plan);
  }
}

void WriteAdapters(std::span<const Adapter* const> loads, std::span<const AdapterId> drained,
                   ExecutionPlan& plan) {
  for (const Adapter* adapter : loads) {
    plan.load_adapter_ids.push_back(adapter->id.value());
    plan.load_adapter_slots.push_back(adapter->slot.value());
  }
  for (const AdapterId id : drained) plan.drained_adapter_ids.push_back(id.value());
}

void WriteTransfers(std::span<const TransferOrder> orders, ExecutionPlan& plan) {
  for (const TransferOrder& order : orders) {
    LS_DCHECK(order.states.empty(), "copy ", order.id, " of states in a model without");
    plan.transfer_ids.push_back(order.id.value());
    plan.transfer_kinds.push_back(order.kind == TransferKind::kWriteBack ? 0 : 1);
    for (const PageCopy& pair : order.pages) {
      plan.transfer_source_pages.push_back(pair.source.value());
      plan.transfer_destination_pages.push_back(pair.destination.value());
    }
    plan.transfer_offsets.push_back(static_cast<std::int32_t>(plan.transfer_source_pages.size()));
  }
}

}  // namespace lora_serve
