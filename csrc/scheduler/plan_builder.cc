#include "scheduler/plan_builder.h"

#include <algorithm>
#include <string>

#include "common/check.h"
#include "common/errors.h"

namespace lora_serve {
namespace {

/// Writes one block's rows one after the other; each array has a place to go on.
class RowWriter {
 public:
  explicit RowWriter(ExecutionPlan& plan)
      : page_table_rows_(plan.Writable(plan.page_table_rows).data()),
        num_scheduled_tokens_(plan.Writable(plan.num_scheduled_tokens).data()),
        num_computed_tokens_(plan.Writable(plan.num_computed_tokens).data()),
        seq_lens_(plan.Writable(plan.seq_lens).data()),
        adapter_slots_(plan.Writable(plan.adapter_slots).data()),
        query_start_loc_(plan.Writable(plan.query_start_loc).data()),
        token_ids_(plan.Writable(plan.token_ids).data()) {
    *query_start_loc_++ = 0;
  }

  void Write(const ScheduledRow& row, const RunningResources& running) {
    const Request& request = *row.request_backptr;
    *page_table_rows_++ = running.row.row().value();
    *num_scheduled_tokens_++ = row.num_tokens;
    *num_computed_tokens_++ = row.position;
    *seq_lens_++ = row.position + row.num_tokens;
    *adapter_slots_++ = request.adapter().slot.value();
    *query_start_loc_ = query_start_loc_[-1] + row.num_tokens;
    ++query_start_loc_;
    WriteTokens(row);
  }

 private:
  /// Tokens that the scheduler does not know yet are -1.
  void WriteTokens(const ScheduledRow& row) {
    const auto known = row.request_backptr->tokens().subspan(
        static_cast<std::size_t>(std::min(row.position, row.request_backptr->num_tokens())));
    const auto num_tokens = static_cast<std::size_t>(row.num_tokens);
    const std::size_t num_known = std::min(known.size(), num_tokens);
    token_ids_ = std::copy_n(known.begin(), num_known, token_ids_);
    token_ids_ = std::fill_n(token_ids_, num_tokens - num_known, -1);
  }

  std::int32_t* page_table_rows_;
  std::int32_t* num_scheduled_tokens_;
  std::int32_t* num_computed_tokens_;
  std::int32_t* seq_lens_;
  std::int32_t* adapter_slots_;
  std::int32_t* query_start_loc_;
  std::int32_t* token_ids_;
};

/// Writes the deltas of one block, one after the other.
class DeltaWriter {
 public:
  explicit DeltaWriter(ExecutionPlan& plan)
      : rows_(plan.Writable(plan.delta_rows).data()),
        starts_(plan.Writable(plan.delta_starts).data()),
        offsets_(plan.Writable(plan.delta_offsets).data()),
        pages_(plan.Writable(plan.delta_pages).data()) {
    *offsets_++ = 0;
  }

  /// The pages that the executor does not know yet, if there are any.
  void Write(RunningResources& running) {
    const auto pages = running.lease.pages();
    const auto num_pages = static_cast<std::int32_t>(pages.size());
    if (num_pages == running.num_planned_pages) return;
    *rows_++ = running.row.row().value();
    *starts_++ = running.num_planned_pages;
    for (const PageId page : pages.subspan(static_cast<std::size_t>(running.num_planned_pages))) {
      *pages_++ = page.value();
    }
    *offsets_ = offsets_[-1] + num_pages - running.num_planned_pages;
    ++offsets_;
    running.num_planned_pages = num_pages;
  }

