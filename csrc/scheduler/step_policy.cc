#include "scheduler/step_policy.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "common/check.h"

namespace lora_serve {
namespace {

std::int64_t NumPagesFor(std::int32_t num_tokens, std::int32_t page_size) {
  return (static_cast<std::int64_t>(num_tokens) + page_size - 1) / page_size;
}

}  // namespace

StepPolicy::StepPolicy(const SchedulerOptions& options, const Parts& parts)
    : options_(options), parts_(parts) {}

std::vector<ScheduledRow> StepPolicy::ScheduleStep() {
  scheduled_.clear();
  budget_ = options_.max_num_batched_tokens;
  has_preempted_ = false;
  num_awaited_pages_ = 0;
  MakeRoomForRunning();
  ScheduleDecodes();
  SchedulePrefillChunks();
  // A step that had to take pages away, or waits for some, has none to give to newcomers. But when
  // it took them from the last request that ran (without reuse its pages can have twins in the
  // tree, pinned with it), that one returns at once: a plan is empty only when nothing could run.
  const bool may_admit = !has_preempted_ || scheduled_.empty();
  if (may_admit && num_awaited_pages_ == 0) AdmitWaiting();
  return std::exchange(scheduled_, {});
}

void StepPolicy::MakeRoomForRunning() {
  const std::vector<Request*> running = parts_.requests->running();  // preemptions change the list
  for (Request* request : running) {
    LS_CHECK(!request->Is<Aborting>(), "request ", request->id(), " is inside an outstanding plan");
    if (request->Is<Prefilling>() || request->Is<Decoding>()) MakeRoom(*request);
  }
}

bool StepPolicy::HasRoom(const Request& request) const {
  return std::ssize(request.running().lease.pages()) >=
         NumPagesFor(request.num_tokens(), options_.page_size);
}

void StepPolicy::MakeRoom(Request& request) {
  while (!HasRoom(request) &&
         !parts_.cache->Extend(request.running().lease, request.num_tokens())) {
    if (AwaitsEnoughPages(request)) return;
    Request& victim = parts_.requests->VictimFor(request);
    Preempt(victim);
    if (&victim == &request) return;
  }
}

bool StepPolicy::AwaitsEnoughPages(const Request& request) {
  const std::int64_t num_lacking = NumPagesFor(request.num_tokens(), options_.page_size) -
                                   std::ssize(request.running().lease.pages());
  if (parts_.transfers->NumPagesHeld() < num_awaited_pages_ + num_lacking) return false;
  num_awaited_pages_ += num_lacking;
  return true;
}

void StepPolicy::Preempt(Request& victim) {
  RunningResources& running = victim.running();
  if (!victim.Is<Loading>()) {
    // Publishing may have stopped in front of pages that have arrived since.
    const auto num_computed = static_cast<std::size_t>(running.num_computed_tokens);
    parts_.cache->Publish(running.lease, victim.tokens().first(num_computed));
    static_cast<void>(parts_.cache->StartWriteBack(running.lease));
    parts_.transfers->Collect();
  }
  parts_.transfers->EndLease(victim.adapter().namespace_id, std::ssize(running.lease.pages()),
                             [&] { parts_.requests->Preempt(victim); });
  ++counters_.num_preemptions;
  has_preempted_ = true;
}

void StepPolicy::ScheduleDecodes() {
  // Only now is it known who stays: a decode may have lost its pages to one after it in the list.
  for (Request* request : parts_.requests->running()) {
    if (!request->Is<Decoding>() || !HasRoom(*request)) continue;
    scheduled_.push_back({request, 1, true});
    --budget_;
  }
}

void StepPolicy::SchedulePrefillChunks() {
  for (Request* request : parts_.requests->running()) {
    if (budget_ == 0) return;
    if (request->Is<Prefilling>() && HasRoom(*request)) SchedulePrefillChunk(*request);
  }
}

void StepPolicy::SchedulePrefillChunk(Request& request) {
  if (request.num_cached_prompt_tokens < 0) RecordStart(request);
  const std::int32_t num_missing = request.num_missing_tokens();
  const std::int32_t num_tokens = std::min(num_missing, budget_);
  scheduled_.push_back({&request, num_tokens, num_tokens == num_missing});
  budget_ -= num_tokens;
}

void StepPolicy::RecordStart(Request& request) {
  const Lease& lease = request.running().lease;
  request.num_cached_prompt_tokens = lease.num_cached_tokens();
  counters_.num_queried_tokens += request.num_prompt_tokens();
  counters_.num_hit_tokens += lease.num_cached_tokens();
  counters_.num_host_hit_tokens += lease.num_host_cached_tokens();
}

void StepPolicy::AdmitWaiting() {
  // The first in line for each. A preempted request never lacks a place: its adapter kept it.
  Request* lacks_pages = nullptr;
  Request* lacks_place = nullptr;
  for (const RequestTable::WaitingList* list :
       {&parts_.requests->preempted(), &parts_.requests->queued()}) {
    for (auto it = list->begin(); it != list->end();) {
      if (budget_ == 0 || !parts_.rows->HasFree()) return;
      Request& request = *(it++)->second;  // admission takes it off the list
      const bool is_of_base = request.adapter().IsBase();
      // The places drain for the first that lacks one.
      if (!is_of_base && !MayBeOvertaken(lacks_place)) continue;
      switch (TryAdmit(request, /*must_surely_fit=*/lacks_pages != nullptr)) {
        case Attempt::kNotResident:
        case Attempt::kInFlight:
          break;
        case Attempt::kAdmitted:
          if (lacks_pages != nullptr) ++lacks_pages->num_times_overtaken;
          if (lacks_place != nullptr && !is_of_base) ++lacks_place->num_times_overtaken;
          break;
        case Attempt::kLacksPlace:
          if (lacks_place == nullptr) lacks_place = &request;
          break;
        case Attempt::kLacksPages:
          // One that spent its overtakings while it lacked a place counts as the first: who passes
          // it now could take the place that drained for it.
          if (lacks_pages == nullptr || !MayBeOvertaken(&request)) lacks_pages = &request;
          break;
      }
      if (!MayBeOvertaken(lacks_pages)) return;
    }
  }
}

StepPolicy::Attempt StepPolicy::TryAdmit(Request& request, bool must_surely_fit) {
  const Adapter& adapter = request.adapter();
  if (!parts_.adapters->MayRun(adapter)) {
    return adapter.load_state == LoadState::kResident ? Attempt::kLacksPlace
                                                      : Attempt::kNotResident;
  }
  // Behind a request that lacks pages only those are tried that fit without help of the cache: a
  // constant cost each, however long the queue is.
  if (must_surely_fit &&
      NumPagesFor(request.num_tokens(), options_.page_size) > parts_.cache->NumAvailablePages()) {
    return Attempt::kLacksPages;
  }
  AcquireResult acquired = parts_.cache->Acquire(
      request.waiting_handle(), request.tokens(),
      {.intent = request.Is<Preempted>() ? MatchIntent::kRecovery : MatchIntent::kPrefixReuse,
       .max_cached_tokens = request.MaxCachedTokens(options_.enable_prefix_caching),
       .num_capacity_tokens = request.num_tokens()});
  if (acquired.outcome == AcquireOutcome::kInFlight) return Attempt::kInFlight;
  if (acquired.outcome == AcquireOutcome::kNoRoom) return Attempt::kLacksPages;
  request.num_times_overtaken = 0;
  parts_.requests->Admit(request, parts_.rows->Take(), std::move(acquired.lease));
  if (request.Is<Loading>()) return Attempt::kAdmitted;
  SchedulePrefillChunk(request);
  return Attempt::kAdmitted;
}

}  // namespace lora_serve
