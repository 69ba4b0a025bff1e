#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "scheduler/scheduler.h"
#include "support/oracle_executor.h"
#include "support/recorded_plan.h"
#include "support/tracked_request.h"

namespace lora_serve::testing {

/// When the next plan is asked for.
enum class Overlap : std::uint8_t {
  /// When the one before has been advanced.
  kOff,
  /// While the one before is outstanding.
  kOn,
};

/// A scheduler, an oracle executor, and the checks that hold in every step of every test:
/// the plan is well formed and within its limits, carries the right tokens, adapters and cached
/// counts, invariants hold, the pages of each tier add up, adapters on the device fit its memory,
/// and nobody leaves it while requests of it run, or with time slices, while a plan with rows of it
/// is outstanding.
class SchedulerHarness {
 public:
  explicit SchedulerHarness(const SchedulerOptions& options, Overlap overlap = Overlap::kOff);

  [[nodiscard]] Scheduler& scheduler() { return scheduler_; }
  [[nodiscard]] const Scheduler& scheduler() const { return scheduler_; }
  [[nodiscard]] OracleExecutor& executor() { return executor_; }
  [[nodiscard]] const TrackedRequest& request(std::int64_t id) const { return requests_.at(id); }
  [[nodiscard]] const std::map<std::int64_t, TrackedRequest>& requests() const { return requests_; }
  /// Ids of the requests that have not ended.
  [[nodiscard]] const std::set<std::int64_t>& live_requests() const { return live_; }
  [[nodiscard]] const std::set<AdapterId>& drained() const { return drained_; }
  /// Whose load was reported as failed.
  [[nodiscard]] const std::set<AdapterId>& failed() const { return failed_; }
  [[nodiscard]] AdapterStats StatsOf(AdapterId adapter) const;
  /// Copies that plans have given out.
  [[nodiscard]] std::int64_t num_write_backs() const { return num_write_backs_; }
  [[nodiscard]] std::int64_t num_load_backs() const { return num_load_backs_; }
  /// Rows of requests that had ended when their plan returned, by how.
  [[nodiscard]] std::int64_t num_late_finishes() const { return num_late_finishes_; }
  [[nodiscard]] std::int64_t num_late_aborts() const { return num_late_aborts_; }
  /// Input tokens that only the executor knew.
  [[nodiscard]] std::int64_t num_unknown_tokens() const { return num_unknown_tokens_; }
  [[nodiscard]] std::int64_t num_padded_rows() const { return num_padded_rows_; }
  /// Loads of adapters that had been on the device before.
  [[nodiscard]] std::int64_t num_reloads() const { return num_reloads_; }
  /// How many newer requests of its own queue passed the request that was passed most.
  [[nodiscard]] std::int32_t max_times_overtaken() const { return max_times_overtaken_; }
  [[nodiscard]] std::int64_t num_steps() const { return num_steps_; }
  [[nodiscard]] std::size_t num_outstanding() const { return outstanding_.size(); }
  [[nodiscard]] std::int64_t now_us() const { return now_us_; }
  /// The clock of the next step; each step adds one more microsecond.
  void AdvanceClock(std::int64_t us) { now_us_ += us; }

  // --- Control -----------------------------------------------------------------------------------
  bool OpenAdapter(AdapterId adapter, const AdapterOptions& options = {});
  /// Opens `adapter` and steps until it is loaded. Nothing for the base model.
  void OpenAndLoad(AdapterId adapter, const AdapterOptions& options = {});
  void SetAdapterPinned(AdapterId adapter, bool is_pinned);
  void SetAdapterStaged(AdapterId adapter, bool is_staged);

  void Add(std::int64_t id, AdapterId adapter, std::vector<TokenId> prompt, std::int32_t max_tokens,
           bool reuse_prefix = true);
  void Add(NewRequest request) { AddTogether({std::move(request)}); }
  /// All of them or, with the exception of the scheduler, none.
  void AddTogether(const std::vector<NewRequest>& requests);
  /// Aborts a live request, and makes sure that a second abort changes nothing.
  void Abort(std::int64_t id);

  // --- Steps -------------------------------------------------------------------------------------
  /// One step: a plan is made and submitted; then the oldest outstanding plan is advanced, with
  /// overlap only when two are outstanding, or the new one is empty. `between` runs before that.
  /// When no plan is outstanding, loads and copies are reported without one. Returns the plan.
  RecordedPlan Step(const std::function<void()>& between = nullptr);
  /// Advances the oldest outstanding plan.
  void AdvanceOldest();
  void AdvanceAll() {
    while (!outstanding_.empty()) AdvanceOldest();
  }
  /// Reports the loads and copies that end now without a plan; allowed at any time. Returns how
  /// many.
  std::int64_t Report();
  /// Steps until nothing is left to do; fails the test when that takes more than `max_steps`.
  void RunToEnd(std::int32_t max_steps = 10000);

