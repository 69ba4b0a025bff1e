#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "support/scheduler_harness.h"

namespace lora_serve::testing {

/// What the random runs met, so that a test fails when it no longer meets what it is for.
struct RandomCoverage {
  std::int64_t num_steps = 0;
  std::int64_t num_requests = 0;
  std::int64_t num_chunks = 0;
  std::int64_t num_preemptions = 0;
  /// Of a request that sat out a plan before, because the one before that was outstanding.
  std::int64_t num_sit_outs = 0;
  std::int64_t num_evicted_pages = 0;
  std::int64_t num_hit_tokens = 0;
  std::int64_t num_unknown_tokens = 0;
  std::int64_t num_late_finishes = 0;
  std::int64_t num_late_aborts = 0;
  std::int64_t num_other_aborts = 0;
  std::int64_t num_expired = 0;
  std::int64_t num_rejected = 0;
  /// Requests that started before an elder one of their adapter and priority.
  std::int64_t num_overtakings = 0;
  std::int64_t num_padded_rows = 0;
  std::int64_t num_adapter_loads = 0;
  std::int64_t num_adapter_reloads = 0;
  std::int64_t num_adapter_evictions = 0;
  std::int64_t num_failed_loads = 0;
  /// Adapters that were to be read ahead, counted in each step.
  std::int64_t num_to_stage = 0;
  /// Of these, those that were read, for a scheduler that waits for it.
  std::int64_t num_read_ahead = 0;
  std::int64_t num_closings = 0;
  std::int64_t num_pauses = 0;
  std::int64_t num_pins = 0;
  std::int64_t num_refused_pins = 0;
  std::int64_t num_drained_adapters = 0;
  std::int64_t num_drains_with_requests = 0;
  std::int64_t num_write_backs = 0;
  std::int64_t num_load_backs = 0;
  std::int64_t num_failed_copies = 0;
  std::int64_t num_host_hit_tokens = 0;
  std::int64_t num_evicted_host_pages = 0;
  /// Steps in which nothing could run before a load or a copy had ended.
  std::int64_t num_waits = 0;

  /// Requires: at least 100,000 steps.
  void ExpectAllCasesWereMet() const;
};
std::ostream& operator<<(std::ostream& os, const RandomCoverage& coverage);

/// Random operations on a scheduler with the oracle executor, of an engine that does all it may:
/// adapters of different sizes and weights, pinned, drained, failing to load; requests with
/// priorities and deadlines, aborted at any point; copies and loads that take their time or fail;
/// reports in and without plans. The harness checks every step.
///
/// The seed alone decides what is asked of the scheduler: a request with the same id is the same
/// request with and without overlap.
class RandomSchedulerRun {
 public:
  RandomSchedulerRun(std::uint64_t seed, Overlap overlap, RandomCoverage* coverage);

  /// `num_steps` steps with operations, then as many as it takes until nothing is left.
  void Run(std::int64_t num_steps);

  [[nodiscard]] const SchedulerHarness& harness() const { return harness_; }
  /// Called with every plan.
  std::function<void(const RecordedPlan&)> on_plan;
  /// Ids of requests are multiples of it.
  std::int64_t request_id_factor = 1;

 private:
  /// Numbers that decide what is asked (script), and when and how the executor answers (timing).
  struct Random {
    explicit Random(std::uint64_t seed) : engine(seed) {}
    std::int32_t Below(std::int32_t limit) {
      return static_cast<std::int32_t>(engine() % static_cast<std::uint64_t>(limit));
    }
    bool Chance(std::int32_t percent) { return Below(100) < percent; }
    template <typename T>
    const T& Pick(const std::vector<T>& values) {
      return values[static_cast<std::size_t>(Below(static_cast<std::int32_t>(values.size())))];
    }
    std::mt19937_64 engine;
  };

  [[nodiscard]] SchedulerOptions MakeOptions();
  void AddTiers(SchedulerOptions& options);
  void AddAdapterMemory(SchedulerOptions& options);
  void AddLimits(SchedulerOptions& options);
  [[nodiscard]] Outcome CopyOutcomeNow();
  [[nodiscard]] Outcome LoadOutcomeNow(AdapterId id);

  void Operate();
  void OpenAdapter();
  void ChangeAdapter(AdapterId id);
  void DrainAdapter(AdapterId id);
  [[nodiscard]] bool IsOpen(AdapterId id) const {
    return !refused_.contains(id) && !harness_.failed().contains(id);
  }
  void AddRequest();
  [[nodiscard]] NewRequest MakeRequest(std::int64_t id);
  [[nodiscard]] std::vector<TokenId> MakeRequestPrompt();
  void AbortOne();
  [[nodiscard]] std::vector<std::int64_t> LiveRequests(AdapterId adapter) const;

  void Step(bool with_operations);
  void OperateBesidePlans();
  void CheckEmptyPlan(const RecordedPlan& plan, bool had_work);
  void CheckReadAhead();
  void ReadAhead();
  void GiveUpFailed();
  void CountStarts(const RecordedPlan& plan);
  void FinishAll();
  void CountTotals();

  Random script_;
  Random timing_;
  RandomCoverage& coverage_;
  std::int32_t max_adapter_bytes_ = 1;  // chosen with the options
  SchedulerHarness harness_;
  Overlap overlap_;
  std::vector<std::vector<TokenId>> shared_prefixes_;
  /// Prompts that later requests take up again.
  std::vector<std::vector<TokenId>> old_prompts_;
  /// As the script has it: their load may have failed meanwhile.
  std::vector<AdapterId> open_;
  /// Of these, with what was pinned they could never have fit.
  std::set<AdapterId> refused_;
  std::set<AdapterId> failing_;
  std::set<AdapterId> given_up_;
  std::set<AdapterId> draining_;
  std::int32_t busyness_ = 0;
  std::int32_t copy_slowness_ = 0;  // percent of the events that a copy stays under way
  std::int32_t copy_failures_ = 0;  // percent of the copies
  std::int32_t load_slowness_ = 0;
  std::int64_t next_adapter_id_ = 1;
  std::int64_t next_request_id_ = 0;
};

}  // namespace lora_serve::testing
