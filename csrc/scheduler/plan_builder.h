#pragma once

#include <span>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "scheduler/adapter_table.h"
#include "scheduler/execution_plan.h"
#include "scheduler/step_policy.h"

namespace lora_serve {

/// Empties a plan and keeps its arrays' memory.
void ClearPlan(ExecutionPlan& plan);

/// Writes the rows' arrays and the page-table deltas, and notes in each request which pages the
/// executor now knows. Cost: proportional to the step's rows, tokens and new pages, never to the
/// context. Requires: the plan is clear.
void WriteRows(std::span<const ScheduledRow> rows, ExecutionPlan& plan);

/// Writes the lists of adapters.
void WriteAdapters(std::span<const Adapter* const> loads, std::span<const AdapterId> drained,
                   ExecutionPlan& plan);

/// Writes the copies between the tiers.
void WriteTransfers(std::span<const TransferOrder> orders, ExecutionPlan& plan);

}  // namespace lora_serve
