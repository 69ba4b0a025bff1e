#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler/adapter_table.h"
#include "scheduler/admission_order.h"
#include "scheduler/page_table_rows.h"
#include "scheduler/request_table.h"
#include "scheduler/scheduler_options.h"
#include "scheduler/transfer_table.h"

namespace lora_serve {

/// One row of a step: a decision, before it is written as arrays.
struct ScheduledRow {
  Request* request_backptr = nullptr;
  std::int32_t num_tokens = 0;
  /// Of its first token in the sequence. Tokens from request.num_tokens() on are known to the
  /// executor only.
  std::int32_t position = 0;
  bool samples_token = false;
};

/// Totals since the scheduler was made.
struct PolicyCounters {
  std::int64_t num_preemptions = 0;
  std::int64_t num_started = 0;
  std::int64_t total_queue_us = 0;
  std::int64_t num_queried_tokens = 0;   // prompt tokens of requests that started
  std::int64_t num_hit_tokens = 0;       // of these, taken from the cache
  std::int64_t num_host_hit_tokens = 0;  // of these, loaded back from the host
  std::int64_t num_decode_rows = 0;
  std::int64_t num_prefill_rows = 0;
  std::int64_t num_prefill_tokens = 0;
};

/// Decides which requests run in the next step, and moves them there. The policy in prose:
/// README.md.
///
/// Owns: nothing but counters; it borrows the cache, the rows, the adapters and the requests.
/// Does not know: plans as arrays, events, control operations, which adapters should be resident.
class StepPolicy {
 public:
  /// The scheduler's parts, which must outlive the policy.
  struct Parts {
    KVPrefixCache* cache = nullptr;
    PageTableRows* rows = nullptr;
    AdapterTable* adapters = nullptr;
    RequestTable* requests = nullptr;
    TransferTable* transfers = nullptr;
  };
  StepPolicy(const SchedulerOptions& options, const Parts& parts);

  /// The rows of the next step: decodes, then prefill chunks, each in the order of admission.
  /// Requests with `last_plan_id` above `newest_ended_plan` are in a plan that has not returned:
  /// they may get a row, but are not preempted.
  /// `newcomers`: adapters without started requests, in the order in which they may take a place.
  [[nodiscard]] std::vector<ScheduledRow> ScheduleStep(std::int64_t now_us,
                                                       PlanId newest_ended_plan,
                                                       std::span<Adapter* const> newcomers);

  [[nodiscard]] const PolicyCounters& counters() const { return counters_; }

 private:
  // Each spends of `budget_` and appends to `scheduled_`.
  void ScheduleDecodes();
  void SchedulePrefillChunks();
  void AdmitWaiting(std::span<Adapter* const> newcomers);
  void AddRow(Request& request, std::int32_t num_tokens);
  void AddPrefillChunk(Request& request);
  /// Counts what a request that was never planned before has from the cache. Not at its admission:
  /// its load may fail yet, or it may lose its pages before it runs.
  void RecordStart(Request& request);

  // --- Room for those that run -----------------------------------------------------------------
  /// True when the next plan shall have a row of it, if it has room.
  [[nodiscard]] bool IsToRun(const Request& request) const;
  void MakeRoomForRunning();
  /// True when the lease has pages for all tokens of the sequence.
  [[nodiscard]] bool HasRoom(const Request& request) const;
  /// Makes room for them, at the cost of juniors if it must. Afterwards the request has room, or
  /// waits for copies or for a plan to return, or had to go itself.
  void MakeRoom(Request& request);
  /// True when the ends of copies and of outstanding plans will free enough for the request and for
  /// those that wait already.
  [[nodiscard]] bool AwaitsEnoughPages(const Request& request);
  /// True when the next plan has no row of it, so that its pages can be taken after that.
  [[nodiscard]] bool SitsOut(const Request& request) const;
  void Preempt(Request& victim);

  // --- Admission -------------------------------------------------------------------------------
  enum class Attempt : std::uint8_t { kAdmitted, kInFlight, kLacksPages };
  /// Tries the queued requests of these adapters. False when nobody else may be admitted.
  bool AdmitQueued(std::span<Adapter* const> adapters);
  /// Tries one and notes what it means for the others. False when nobody else may be admitted.
  bool TryInLine(Request& request);
  [[nodiscard]] Attempt TryAdmit(Request& request);
  [[nodiscard]] static bool MayBeOvertaken(const Request* request) {
    return request == nullptr || request->num_times_overtaken < AdmissionOrder::kMaxTimesOvertaken;
  }

  const SchedulerOptions options_;
  const Parts parts_;
  AdmissionOrder order_;
  PolicyCounters counters_;

  // Of the step being scheduled.
  std::int64_t now_us_ = 0;
  PlanId newest_ended_plan_{-1};
  std::vector<ScheduledRow> scheduled_;
  std::int32_t budget_ = 0;
  bool has_preempted_ = false;
  /// Pages that running requests lack and wait for.
  std::int64_t num_awaited_pages_ = 0;
  /// Victims that a plan still touches, and the pages that they will give.
  std::vector<Request*> sitting_out_;
  std::int64_t num_sitting_out_pages_ = 0;
  /// The first in line that lacks pages.
  Request* lacks_pages_ = nullptr;
};

}  // namespace lora_serve
