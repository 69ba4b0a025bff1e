#pragma once

#include "scheduler_sim/baseline_system.h"

namespace lora_serve::sim {

/// First come, first served continuous batching with a hard cap on the adapters of a step.
///
/// Every running request has a row in every step: decodes and unfinished prefills in order of
/// admission, then waiting requests in order of arrival while tokens of the step are left. Once a
/// step has as many distinct adapters as there are places, waiting requests of others are passed
/// over in it; nothing ages, and a popular adapter keeps its place as long as it has requests.
///
/// Source: vLLM v1, vllm/v1/core/sched/scheduler.py (Scheduler.schedule) for the cap, and
/// vllm/lora/worker_manager.py (LRUCacheWorkerLoRAManager) for slots and host memory, both least
/// recently used first, filled while the step waits. Different here: see BaselineSystem; and no
/// adapter of the step itself is ever evicted for it.
class VllmLikeSystem : public BaselineSystem {
 public:
  using BaselineSystem::BaselineSystem;

 protected:
  TimeUs ChooseRows(TimeUs now_us) override;
};

}  // namespace lora_serve::sim
