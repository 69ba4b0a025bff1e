#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "scheduler/adapter_grouping.h"
#include "scheduler/adapter_table.h"
#include "scheduler/execution_plan.h"
#include "scheduler/step_policy.h"

namespace lora_serve {

/// Writes the rows that the policy chose as the arrays of a plan, and notes in each request which
/// pages the executor now knows.
///
/// Owns: the options' sizes, and memory that is reused from step to step. Does not know: why a row
/// is there.
class PlanBuilder {
 public:
  /// Requires: the options were checked.
  explicit PlanBuilder(const SchedulerOptions& options);

  /// Empties a plan and keeps its arrays' memory.
  /// Throws: InvalidArgumentError when memory was given to it that need not hold the next plan, or
  /// does not start at a multiple of 16 bytes; then it is unchanged.
  void Begin(ExecutionPlan& plan) const;

  /// Writes all that concerns rows: request ids, what they sample, and the block, with padded rows
  /// where a plan of single tokens has a decode graph to run in.
  /// Requires: Begin. To be called once a plan, also without rows.
  /// Complexity: proportional to the step's rows, tokens, padding and new pages, and to max_loras;
  /// never to the context.
  void WriteRows(std::span<const ScheduledRow> rows, ExecutionPlan& plan);

 private:
  [[nodiscard]] PlanSizes SizesOf(std::span<const ScheduledRow> rows) const;
  void WritePadding(const PlanSizes& sizes, ExecutionPlan& plan) const;

  const SchedulerOptions options_;
  const std::size_t capacity_;
  AdapterGrouping grouping_;
};

/// Writes the lists of adapters, in the order in which they are carried out.
void WriteAdapters(std::span<const AdapterId> drained, std::span<const AdapterId> evicted,
                   std::span<const Adapter* const> loads, ExecutionPlan& plan);

/// Writes the copies between the tiers.
void WriteTransfers(std::span<const TransferOrder> orders, ExecutionPlan& plan);

}  // namespace lora_serve
