#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/strong_id.h"
#include "scheduler/adapter_table.h"
#include "scheduler/request.h"

namespace lora_serve {

/// All live requests, and the lists that the policy walks.
///
/// Owns: the requests. Every change of a request's state goes through here, so that its state, its
/// list and its adapter's lists always change together. Does not know: pages, plans, policy.
///
/// Invariants: a request is in exactly one list: its adapter's queue iff Queued, `preempted` iff
/// Preempted, `running` iff it holds a row. The first two are ordered by seniority, `running` by
/// admission.
class RequestTable {
 public:
  using WaitingList = std::map<Seniority, Request*>;

  /// `adapters` must outlive the table.
  RequestTable(AdapterTable* adapters, const SchedulerOptions& options)
      : adapters_backptr_(adapters),
        priority_ageing_us_(options.priority_ageing_us),
        max_num_batched_tokens_(options.max_num_batched_tokens) {}
  RequestTable(const RequestTable&) = delete;
  RequestTable& operator=(const RequestTable&) = delete;

  [[nodiscard]] Request* Find(RequestId id) const;
  [[nodiscard]] bool IsEmpty() const { return requests_.empty(); }
  [[nodiscard]] std::int64_t num_queued() const { return num_queued_; }
  /// Prompt tokens of the queued ones.
  [[nodiscard]] std::int64_t num_queued_tokens() const { return num_queued_tokens_; }
  [[nodiscard]] const WaitingList& preempted() const { return preempted_; }
  [[nodiscard]] const std::vector<Request*>& running() const { return running_; }
  /// Who gives its pages to `request`: of the running requests that it is senior to the most junior
  /// one that computes, else the most junior one whose pages are being loaded (they are not free
  /// before their copy's event), else `request` itself. Never one that is ending, or of `spared`.
  [[nodiscard]] Request& VictimFor(Request& request, std::span<Request* const> spared) const;
  /// The most steps that it takes until its last token, without waiting for pages: its chunks of
  /// the prompt if it has a step for itself, and a step for each output token that is not planned.
  [[nodiscard]] std::int64_t NumRemainingSteps(const Request& request) const;
  /// The queued request whose deadline passes first; nullptr when none has one before `now_us`.
  [[nodiscard]] Request* FindExpired(std::int64_t now_us) const;
  /// The request that waits for this copy; nullptr when it has ended or was preempted meanwhile, or
  /// when the copy goes to the host. Complexity: O(running requests).
  [[nodiscard]] Request* FindLoading(TransferId id) const;

  // --- Moves: one event of the transition table each; where that says so, InternalError ---------
  /// Requires: `request.arrival_us` is set.
  void Add(NewRequest&& request, Adapter& adapter, NamespaceHandle namespace_handle);
  void Admit(Request& request, OwnedRow row, Lease lease);
  void CompleteLoad(Request& request);
  void FailLoad(Request& request);
  void Preempt(Request& request);
  void AbortInPlan(Request& request);
  void FinishInPlan(Request& request);
  /// The request is destroyed, after everything it owned was given back.
  void Abort(Request& request);
  void Finish(Request& request);

  /// Throws: InternalError.
  void CheckInvariants() const;

 private:
  void Erase(Request& request, RequestList from);

  /// Out of the lists and counts that hold what waits for its first admission.
  void LeaveQueue(const Request& request);

  AdapterTable* adapters_backptr_;
  const std::int64_t priority_ageing_us_;
  const std::int32_t max_num_batched_tokens_;
  std::unordered_map<RequestId, std::unique_ptr<Request>>
      requests_;  // looked up only, never iterated
  WaitingList preempted_;
  std::vector<Request*> running_;
  struct Deadline {
    std::int64_t deadline_us = 0;
    std::int64_t arrival_number = 0;
    Request* request_backptr = nullptr;
    friend bool operator<(const Deadline& a, const Deadline& b) {
      return std::pair(a.deadline_us, a.arrival_number) <
             std::pair(b.deadline_us, b.arrival_number);
    }
  };
  std::set<Deadline> deadlines_;  // of the queued requests that have one
  std::int64_t num_queued_ = 0;
  std::int64_t num_queued_tokens_ = 0;
  std::int64_t next_arrival_number_ = 0;
};

}  // namespace lora_serve
