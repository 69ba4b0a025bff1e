#include "scheduler_sim/starvation_bound.h"

#include <algorithm>

namespace lora_serve::sim {
namespace {

/// The longest slice is this many times adapter_time_slice_steps: three times as many adapters
/// wait as are in place, cubed.
constexpr std::int64_t kMaxSliceFactor = 27;

std::int64_t CeilDivide(std::int64_t value, std::int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

}  // namespace

std::int64_t BoundSteps(const BoundInputs& inputs, std::int64_t queue_position) {
  const std::int64_t longest_slice = kMaxSliceFactor * inputs.num_slice_steps;
  const std::int64_t paused_steps =
      inputs.num_slice_steps > 0 ? 4 * longest_slice + inputs.num_load_steps + 2 : 1;
  const std::int64_t request_steps = inputs.num_request_steps * paused_steps;
  const std::int64_t turn_requests =
      std::max<std::int64_t>(1, inputs.max_num_seqs / inputs.num_fitting);
  return CeilDivide(queue_position, turn_requests) *
             CeilDivide(inputs.num_adapters, inputs.num_fitting) *
             (2 * request_steps + inputs.num_load_steps) +
         request_steps + inputs.num_patience_steps;
}

double MaxBoundShare(const std::vector<RequestRecord>& requests, const BoundInputs& inputs,
                     std::int64_t max_num_batched_tokens) {
  double share = 0.0;
  for (const RequestRecord& request : requests) {
    if (request.was_refused) continue;
    const std::int64_t prompt_steps = CeilDivide(request.num_prompt_tokens, max_num_batched_tokens);
    const std::int64_t bound = BoundSteps(inputs, request.queue_position) + prompt_steps;
    share =
        std::max(share, static_cast<double>(request.num_waited_steps) / static_cast<double>(bound));
  }
  return share;
}

}  // namespace lora_serve::sim
