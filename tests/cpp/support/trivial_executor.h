#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "scheduler/scheduler.h"
#include "support/scheduler_harness.h"

namespace lora_serve::testing {

/// Steps a scheduler with an executor that computes nothing: every token that a plan samples is the
/// same, no request ends before max_tokens, loads end `num_load_steps` steps after their plan, and
/// copies with it. Cheap, for long simulations; nothing is checked.
class TrivialExecutor {
 public:
  TrivialExecutor(Scheduler* scheduler, Overlap overlap, std::int64_t num_load_steps = 0)
      : scheduler_backptr_(scheduler), overlap_(overlap), num_load_steps_(num_load_steps) {}

  /// One plan, which stays valid until the next one; and the event of the oldest outstanding plan.
  const ExecutionPlan& Step() {
    ++num_steps_;
    const ExecutionPlan& plan = scheduler_backptr_->NextPlan(num_steps_);
    for (const std::int64_t id : plan.load_adapter_ids) {
      loads_.push_back({id, num_steps_ + num_load_steps_});
    }
    if (!plan.IsEmpty()) events_.push_back(EventOf(plan));
    if (events_.empty()) {
      ExecutionEvent event;
      ReportLoads(event);
      if (!event.loaded_adapter_ids.empty()) scheduler_backptr_->Advance(event);
    } else if (overlap_ == Overlap::kOff || plan.IsEmpty() || events_.size() == 2) {
      ReportLoads(events_.front());
      scheduler_backptr_->Advance(events_.front());
      events_.pop_front();
    }
    return plan;
  }

  [[nodiscard]] std::int64_t num_steps() const { return num_steps_; }

 private:
  static constexpr TokenId kToken = 1;
  struct Load {
    std::int64_t adapter_id = 0;
    std::int64_t due_step = 0;
  };

  static ExecutionEvent EventOf(const ExecutionPlan& plan) {
    ExecutionEvent event;
    event.plan_id = plan.plan_id;
    for (const std::uint8_t samples : plan.samples_token) {
      event.sampled_token_ids.push_back(samples == 1 ? kToken : -1);
    }
    event.is_finished.assign(plan.samples_token.size(), 0);
    event.completed_transfer_ids = plan.transfer_ids;
    return event;
  }
  /// Those of later plans, too, wait for their own event at least.
  void ReportLoads(ExecutionEvent& event) {
    const std::int64_t newest = num_steps_ - (events_.size() > 1 ? 1 : 0);
    while (!loads_.empty() && loads_.front().due_step <= newest) {
      event.loaded_adapter_ids.push_back(loads_.front().adapter_id);
      loads_.pop_front();
    }
  }

  Scheduler* scheduler_backptr_;
  Overlap overlap_;
  std::int64_t num_load_steps_;
  std::deque<ExecutionEvent> events_;
  std::deque<Load> loads_;
  std::int64_t num_steps_ = 0;
};

}  // namespace lora_serve::testing
