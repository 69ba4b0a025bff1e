#pragma once

#include <span>

#include "scheduler/execution_plan.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {

// Each refuses an event before anything has been changed.
// Throws: InvalidArgumentError naming the field, what came and what was expected.

/// The event must answer `plan`; its reports of loads and copies are not looked at.
void CheckEventAnswersPlan(const ExecutionEvent& event, const OutstandingPlan& plan);
/// True when it reports a load or a copy.
[[nodiscard]] bool ReportsAnything(const ExecutionEvent& event);
/// An event without a plan must have no rows.
void CheckEventHasNoRows(const ExecutionEvent& event);
/// Every copy reported must be under way, and be reported once.
void CheckTransferReports(const ExecutionEvent& event, const TransferTable& transfers);
/// Every load reported must be under way or one of `staged_loads`, those of staged adapters in the
/// event's plan, and be reported once.
void CheckLoadReports(const ExecutionEvent& event, const AdapterTable& adapters,
                      std::span<const AdapterId> staged_loads);

}  // namespace lora_serve
