#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "common/strong_id.h"
#include "scheduler/adapter_table.h"
#include "scheduler/request.h"

namespace lora_serve {

/// All live requests, and the lists that the policy walks.
///
/// Owns: the requests. Every change of a request's state goes through here, so that its state, its
/// list and its adapter's counts always change together. Does not know: pages, plans, policy.
///
/// Invariants: a request is in exactly one list: `queued` iff Queued, `preempted` iff Preempted,
/// `running` iff it holds a row. The first two are ordered by arrival, `running` by admission.
class RequestTable {
 public:
  /// Waiting requests by arrival number: iterated in that order, erased in O(log n).
  using WaitingList = std::map<std::int64_t, Request*>;

  /// `adapters` must outlive the table.
  explicit RequestTable(AdapterTable* adapters) : adapters_backptr_(adapters) {}
  RequestTable(const RequestTable&) = delete;
  RequestTable& operator=(const RequestTable&) = delete;

  [[nodiscard]] Request* Find(RequestId id) const;
  [[nodiscard]] bool IsEmpty() const { return requests_.empty(); }
  [[nodiscard]] const WaitingList& queued() const { return queued_; }
  [[nodiscard]] const WaitingList& preempted() const { return preempted_; }
  [[nodiscard]] const std::vector<Request*>& running() const { return running_; }
  /// Who gives its pages to `request`: of the running requests that arrived after it the last one
  /// that computes, else the last one whose pages are being loaded (they are not free before their
  /// copy's event), else `request` itself. Never one that is being aborted.
  [[nodiscard]] Request& VictimFor(Request& request) const;
  /// The request that waits for this copy; nullptr when it has ended or was preempted meanwhile, or
  /// when the copy goes to the host. Complexity: O(running requests).
  [[nodiscard]] Request* FindLoading(TransferId id) const;

  // --- Moves: each is one event of the transition table, and throws InternalError where that says
  // so ------
  void Add(NewRequest&& request, Adapter& adapter, NamespaceHandle namespace_handle);
  void Admit(Request& request, OwnedRow row, Lease lease);
  void CompleteLoad(Request& request);
  void FailLoad(Request& request);
  void Preempt(Request& request);
  void AbortInPlan(Request& request);
  /// The request is destroyed, after everything it owned was given back.
  void Abort(Request& request);
  void Finish(Request& request);

  /// Throws: InternalError.
  void CheckInvariants() const;

 private:
  void Erase(Request& request, RequestList from);

  AdapterTable* adapters_backptr_;
  std::unordered_map<RequestId, std::unique_ptr<Request>>
      requests_;  // looked up only, never iterated
  WaitingList queued_;
  WaitingList preempted_;
  std::vector<Request*> running_;
  std::int64_t next_arrival_number_ = 0;
};

}  // namespace lora_serve
