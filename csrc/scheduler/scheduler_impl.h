#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler/adapter_residency.h"
#include "scheduler/adapter_table.h"
#include "scheduler/page_table_rows.h"
#include "scheduler/plan_builder.h"
#include "scheduler/request_table.h"
#include "scheduler/scheduler.h"
#include "scheduler/step_policy.h"
#include "scheduler/transfer_table.h"

namespace lora_serve {

/// What is remembered of a plan until its event comes.
struct OutstandingPlan {
  PlanId id;
  std::vector<ScheduledRow> rows;
  std::vector<AdapterId> drained;
  /// Loads of staged adapters, which are over with the plan.
  std::vector<AdapterId> staged_loads;
};

/// The scheduler's parts and the order of their calls; each file of scheduler_*.cc holds one side
/// of it. Members stand in the order of lifetime: leases and rows die with `requests_`, before what
/// they belong to.
class Scheduler::Impl {
 public:
  explicit Impl(const SchedulerOptions& options);

  // scheduler_control.cc
  bool OpenAdapter(AdapterId adapter_id, const AdapterOptions& options);
  void SetAdapterPinned(AdapterId adapter_id, bool is_pinned);
  void SetAdapterStaged(AdapterId adapter_id, bool is_staged);
  [[nodiscard]] std::vector<AdapterId> AdaptersToStage() const { return residency_.ToStage(); }
  [[nodiscard]] std::vector<AdapterId> WaitingAdapters(std::span<const AdapterId> ids) const {
    return residency_.Waiting(ids);
  }
  void SetAdapterWeight(AdapterId adapter_id, double weight);
  void DrainAdapter(AdapterId adapter_id);
  void AddRequests(std::vector<NewRequest>&& requests);
  bool Abort(RequestId request_id);

  // scheduler_step.cc
  const ExecutionPlan& NextPlan(std::int64_t now_us);
  void NextPlan(std::int64_t now_us, ExecutionPlan& plan);
  void Advance(const ExecutionEvent& event);
  [[nodiscard]] bool HasWork() const;

  // scheduler_stats.cc
  void SetEventsEnabled(bool is_enabled) { cache_.SetEventsEnabled(is_enabled); }
  std::vector<AdapterKVEvent> TakeEvents();
  [[nodiscard]] SchedulerCounters Counters() const;
  [[nodiscard]] SchedulerStats Stats() const;
  void CheckInvariants() const;

  [[nodiscard]] const SchedulerOptions& options() const { return options_; }

 private:
  /// Plans whose events have not returned: one that runs, and the next one.
  static constexpr std::size_t kMaxOutstandingPlans = 2;

  /// Throws: CapacityError when with all of them a limit on what waits and runs is exceeded.
  void CheckLimits(std::span<const NewRequest> requests,
                   const std::map<AdapterId, std::int64_t>& num_of_adapter);
  [[nodiscard]] bool IsInOutstandingPlan(const Request& request) const {
    return request.last_plan_id > newest_ended_plan_;
  }
  /// Ends the queued requests whose deadline has passed, and lists them in the plan.
  void ExpireRequests(ExecutionPlan& plan);
  /// Starts what the write policy wants to be copied now, and notes which pages that holds back.
  void StartWriteBacks();
  /// Notes a plan that owes an Advance.
  void Remember(const ExecutionPlan& plan, std::vector<ScheduledRow> rows,
                std::span<const Adapter* const> loads);
  /// `plan_id`: whose row it is.
  void AdvanceRow(PlanId plan_id, const ScheduledRow& row, TokenId sampled_token, bool is_finished);
  void AdvanceLoads(const ExecutionEvent& event, std::span<const AdapterId> staged_loads);
  /// Ends a request by one of the table's moves, and notes which of its pages copies hold back.
  void End(Request& request, void (RequestTable::*move)(Request&));
  void AdvanceTransfers(const ExecutionEvent& event);
  void EndTransfer(TransferId id, bool has_failed);
  void PublishComputed(Request& request);

  const SchedulerOptions options_;
  KVPrefixCache cache_;
  TransferTable transfers_;
  PageTableRows rows_;
  AdapterTable adapters_;
  RequestTable requests_;
  AdapterResidency residency_;
  StepPolicy policy_;
  PlanBuilder plan_builder_;
  std::deque<OutstandingPlan> outstanding_;
  bool has_write_back_failed_ = false;  // since the last plan
  ExecutionPlan own_plan_;
  PlanId newest_ended_plan_ = kNoPlan;
  std::int64_t next_plan_id_ = 0;
  std::int64_t last_now_us_ = 0;
  bool is_stuck_ = false;          // no rows since a plan was empty although nothing was under way
  bool nobody_could_run_ = false;  // in the last plan or one before it, but there were requests

  // What the parts do not count, since the scheduler was made.
  std::int64_t num_finished_requests_ = 0;
  std::int64_t num_aborted_requests_ = 0;
  std::int64_t num_expired_requests_ = 0;
  std::int64_t num_rejected_requests_ = 0;
  std::int64_t num_adapter_loads_ = 0;
  std::int64_t num_failed_adapter_loads_ = 0;
  std::int64_t num_adapter_evictions_ = 0;
  std::int64_t num_step_adapters_ = 0;
};

}  // namespace lora_serve
