#include "scheduler/step_policy.h"

#include <algorithm>
#include <optional>
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
  ScheduleDecodes();
  SchedulePrefillChunks();
  // A step that had to take pages away has none to give to newcomers. But when it took them from
  // the last request that ran (without reuse its pages can have twins in the tree, pinned with it),
  // that one returns at once: a plan is empty only when nothing could run.
  if (!has_preempted_ || scheduled_.empty()) AdmitWaiting();
  return std::exchange(scheduled_, {});
}

void StepPolicy::ScheduleDecodes() {
  std::vector<Request*> decodes;
  for (Request* request : parts_.requests->running()) {
    LS_CHECK(!request->Is<Aborting>(), "request ", request->id(), " is inside an outstanding plan");
    if (request->Is<Decoding>()) decodes.push_back(request);
  }
  for (Request* request : decodes) {
    if (request->Is<Decoding>()) static_cast<void>(MakeRoom(*request));
  }
  // Only now is it known who stays: a decode may have lost its place to one after it in the list.
  for (Request* request : decodes) {
    if (!request->Is<Decoding>()) continue;
    scheduled_.push_back({request, 1, true});
    --budget_;
  }
}

bool StepPolicy::MakeRoom(Request& request) {
  while (true) {
    RunningResources& running = request.running();
    const auto capacity =
        static_cast<std::int64_t>(running.lease.pages().size()) * options_.page_size;
    if (capacity >= request.num_tokens()) return true;
    if (parts_.cache->Extend(running.lease, request.num_tokens())) return true;
    Request* victim = parts_.requests->NewestRunning();
    parts_.requests->Preempt(*victim);
    ++counters_.num_preemptions;
    has_preempted_ = true;
    if (victim == &request) return false;
  }
}

void StepPolicy::SchedulePrefillChunks() {
  for (Request* request : parts_.requests->running()) {
    if (budget_ == 0) return;
    if (request->Is<Prefilling>()) SchedulePrefillChunk(*request);
  }
}

void StepPolicy::SchedulePrefillChunk(Request& request) {
  const std::int32_t num_missing = request.num_missing_tokens();
  const std::int32_t num_tokens = std::min(num_missing, budget_);
  scheduled_.push_back({&request, num_tokens, num_tokens == num_missing});
  budget_ -= num_tokens;
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
  std::optional<Lease> lease = parts_.cache->Acquire(
      request.waiting_handle(), request.tokens(),
      {.max_cached_tokens = request.MaxCachedTokens(options_.enable_prefix_caching),
       .num_capacity_tokens = request.num_tokens()});
  if (!lease.has_value()) return Attempt::kLacksPages;
  if (request.num_cached_prompt_tokens < 0) {
    request.num_cached_prompt_tokens = lease->num_cached_tokens();
    counters_.num_queried_tokens += request.num_prompt_tokens();
    counters_.num_hit_tokens += lease->num_cached_tokens();
  }
  request.num_times_overtaken = 0;
  parts_.requests->Admit(request, parts_.rows->Take(), *std::move(lease));
  SchedulePrefillChunk(request);
  return Attempt::kAdmitted;
}

}  // namespace lora_serve
