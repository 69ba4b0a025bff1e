#pragma once

#include "scheduler/execution_plan.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {

// Each refuses an event before anything has been changed.
// Throws: InvalidArgumentError naming the field, what came and what was expected.

/// The event must answer `plan`; its reports of copies are not looked at.
void CheckEventAnswersPlan(const ExecutionEvent& event, const OutstandingPlan& plan);
/// An event without a plan must hold nothing but reports of copies.
void CheckEventHasNoRows(const ExecutionEvent& event);
/// Every copy reported must be under way, and be reported once.
void CheckTransferReports(const ExecutionEvent& event, const TransferTable& transfers);

}  // namespace lora_serve
