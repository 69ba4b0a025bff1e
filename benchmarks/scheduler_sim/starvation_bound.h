#pragma once

#include <cstdint>
#include <vector>

#include "scheduler_sim/recorder.h"

namespace lora_serve::sim {

/// What the bound on a request's wait depends on; csrc/scheduler/README.md, "The bound", names and
/// derives it.
struct BoundInputs {
  /// N: adapters that may have requests.
  std::int64_t num_adapters = 1;
  /// P: of these, how many fit at once.
  std::int64_t num_fitting = 1;
  /// S.
  std::int64_t max_num_seqs = 1;
  /// M: of the longest request.
  std::int64_t num_request_steps = 1;
  /// L: to load num_fitting adapters.
  std::int64_t num_load_steps = 0;
  /// Time slice; 0 = none.
  std::int64_t num_slice_steps = 0;
  std::int64_t num_patience_steps = 0;
};

/// Steps after which the j-th request of its adapter's queue has its first step at the latest.
[[nodiscard]] std::int64_t BoundSteps(const BoundInputs& inputs, std::int64_t queue_position);

/// The largest share of its bound that a request has waited; above 1 the bound is broken. Waits are
/// counted up to the first token, so the steps of a request's own prompt are allowed on top.
[[nodiscard]] double MaxBoundShare(const std::vector<RequestRecord>& requests,
                                   const BoundInputs& inputs, std::int64_t max_num_batched_tokens);

}  // namespace lora_serve::sim
