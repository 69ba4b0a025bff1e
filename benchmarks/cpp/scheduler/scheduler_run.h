#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/scheduler.h"
#include "support/fixture.h"

namespace lora_serve::bench {

inline constexpr std::int32_t kPageSize = 16;

/// A scheduler, and an executor that does nothing: it makes tokens up, and every load and copy is
/// done in the step that orders it.
class SchedulerRun {
 public:
  explicit SchedulerRun(const SchedulerOptions& options) : scheduler_(options) {}

  Scheduler& scheduler() { return scheduler_; }
  /// The newest plan.
  [[nodiscard]] const ExecutionPlan& plan() const { return plans_[newest_]; }

  /// Opens adapters 1 to `num_adapters`, of one byte each.
  void OpenAdapters(std::int64_t num_adapters);
  /// Returns the new request's id.
  std::int64_t Add(std::int64_t adapter_id, Tokens prompt, std::int32_t max_tokens);

  /// Plans a step and takes its result.
  void Step();
  /// Plans a step, then takes the result of the one before, as the engine does while it overlaps.
  void StepAhead();
  /// Takes the result of the plan that is outstanding, if there is one.
  void TakeResult();
  /// Ends all requests of the newest plan.
  void AbortRunning();

 private:
  void Plan();
  void Answer(const ExecutionPlan& plan);

  Scheduler scheduler_;
  ExecutionPlan plans_[2];
  std::size_t newest_ = 0;
  bool is_outstanding_ = false;
  ExecutionEvent event_;
  std::int64_t now_us_ = 0;
  std::int64_t next_request_id_ = 0;
  TokenId next_token_ = 0;
};

}  // namespace lora_serve::bench
