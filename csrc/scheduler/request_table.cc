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

Request& RequestTable::VictimFor(Request& request, std::span<Request* const> spared) const {
  Request* junior = nullptr;
  Request* junior_loading = nullptr;
  for (Request* other : running_) {
    if (other->IsEnding() || other->seniority() <= request.seniority() ||
        std::ranges::find(spared, other) != spared.end()) {
      continue;
    }
    Request*& found = other->Is<Loading>() ? junior_loading : junior;
    if (found == nullptr || other->seniority() > found->seniority()) found = other;
  }
  if (junior != nullptr) return *junior;
  return junior_loading != nullptr ? *junior_loading : request;
}

std::int64_t RequestTable::NumRemainingSteps(const Request& request) const {
  const std::int32_t num_missing =
      request.IsRunning() ? request.num_unplanned_tokens() : request.num_tokens();
  const std::int64_t num_chunks =
      request.IsRunning() && request.DecodesNext()
          ? 0
          : (num_missing + max_num_batched_tokens_ - 1) / max_num_batched_tokens_;
  return num_chunks + request.num_unplanned_output_tokens();
}

Request* RequestTable::FindExpired(std::int64_t now_us) const {
  if (deadlines_.empty() || deadlines_.begin()->deadline_us > now_us) return nullptr;
  return deadlines_.begin()->request_backptr;
}

Request* RequestTable::FindLoading(TransferId id) const {
  const auto it = std::find_if(running_.begin(), running_.end(), [id](const Request* request) {
    return request->Is<Loading>() && request->running().lease.load_back_id() == id;
  });
  return it == running_.end() ? nullptr : *it;
}

void RequestTable::Add(NewRequest&& request, Adapter& adapter, NamespaceHandle namespace_handle) {
  const RequestId id = request.request_id;
  const Seniority seniority = {
      .virtual_arrival_us = request.arrival_us + request.priority * priority_ageing_us_,
      .arrival_number = next_arrival_number_++};
  auto owned = std::make_unique<Request>(std::move(request), seniority, &adapter,
                                         std::move(namespace_handle));
  Request& added = *owned;
  requests_.emplace(id, std::move(owned));
  ++num_queued_;
  num_queued_tokens_ += added.num_prompt_tokens();
  if (added.deadline_us() != kNoDeadline) {
    deadlines_.insert({added.deadline_us(), seniority.arrival_number, &added});
  }
  adapters_backptr_->MoveRequest(added, RequestList::kNone, RequestList::kQueued);
}

void RequestTable::LeaveQueue(const Request& request) {
  --num_queued_;
  num_queued_tokens_ -= request.num_prompt_tokens();
  if (request.deadline_us() != kNoDeadline) {
    deadlines_.erase({request.deadline_us(), request.seniority().arrival_number, nullptr});
  }
}

void RequestTable::Admit(Request& request, OwnedRow row, Lease lease) {
  const RequestList from = ListOf(request);
  request.Take(request_event::Admit{std::move(row), std::move(lease)});
  if (from == RequestList::kQueued) {
    LeaveQueue(request);
  } else {
    preempted_.erase(request.seniority());
  }
  running_.push_back(&request);
  adapters_backptr_->MoveRequest(request, from, RequestList::kRunning);
}

void RequestTable::CompleteLoad(Request& request) { request.Take(request_event::CompleteLoad{}); }

void RequestTable::FailLoad(Request& request) { request.Take(request_event::FailLoad{}); }

void RequestTable::Preempt(Request& request) {
  request.Take(request_event::Preempt{});
  std::erase(running_, &request);
  preempted_.emplace(request.seniority(), &request);
  adapters_backptr_->MoveRequest(request, RequestList::kRunning, RequestList::kPreempted);
}

void RequestTable::AbortInPlan(Request& request) { request.Take(request_event::AbortInPlan{}); }

void RequestTable::FinishInPlan(Request& request) { request.Take(request_event::FinishInPlan{}); }

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
  switch (from) {
    case RequestList::kQueued:
      LeaveQueue(request);
      break;
    case RequestList::kPreempted:
      preempted_.erase(request.seniority());
      break;
    case RequestList::kRunning:
      std::erase(running_, &request);
      break;
    case RequestList::kNone:
      LS_CHECK(false, "request ", request.id(), " is in no list");
  }
  // It owns nothing any more, so this may complete its adapter's drain.
  adapters_backptr_->MoveRequest(request, from, RequestList::kNone);
  requests_.erase(request.id());
}

void RequestTable::CheckInvariants() const {
  struct Counts {
    std::int64_t preempted = 0;
    std::int64_t running = 0;
  };
  std::map<AdapterId, Counts> counts;
  std::int64_t num_queued = 0;
  std::int64_t num_queued_tokens = 0;
  std::size_t num_deadlines = 0;
  for (const auto& [id, adapter] : adapters_backptr_->adapters()) {
    for (const auto& [seniority, request] : adapter.queue) {
      LS_CHECK(request->Is<Queued>(), "request ", request->id(), " is ",
               StateName(request->state()));
      LS_CHECK(&request->adapter() == &adapter, "request ", request->id(), " queues elsewhere");
      ++num_queued;
      num_queued_tokens += request->num_prompt_tokens();
      num_deadlines += request->deadline_us() != kNoDeadline;
    }
  }
  LS_CHECK(num_queued == num_queued_ && num_queued_tokens == num_queued_tokens_ &&
               num_deadlines == deadlines_.size(),
           num_queued, " requests of ", num_queued_tokens, " tokens queued, ", num_deadlines,
           " with a deadline; counted ", num_queued_, ", ", num_queued_tokens_, ", ",
           deadlines_.size());
  for (const auto& [seniority, request] : preempted_) {
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
  const std::size_t num_listed =
      static_cast<std::size_t>(num_queued) + preempted_.size() + running_.size();
  LS_CHECK(num_listed == requests_.size(), num_listed, " requests listed, ", requests_.size(),
           " live");
  for (const auto& [id, adapter] : adapters_backptr_->adapters()) {
    const Counts& found = counts[id];
    LS_CHECK(adapter.num_preempted_requests == found.preempted, "adapter ", id, " preempted ",
             found.preempted);
    LS_CHECK(adapter.num_running_requests == found.running, "adapter ", id, " running ",
             found.running);
  }
}

}  // namespace lora_serve
