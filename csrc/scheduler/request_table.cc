#include "scheduler/request_table.h"

#include <algorithm>
#include <set>
#include <utility>

#include "common/check.h"

namespace lora_serve {
namespace {

RequestList ListOf(const Request& request) {
  if (request.Is<Queued>()) return RequestList::kQueued;
  if (request.Is<Preempted>()) return RequestList::kPreempted;
  return request.IsRunning() ? RequestList::kRunning : RequestList::kNone;
}

}  // namespace

Request* RequestTable::Find(RequestId id) const {
  const auto it = requests_.find(id);
  return it == requests_.end() ? nullptr : it->second.get();
}

Request& RequestTable::VictimFor(Request& request) const {
  Request* newest = nullptr;
  Request* newest_loading = nullptr;
  for (Request* other : running_) {
    if (other->Is<Aborting>() || other->arrival_number() <= request.arrival_number()) continue;
    Request*& found = other->Is<Loading>() ? newest_loading : newest;
    if (found == nullptr || other->arrival_number() > found->arrival_number()) found = other;
  }
  if (newest != nullptr) return *newest;
  return newest_loading != nullptr ? *newest_loading : request;
}

Request* RequestTable::FindLoading(TransferId id) const {
  const auto it = std::find_if(running_.begin(), running_.end(), [id](const Request* request) {
    return request->Is<Loading>() && request->running().lease.load_back_id() == id;
  });
  return it == running_.end() ? nullptr : *it;
}

void RequestTable::Add(NewRequest&& request, Adapter& adapter, NamespaceHandle namespace_handle) {
  const RequestId id = request.request_id;
  const std::int64_t arrival_number = next_arrival_number_++;
  auto owned = std::make_unique<Request>(std::move(request), arrival_number, &adapter,
                                         std::move(namespace_handle));
  queued_.emplace(arrival_number, owned.get());
  requests_.emplace(id, std::move(owned));
  adapters_backptr_->MoveRequest(adapter, RequestList::kNone, RequestList::kQueued);
}

void RequestTable::Admit(Request& request, OwnedRow row, Lease lease) {
  const RequestList from = ListOf(request);
  request.Take(request_event::Admit{std::move(row), std::move(lease)});
  (from == RequestList::kQueued ? queued_ : preempted_).erase(request.arrival_number());
  running_.push_back(&request);
  adapters_backptr_->MoveRequest(request.adapter(), from, RequestList::kRunning);
}

void RequestTable::CompleteLoad(Request& request) { request.Take(request_event::CompleteLoad{}); }

void RequestTable::FailLoad(Request& request) { request.Take(request_event::FailLoad{}); }

void RequestTable::Preempt(Request& request) {
  request.Take(request_event::Preempt{});
  std::erase(running_, &request);
  preempted_.emplace(request.arrival_number(), &request);
  adapters_backptr_->MoveRequest(request.adapter(), RequestList::kRunning, RequestList::kPreempted);
}

void RequestTable::AbortInPlan(Request& request) { request.Take(request_event::AbortInPlan{}); }

void RequestTable::Abort(Request& request) {
  const RequestList from = ListOf(request);
  request.Take(request_event::Abort{});
  Erase(request, from);
}

void RequestTable::Finish(Request& request) {
  const RequestList from = ListOf(request);
  request.Take(request_event::Finish{});
  Erase(request, from);
}

void RequestTable::Erase(Request& request, RequestList from) {
  Adapter& adapter = request.adapter();
  switch (from) {
    case RequestList::kQueued:
      queued_.erase(request.arrival_number());
      break;
    case RequestList::kPreempted:
      preempted_.erase(request.arrival_number());
      break;
    case RequestList::kRunning:
      std::erase(running_, &request);
      break;
    case RequestList::kNone:
      LS_CHECK(false, "request ", request.id(), " is in no list");
  }
  requests_.erase(request.id());
  // Last: the adapter's drain completes only when the request's handle and lease are gone.
  adapters_backptr_->MoveRequest(adapter, from, RequestList::kNone);
}

void RequestTable::CheckInvariants() const {
  struct Counts {
    std::int64_t queued = 0;
    std::int64_t preempted = 0;
    std::int64_t running = 0;
  };
  std::map<AdapterId, Counts> counts;
  for (const auto& [arrival_number, request] : queued_) {
    LS_CHECK(request->Is<Queued>(), "request ", request->id(), " is ", StateName(request->state()));
    ++counts[request->adapter().id].queued;
  }
  for (const auto& [arrival_number, request] : preempted_) {
    LS_CHECK(request->Is<Preempted>(), "request ", request->id(), " is ",
             StateName(request->state()));
    ++counts[request->adapter().id].preempted;
  }
  std::set<PageTableRow> rows;
  for (const Request* request : running_) {
    LS_CHECK(request->IsRunning(), "request ", request->id(), " is ", StateName(request->state()));
    LS_CHECK(rows.insert(request->running().row.row()).second,
             "two requests in one page-table row");
    ++counts[request->adapter().id].running;
  }
  const std::size_t num_listed = queued_.size() + preempted_.size() + running_.size();
  LS_CHECK(num_listed == requests_.size(), num_listed, " requests listed, ", requests_.size(),
           " live");
  for (const auto& [id, adapter] : adapters_backptr_->adapters()) {
    const Counts& found = counts[id];
    LS_CHECK(adapter.num_queued_requests == found.queued, "adapter ", id, " queued ", found.queued);
    LS_CHECK(adapter.num_preempted_requests == found.preempted, "adapter ", id, " preempted ",
             found.preempted);
    LS_CHECK(adapter.num_running_requests == found.running, "adapter ", id, " running ",
             found.running);
  }
}

}  // namespace lora_serve
