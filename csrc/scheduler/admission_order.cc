#include "scheduler/admission_order.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

namespace lora_serve {
namespace {

/// Who is in the way of adapters in line goes first, so that its turn ends.
std::int64_t AfterTurns(const Request& request) { return request.adapter().is_closed ? 0 : 1; }

}  // namespace

void AdmissionOrder::Begin(std::span<Adapter* const> adapters, std::int64_t now_us) {
  now_us_ = now_us;
  flows_.clear();
  window_.clear();
  by_seniority_.clear();
  taken_from_ = nullptr;
  best_priority_ = std::numeric_limits<std::int64_t>::max();
  for (const Adapter* adapter : adapters) {
    if (adapter->queue.empty()) continue;
    best_priority_ =
        std::min<std::int64_t>(best_priority_, adapter->queue.begin()->second->priority());
  }
  for (Adapter* adapter : adapters) PushFlow(*adapter, adapter->queue.begin());
  if (policy_ == SchedulingPolicy::kLpm) ChooseWindow();
}

Request* AdmissionOrder::Next() {
  if (policy_ != SchedulingPolicy::kLpm) return TakeFromFlows();
  while (!window_.empty()) {
    Request* request = window_.back();
    window_.pop_back();
    if (request->adapter().TakesNewcomers()) return request;
  }
  return nullptr;
}

void AdmissionOrder::OnAdmitted(Request& request) {
  if (policy_ != SchedulingPolicy::kLpm) return;
  std::ranges::replace(by_seniority_, &request, nullptr);
  const auto first =
      std::ranges::find_if(by_seniority_, [](auto* waits) { return waits != nullptr; });
  if (first != by_seniority_.end() && (*first)->seniority() < request.seniority()) {
    ++(*first)->num_times_overtaken;
  }
}

// --- Flows -------------------------------------------------------------------------------------

void AdmissionOrder::PushFlow(Adapter& adapter,
                              std::map<Seniority, Request*>::const_iterator next) {
  if (next == adapter.queue.end() || !adapter.TakesNewcomers()) return;
  flows_.push_back({.adapter_backptr = &adapter, .next = next, .rank = RankOf(*next->second)});
  std::ranges::push_heap(flows_, std::ranges::greater{}, &Flow::rank);
}

Request* AdmissionOrder::TakeFromFlows() {
  // Only now: an admission has changed the rank of the adapter, or closed it.
  if (taken_from_ != nullptr) PushFlow(*std::exchange(taken_from_, nullptr), taken_next_);
  if (flows_.empty()) return nullptr;
  std::ranges::pop_heap(flows_, std::ranges::greater{}, &Flow::rank);
  const Flow flow = flows_.back();
  flows_.pop_back();
  taken_from_ = flow.adapter_backptr;
  taken_next_ = std::next(flow.next);  // the admission erases this entry only
  return flow.next->second;
}

AdmissionOrder::Rank AdmissionOrder::RankOf(const Request& head) const {
  const std::int64_t after_turns = AfterTurns(head);
  if (policy_ == SchedulingPolicy::kFair) {
    const Adapter& adapter = head.adapter();
    return {after_turns, EffectiveClass(head), adapter.virtual_service, adapter.id.value()};
  }
  return {after_turns, head.seniority().virtual_arrival_us, head.seniority().arrival_number, 0};
}

std::int64_t AdmissionOrder::EffectiveClass(const Request& request) const {
  const std::int64_t waited_us = std::max<std::int64_t>(0, now_us_ - request.arrival_us());
  return std::max(best_priority_, request.priority() - waited_us / priority_ageing_us_);
}

// --- The longest prefix first ------------------------------------------------------------------

void AdmissionOrder::ChooseWindow() {
  while (by_seniority_.size() < kLpmWindow) {
    Request* request = TakeFromFlows();
    if (request == nullptr) break;
    cache_backptr_->RefreshHints({&request->prefix_hint(), 1});
    by_seniority_.push_back(request);
  }
  const auto rank = [this](Request* request) -> Rank {
    if (request->num_times_overtaken >= kMaxTimesOvertaken) return {-1, 0, 0, 0};
    return {AfterTurns(*request), EffectiveClass(*request),
            -request->prefix_hint().num_resumable_tokens, 0};
  };
  window_ = by_seniority_;
  std::ranges::stable_sort(window_, std::ranges::less{}, rank);
  std::ranges::reverse(window_);
}

}  // namespace lora_serve
