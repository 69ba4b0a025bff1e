#pragma once

#include "scheduler/execution_plan.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {

/// Refuses an event that does not answer `plan`, before anything has been changed.
/// Throws: InvalidArgumentError naming the field, what came and what was expected.
void CheckEventAnswersPlan(const ExecutionEvent& event, const OutstandingPlan& plan);

}  // namespace lora_serve
