#include "scheduler_sim/vllm_like_system.h"

#include <algorithm>

namespace lora_serve::sim {

TimeUs VllmLikeSystem::ChooseRows(TimeUs /*now_us*/) {
  std::int32_t budget = options_.max_num_batched_tokens;
  std::set<std::int64_t> adapters;
  const auto add = [&](BaselineRequest& request) {
    const std::int32_t num_tokens = std::min(budget, request.num_missing_tokens());
    AddRow(request, num_tokens);
    budget -= num_tokens;
    if (request.adapter_id() != kBaseAdapter.value()) adapters.insert(request.adapter_id());
  };
  for (const auto& request : running_) {
    if (budget > 0) add(*request);
  }
  while (budget > 0 && std::cmp_less(running_.size(), options_.max_num_seqs)) {
    const bool is_full = std::cmp_greater_equal(adapters.size(), options_.engine.num_places);
    BaselineRequest* next = waiting_.First();
    if (is_full) {
      std::set<std::int64_t> allowed = adapters;
      allowed.insert(kBaseAdapter.value());
      next = waiting_.FirstOf(allowed);
    }
    if (next == nullptr) break;
    BaselineRequest* admitted = Admit(next->adapter_id());
    if (admitted == nullptr) break;
    add(*admitted);
  }
  return 0;
}

}  // namespace lora_serve::sim
