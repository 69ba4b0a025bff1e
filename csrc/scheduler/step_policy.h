#pragma once

#include <cstdint>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler/adapter_table.h"
#include "scheduler/page_table_rows.h"
#include "scheduler/request_table.h"
#include "scheduler/scheduler.h"
#include "scheduler/transfer_table.h"

namespace lora_serve {

/// One row of a step: a decision, before it is written as arrays.
struct ScheduledRow {
  Request* request_backptr = nullptr;
  std::int32_t num_tokens = 0;
  bool samples_token = false;
};

/// Totals since the scheduler was made.
struct PolicyCounters {
  std::int64_t num_preemptions = 0;
  std::int64_t num_queried_tokens = 0;   // prompt tokens of requests that started
  std::int64_t num_hit_tokens = 0;       // of these, taken from the cache
  std::int64_t num_host_hit_tokens = 0;  // of these, loaded back from the host
};

/// Decides which requests run in the next step, and moves them there. The policy in prose:
/// README.md.
///
/// Owns: nothing but counters; it borrows the cache, the rows, the adapters and the requests.
/// Does not know: plans as arrays, events, control operations.
class StepPolicy {
 public:
  /// A request that is first in line, for pages or for a place of its adapter, is overtaken by at
  /// most this many newer ones that take what it waits for.
  static constexpr std::int32_t kMaxTimesOvertaken = 16;

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
  /// Requires: no plan is outstanding.
  [[nodiscard]] std::vector<ScheduledRow> ScheduleStep();

  [[nodiscard]] const PolicyCounters& counters() const { return counters_; }

 private:
  void MakeRoomForRunning();
  // Each spends of `budget_` and appends to `scheduled_`.
  void ScheduleDecodes();
  void SchedulePrefillChunks();
  void AdmitWaiting();
  /// What became of one attempt to admit.
  enum class Attempt : std::uint8_t {
    kAdmitted,
    kNotResident,
    kInFlight,
    kLacksPlace,
    kLacksPages
  };
  [[nodiscard]] Attempt TryAdmit(Request& request, bool must_surely_fit);
  /// True when the lease has pages for all known tokens.
  [[nodiscard]] bool HasRoom(const Request& request) const;
  /// Makes room for all known tokens, at the cost of newer requests if it must. Afterwards the
  /// request has room, or waits for copies, or had to go itself.
  void MakeRoom(Request& request);
  /// True when the ends of copies will free enough for the request and for those that wait already.
  [[nodiscard]] bool AwaitsEnoughPages(const Request& request);
  void Preempt(Request& victim);
  void SchedulePrefillChunk(Request& request);
  /// Counts what a request that was never planned before has from the cache. Not at its admission:
  /// its load may fail yet, or it may lose its pages before it runs.
  void RecordStart(Request& request);

  [[nodiscard]] static bool MayBeOvertaken(const Request* request) {
    return request == nullptr || request->num_times_overtaken < kMaxTimesOvertaken;
  }

  const SchedulerOptions options_;
  const Parts parts_;
  PolicyCounters counters_;

  // Of the step being scheduled.
  std::vector<ScheduledRow> scheduled_;
  std::int32_t budget_ = 0;
  bool has_preempted_ = false;
  /// Pages that running requests lack and wait for.
  std::int64_t num_awaited_pages_ = 0;
};

}  // namespace lora_serve
