#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler/adapter_table.h"
#include "scheduler/page_table_rows.h"
#include "scheduler/request_table.h"
#include "scheduler/scheduler.h"
#include "scheduler/step_policy.h"
#include "scheduler/transfer_table.h"

namespace lora_serve {

/// What is remembered of a plan until its event comes.
struct OutstandingPlan {
  PlanId id;
  std::vector<ScheduledRow> rows;
  std::vector<AdapterId> loads;
  std::vector<AdapterId> drained;
};

/// The scheduler's parts and the order of their calls; each file of scheduler_*.cc holds one side
/// of it. Members stand in the order of lifetime: leases and rows die with `requests_`, before what
/// they belong to.
class Scheduler::Impl {
 public:
  explicit Impl(const SchedulerOptions& options);

  // scheduler_control.cc
  void OpenAdapter(AdapterId adapter_id, const AdapterOptions& options);
  void DrainAdapter(AdapterId adapter_id);
  void AddRequest(NewRequest&& request);
  bool Abort(RequestId request_id);

  // scheduler_step.cc
  const ExecutionPlan& NextPlan(std::int64_t now_us);
  void NextPlan(std::int64_t now_us, ExecutionPlan& plan);
  void Advance(const ExecutionEvent& event);
  [[nodiscard]] bool HasWork() const;

  // scheduler_stats.cc
  [[nodiscard]] SchedulerStats Stats() const;
  void CheckInvariants() const;

  [[nodiscard]] const SchedulerOptions& options() const { return options_; }

 private:
  /// Plans whose events have not returned. Overlap will allow two.
  static constexpr std::size_t kMaxOutstandingPlans = 1;

  [[nodiscard]] bool IsInOutstandingPlan(const Request& request) const {
    return request.last_plan_id > newest_ended_plan_;
  }
  /// Starts what the write policy wants to be copied now, and notes which pages that holds back.
  void StartWriteBacks();
  /// Notes a plan that owes an Advance.
  void Remember(const ExecutionPlan& plan, std::vector<ScheduledRow> rows);
  void AdvanceRow(const ScheduledRow& row, TokenId sampled_token, bool is_finished);
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
  StepPolicy policy_;
  std::deque<OutstandingPlan> outstanding_;
  bool has_write_back_failed_ = false;  // since the last plan
  ExecutionPlan own_plan_;
  PlanId newest_ended_plan_ = kNoPlan;
  std::int64_t next_plan_id_ = 0;
  std::int64_t last_now_us_ = 0;
};

}  // namespace lora_serve