 private:
  std::int32_t* rows_;
  std::int32_t* starts_;
  std::int32_t* offsets_;
  std::int32_t* pages_;
};

void WriteHeader(const PlanSizes& sizes, ExecutionPlan& plan) {
  const auto header = plan.Writable(plan.header);
  const auto set = [&header](PlanHeader entry, std::int32_t value) {
    header[static_cast<std::size_t>(entry)] = value;
  };
  set(PlanHeader::kNumRows, sizes.num_rows);
  set(PlanHeader::kNumTokens, sizes.num_tokens);
  set(PlanHeader::kNumPaddedRows, sizes.num_padded_rows);
  set(PlanHeader::kNumPaddedTokens, sizes.num_padded_tokens);
  set(PlanHeader::kNumDeltas, sizes.num_deltas);
  set(PlanHeader::kNumDeltaPages, sizes.num_delta_pages);
}

}  // namespace

PlanBuilder::PlanBuilder(const SchedulerOptions& options)
    : options_(options), capacity_(PlanBlockCapacity(options)) {}

void PlanBuilder::Begin(ExecutionPlan& plan) const {
  if (!plan.memory.empty()) {
    if (plan.memory.size() < capacity_) {
      throw InvalidArgumentError("the plan's memory has " + std::to_string(plan.memory.size()) +
                                 " int32 entries; expected at least " + std::to_string(capacity_) +
                                 " (PlanBlockCapacity), which hold any plan of this scheduler");
    }
    if (reinterpret_cast<std::uintptr_t>(plan.memory.data()) %
            (kPlanArrayAlignment * sizeof(std::int32_t)) !=
        0) {
      throw InvalidArgumentError(
          "the plan's memory does not start at a multiple of 16 bytes; its arrays would not "
          "either");
    }
  }
  plan.Clear();
  plan.plan_id = kNoPlan.value();
  plan.request_ids.clear();
  plan.num_cached_tokens.clear();
  plan.samples_token.clear();
  plan.drained_adapter_ids.clear();
  plan.evicted_adapter_ids.clear();
  plan.load_adapter_ids.clear();
  plan.load_adapter_slots.clear();
  plan.expired_request_ids.clear();
  plan.transfer_ids.clear();
  plan.transfer_kinds.clear();
  plan.transfer_offsets.assign(1, 0);
  plan.transfer_source_pages.clear();
  plan.transfer_destination_pages.clear();
}

PlanSizes PlanBuilder::SizesOf(std::span<const ScheduledRow> rows) const {
  PlanSizes sizes{.num_groups = options_.max_loras + 1,
                  .num_rows = static_cast<std::int32_t>(rows.size())};
  bool has_single_tokens = !rows.empty();
  for (const ScheduledRow& row : rows) {
    LS_DCHECK(row.num_tokens >= 1, "request ", row.request_backptr->id());
    sizes.num_tokens += row.num_tokens;
    has_single_tokens &= row.num_tokens == 1;
    const RunningResources& running = row.request_backptr->running();
    const auto num_new_pages =
        static_cast<std::int32_t>(running.lease.pages().size()) - running.num_planned_pages;
    sizes.num_deltas += num_new_pages > 0 ? 1 : 0;
    sizes.num_delta_pages += num_new_pages;
  }
  sizes.num_padded_rows =
      has_single_tokens ? PaddedBatchSize(options_, sizes.num_rows) : sizes.num_rows;
  sizes.num_padded_tokens = sizes.num_tokens + sizes.num_padded_rows - sizes.num_rows;
  return sizes;
}

void PlanBuilder::WriteRows(std::span<const ScheduledRow> rows, ExecutionPlan& plan) {
  const PlanSizes sizes = SizesOf(rows);
  plan.LayOut(sizes);
  WriteHeader(sizes, plan);
  RowWriter row_writer(plan);
  DeltaWriter delta_writer(plan);
  for (const ScheduledRow& row : rows) {
    Request& request = *row.request_backptr;
    RunningResources& running = request.running();
    plan.request_ids.push_back(request.id().value());
    plan.num_cached_tokens.push_back(request.num_cached_prompt_tokens);
    plan.samples_token.push_back(row.samples_token ? 1 : 0);
    row_writer.Write(row, running);
    delta_writer.Write(running);
  }
  WritePadding(sizes, plan);
  grouping_.Write(plan);
}

void PlanBuilder::WritePadding(const PlanSizes& sizes, ExecutionPlan& plan) const {
  if (sizes.num_padded_rows == sizes.num_rows) return;
  const PlanArrays padded = plan.Padded();
  const auto fill_behind = [&plan](PlanArrays::View written, PlanArrays::View array,
                                   std::int32_t value) {
    std::ranges::fill(plan.Writable(array).subspan(written.size()), value);
  };
  fill_behind(plan.page_table_rows, padded.page_table_rows, options_.max_num_seqs);
  fill_behind(plan.num_scheduled_tokens, padded.num_scheduled_tokens, 0);
  fill_behind(plan.num_computed_tokens, padded.num_computed_tokens, 0);
  fill_behind(plan.seq_lens, padded.seq_lens, 0);
  fill_behind(plan.adapter_slots, padded.adapter_slots, kNoAdapterSlot.value());
  fill_behind(plan.query_start_loc, padded.query_start_loc, sizes.num_tokens);
  fill_behind(plan.token_ids, padded.token_ids, 0);
}

void WriteAdapters(std::span<const AdapterId> drained, std::span<const AdapterId> evicted,
                   std::span<const Adapter* const> loads, ExecutionPlan& plan) {
  for (const AdapterId id : drained) plan.drained_adapter_ids.push_back(id.value());
  for (const AdapterId id : evicted) plan.evicted_adapter_ids.push_back(id.value());
  for (const Adapter* adapter : loads) {
    plan.load_adapter_ids.push_back(adapter->id.value());
    plan.load_adapter_slots.push_back(adapter->slot.value());
  }
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
