#pragma once

#include "scheduler_sim/request_source.h"
#include "scheduler_sim/serving_system.h"

namespace lora_serve::sim {

/// Serves all requests of the source with the system, in virtual time, and checks at the end that
/// each has ended exactly once and that nothing is left.
/// Throws: InternalError when the system stops although requests wait, or a check fails.
void Simulate(RequestSource& source, ServingSystem& system);

}  // namespace lora_serve::sim
