#include "scheduler/step_policy.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "common/check.h"

namespace lora_serve {

StepPolicy::StepPolicy(const SchedulerOptions& options, const Parts& parts)
    : options_(options), parts_(parts), order_(options, parts.cache) {}

std::vector<ScheduledRow> StepPolicy::ScheduleStep(std::int64_t now_us, PlanId newest_ended_plan,
                                                   std::span<Adapter* const> newcomers) {
  now_us_ = now_us;
  newest_ended_plan_ = newest_ended_plan;
  scheduled_.clear();
  budget_ = options_.max_num_batched_tokens;
  has_preempted_ = false;
  num_awaited_pages_ = 0;
  sitting_out_.clear();
  num_sitting_out_pages_ = 0;
  MakeRoomForRunning();
  ScheduleDecodes();
  SchedulePrefillChunks();
  // A step that had to take pages away, or waits for some, has none to give to newcomers. But when
  // it took them from the last request that ran (without reuse its pages can have twins in the
  // tree, pinned with it), that one returns at once: a plan is empty only when nothing could run.
  const bool may_admit = !has_preempted_ || scheduled_.empty();
  if (may_admit && num_awaited_pages_ == 0 && sitting_out_.empty()) AdmitWaiting(newcomers);
  return std::exchange(scheduled_, {});
}

// --- Rows --------------------------------------------------------------------------------------

bool StepPolicy::IsToRun(const Request& request) const {
  return request.CanBePlanned() && request.adapter().MayRun() && !SitsOut(request);
}

void StepPolicy::ScheduleDecodes() {
  // Only now is it known who stays: a decode may have lost its pages to one after it in the list.
  for (Request* request : parts_.requests->running()) {
    if (!request->DecodesNext() || !IsToRun(*request) || !HasRoom(*request)) continue;
    AddRow(*request, 1);
    ++counters_.num_decode_rows;
  }
}

void StepPolicy::SchedulePrefillChunks() {
  for (Request* request : parts_.requests->running()) {
    if (budget_ == 0) return;
    if (request->DecodesNext() || !IsToRun(*request) || !HasRoom(*request)) continue;
    AddPrefillChunk(*request);
  }
}

void StepPolicy::AddPrefillChunk(Request& request) {
  if (request.num_cached_prompt_tokens < 0) RecordStart(request);
  const std::int32_t num_tokens = std::min(request.num_unplanned_tokens(), budget_);
  AddRow(request, num_tokens);
  ++counters_.num_prefill_rows;
  counters_.num_prefill_tokens += num_tokens;
}

void StepPolicy::AddRow(Request& request, std::int32_t num_tokens) {
  const std::int32_t position = request.running().num_planned_tokens;
  const bool samples_token = request.RecordPlanned(num_tokens);
  scheduled_.push_back({.request_backptr = &request,
                        .num_tokens = num_tokens,
                        .position = position,
                        .samples_token = samples_token});
  budget_ -= num_tokens;
  AdapterTable::Charge(request.adapter(), num_tokens);
}

void StepPolicy::RecordStart(Request& request) {
  const Lease& lease = request.running().lease;
  request.num_cached_prompt_tokens = lease.num_cached_tokens();
  counters_.num_queried_tokens += request.num_prompt_tokens();
  counters_.num_hit_tokens += lease.num_cached_tokens();
  counters_.num_host_hit_tokens += lease.num_host_cached_tokens();
  const std::int64_t queue_us = std::max<std::int64_t>(0, now_us_ - request.arrival_us());
  ++counters_.num_started;
  counters_.total_queue_us += queue_us;
  ++request.adapter().num_started_requests;
  request.adapter().total_queue_us += queue_us;
}

// --- Room for those that run -------------------------------------------------------------------

void StepPolicy::MakeRoomForRunning() {
  const std::vector<Request*> running = parts_.requests->running();  // preemptions change the list
  for (Request* request : running) {
    if (IsToRun(*request)) MakeRoom(*request);
  }
}

bool StepPolicy::HasRoom(const Request& request) const {
  return std::ssize(request.running().lease.pages()) >=
         NumPagesFor(request.num_sequence_tokens(), options_.page_size);
}

void StepPolicy::MakeRoom(Request& request) {
  while (!HasRoom(request) &&
         !parts_.cache->Extend(request.running().lease, request.num_sequence_tokens())) {
    if (AwaitsEnoughPages(request)) return;
    Request& victim = parts_.requests->VictimFor(request, sitting_out_);
    if (victim.last_plan_id > newest_ended_plan_) {
      // A plan that has not returned touches its pages: it is left out of this one, and goes in the
      // next if the pages are still needed then.
      sitting_out_.push_back(&victim);
      num_sitting_out_pages_ += std::ssize(victim.running().lease.pages());
    } else {
      Preempt(victim);
    }
    if (&victim == &request) return;
  }
}

bool StepPolicy::AwaitsEnoughPages(const Request& request) {
  const std::int64_t num_lacking = NumPagesFor(request.num_sequence_tokens(), options_.page_size) -
                                   std::ssize(request.running().lease.pages());
  const std::int64_t num_to_come = parts_.transfers->NumPagesHeld() + num_sitting_out_pages_;
  const std::int64_t num_available = parts_.cache->NumAvailablePages();  // too few by themselves
  if (num_available + num_to_come < num_awaited_pages_ + num_lacking) return false;
  num_awaited_pages_ += num_lacking;
  return true;
}

bool StepPolicy::SitsOut(const Request& request) const {
  return std::ranges::find(sitting_out_, &request) != sitting_out_.end();
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
  parts_.transfers->EndLease(running.namespace_handle.id(), std::ssize(running.lease.pages()),
                             [&] { parts_.requests->Preempt(victim); });
  ++counters_.num_preemptions;
  has_preempted_ = true;
}

// --- Admission ---------------------------------------------------------------------------------

void StepPolicy::AdmitWaiting(std::span<Adapter* const> newcomers) {
  if (budget_ == 0 || !parts_.rows->HasFree()) return;
  lacks_pages_ = nullptr;
  const auto& preempted = parts_.requests->preempted();
  for (auto it = preempted.begin(); it != preempted.end();) {
    Request& request = *(it++)->second;  // admission takes it off the list
    if (request.adapter().MayRun() && !TryInLine(request)) return;
  }
  std::vector<Adapter*> open = {&parts_.adapters->base()};
  for (const auto& [id, adapter] : parts_.adapters->placed()) open.push_back(adapter);
  // Free places go to those in front; who cannot use one, because it lacks pages, leaves it to the
  // next.
  while (true) {
    const auto num_places = static_cast<std::size_t>(parts_.adapters->num_free_places());
    const auto next = newcomers.first(std::min(num_places, newcomers.size()));
    newcomers = newcomers.subspan(next.size());
    open.insert(open.end(), next.begin(), next.end());
    if (open.empty() || !AdmitQueued(open)) return;
    open.clear();
  }
}

bool StepPolicy::AdmitQueued(std::span<Adapter* const> adapters) {
  order_.Begin(adapters, now_us_);
  while (Request* request = order_.Next()) {
    if (!TryInLine(*request)) return false;
  }
  return true;
}

bool StepPolicy::TryInLine(Request& request) {
  switch (TryAdmit(request)) {
    case Attempt::kInFlight:
      break;
    case Attempt::kAdmitted:
      if (lacks_pages_ != nullptr) ++lacks_pages_->num_times_overtaken;
      break;
    case Attempt::kLacksPages:
      // One that was passed often enough already counts as the first.
      if (lacks_pages_ == nullptr || !MayBeOvertaken(&request)) lacks_pages_ = &request;
      request.adapter().lacked_pages_at_step = parts_.adapters->num_steps();
      break;
  }
  return MayBeOvertaken(lacks_pages_) && budget_ > 0 && parts_.rows->HasFree();
}

StepPolicy::Attempt StepPolicy::TryAdmit(Request& request) {
  // Behind a request that lacks pages only those are tried that fit without help of the cache: a
  // constant cost each, however long the queue is.
  if (lacks_pages_ != nullptr &&
      NumPagesFor(request.num_tokens(), options_.page_size) > parts_.cache->NumAvailablePages()) {
    return Attempt::kLacksPages;
  }
  const bool is_recovery = request.Is<Preempted>();
  AcquireResult acquired = parts_.cache->Acquire(
      request.waiting_handle(), request.tokens(),
      {.intent = is_recovery ? MatchIntent::kRecovery : MatchIntent::kPrefixReuse,
       .max_cached_tokens = request.MaxCachedTokens(options_.enable_prefix_caching),
       .num_capacity_tokens = request.num_tokens()});
  if (acquired.outcome == AcquireOutcome::kInFlight) return Attempt::kInFlight;
  if (acquired.outcome == AcquireOutcome::kNoRoom) return Attempt::kLacksPages;
  if (!is_recovery) {
    order_.OnAdmitted(request);
    parts_.adapters->AdvanceVirtualTime(request.adapter());
  }
  request.num_times_overtaken = 0;
  parts_.requests->Admit(request, parts_.rows->Take(), std::move(acquired.lease));
  if (!request.Is<Loading>()) AddPrefillChunk(request);
  return Attempt::kAdmitted;
}

}  // namespace lora_serve
