#include "scheduler_run.h"

#include <utility>

#include "common/check.h"

namespace lora_serve::bench {

void SchedulerRun::OpenAdapters(std::int64_t num_adapters) {
  for (std::int64_t id = 1; id <= num_adapters; ++id) {
    static_cast<void>(scheduler_.OpenAdapter(AdapterId(id), {.size_bytes = 1}));
  }
}

std::int64_t SchedulerRun::Add(std::int64_t adapter_id, Tokens prompt, std::int32_t max_tokens) {
  scheduler_.AddRequest({.request_id = RequestId(next_request_id_),
                         .adapter_id = AdapterId(adapter_id),
                         .prompt_token_ids = std::move(prompt),
                         .max_tokens = max_tokens});
  return next_request_id_++;
}

void SchedulerRun::Step() {
  Plan();
  TakeResult();
}

void SchedulerRun::StepAhead() {
  const bool has_earlier = std::exchange(is_outstanding_, false);
  Plan();
  if (has_earlier) Answer(plans_[1 - newest_]);
}

void SchedulerRun::TakeResult() {
  if (std::exchange(is_outstanding_, false)) Answer(plan());
}

void SchedulerRun::Plan() {
  constexpr std::int64_t kStepUs = 10'000;
  newest_ = 1 - newest_;
  now_us_ += kStepUs;
  scheduler_.NextPlan(now_us_, plans_[newest_]);
  is_outstanding_ = !plan().IsEmpty();
}

void SchedulerRun::Answer(const ExecutionPlan& plan) {
  constexpr TokenId kVocabularySize = 128'000;
  event_.plan_id = plan.plan_id;
  event_.sampled_token_ids.resize(plan.samples_token.size());
  for (std::size_t row = 0; row < plan.samples_token.size(); ++row) {
    event_.sampled_token_ids[row] = plan.samples_token[row] == 1 ? next_token_ : -1;
    next_token_ = (next_token_ + 1) % kVocabularySize;
  }
  event_.is_finished.assign(plan.samples_token.size(), 0);
  event_.loaded_adapter_ids = plan.load_adapter_ids;
  event_.completed_transfer_ids = plan.transfer_ids;
  scheduler_.Advance(event_);
}

void SchedulerRun::AbortRunning() {
  TakeResult();
  for (const std::int64_t id : plan().request_ids) {
    static_cast<void>(scheduler_.Abort(RequestId(id)));
  }
}

}  // namespace lora_serve::bench