  // --- What must hold in the end -----------------------------------------------------------------
  /// Every request that was not aborted and did not expire has ended with the tokens of a run
  /// alone; the others with a prefix of them.
  void ExpectRightOutputs() const;
  /// No request, lease, private page or copy is left, and every drained adapter is gone.
  void ExpectNothingLeft() const;
  /// Runs to the end, and expects all of the above and that the counters agree.
  void RunToEndAndCheck();
  /// The scheduler's totals are those that the plans and events showed.
  void ExpectCountersAgree() const;

  /// Applied to events that are good already: another order of the reports, for example.
  std::function<void(ExecutionEvent&)> change_event;

 private:
  static constexpr std::int64_t kMaxEmptyPlans = 100;  // in a row
  static constexpr std::int64_t kMaxSteps = 20000;
  static constexpr std::size_t kMaxOutstandingPlans = 2;
  static constexpr std::int32_t kMaxTimesOvertaken = 16;

  void Track(const NewRequest& request);
  void StopWhenNothingMoves(const ExecutionPlan& plan);
  void CheckState() const;
  void CheckWhoRuns(const ExecutionPlan& plan) const;
  [[nodiscard]] std::int64_t NumRunningWithRows(const ExecutionPlan& plan) const;
  void CheckPlan(const ExecutionPlan& plan);
  void CheckOvertaking(const ExecutionPlan& plan);
  /// The queue of one adapter that is in the order of arrival.
  struct Queue {
    AdapterId adapter;
    std::int32_t priority = 0;
    friend auto operator<=>(const Queue&, const Queue&) = default;
  };
  /// How often somebody has begun to wait who may be tried before a request that is now the newest
  /// of this queue.
  [[nodiscard]] std::int64_t NumBeforeIn(const Queue& queue) const;
  void CheckShape(const ExecutionPlan& plan) const;
  void CheckPadding(const ExecutionPlan& plan);
  void CheckMetadata(const ExecutionPlan& plan) const;
  void CheckTransfers(const ExecutionPlan& plan);
  void CheckAdapters(const ExecutionPlan& plan);
  void CheckEvictions(const ExecutionPlan& plan) const;
  void CheckLoads(const ExecutionPlan& plan);
  void CheckMemory() const;
  void CheckSlots(const RecordedPlan& plan) const;
  void CheckExpired(const ExecutionPlan& plan);
  [[nodiscard]] bool IsDecode(const ExecutionPlan& plan, std::size_t index) const;
  void CheckRow(const ExecutionPlan& plan, std::size_t index, std::size_t offset);
  void CheckTokens(const ExecutionPlan& plan, std::size_t index, std::size_t offset,
                   const TrackedRequest& request);
  void RecordRow(const ExecutionPlan& plan, std::size_t index, TrackedRequest& request);
  void Record(const RecordedPlan& plan, const ExecutionEvent& event);
  void RecordLoads(const ExecutionEvent& event);
  /// What an engine does when staged weights could not be read: ends those who would use them.
  void AbortBroken(const ExecutionEvent& event);
  [[nodiscard]] bool HasTimeSlices() const {
    return scheduler_.options().adapter_time_slice_steps > 0;
  }
  [[nodiscard]] bool HasStarted(AdapterId adapter) const;

  OracleExecutor executor_;
  Scheduler scheduler_;
  Overlap overlap_;
  /// The caller's plans, one more than can be outstanding.
  std::array<ExecutionPlan, kMaxOutstandingPlans + 1> plans_;
  /// What outstanding plans were when they were submitted.
  std::deque<RecordedPlan> outstanding_;
  std::map<std::int64_t, TrackedRequest> requests_;
  std::set<std::int64_t> live_;
  std::map<AdapterId, AdapterOptions> adapters_;
  std::set<AdapterId> drained_;
  std::set<AdapterId> failed_;
  /// Loads that no waiting request started, and that are under way.
  std::set<AdapterId> loading_unasked_;
  std::set<AdapterId> opened_with_room_;
  std::set<AdapterId> evicted_;
  /// Slots of drained adapters, until their plan returns.
  std::map<std::int32_t, std::int64_t> draining_slots_;
  std::int64_t now_us_ = 0;
  std::int64_t num_steps_ = 0;
  std::int64_t last_plan_id_ = -1;
  std::int64_t num_empty_plans_ = 0;
  std::int64_t next_arrival_ = 0;
  std::int64_t newest_transfer_ = -1;
  std::int64_t num_write_backs_ = 0;
  std::int64_t num_load_backs_ = 0;
  std::int64_t num_late_finishes_ = 0;
  std::int64_t num_late_aborts_ = 0;
  std::int64_t num_unknown_tokens_ = 0;
  std::int64_t num_padded_rows_ = 0;
  std::int64_t num_loads_ = 0;
  std::int64_t num_reloads_ = 0;
  std::int64_t num_failed_loads_ = 0;
  std::int64_t num_evictions_ = 0;
  std::int64_t num_rejected_ = 0;
  std::map<Queue, std::int64_t> num_in_order_;
  std::int32_t max_times_overtaken_ = 0;
};

}  // namespace lora_serve::testing
