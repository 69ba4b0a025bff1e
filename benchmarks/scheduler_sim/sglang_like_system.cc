#include "scheduler_sim/sglang_like_system.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace lora_serve::sim {
namespace {

constexpr double kDrainTolerance = 1.2;

}  // namespace

TimeUs SglangLikeSystem::TakeArriving() {
  TimeUs stall_us = 0;
  std::deque<std::unique_ptr<BaselineRequest>> held_back;
  for (auto& request : arriving_) {
    const std::int64_t adapter = request->adapter_id();
    const auto may_go = [&](std::int64_t id) { return id != adapter && num_requests_[id] == 0; };
    const TimeUs read_us = adapter == kBaseAdapter.value() ? 0 : BringToHost(adapter, may_go);
    if (read_us < 0) {
      held_back.push_back(std::move(request));
      continue;
    }
    stall_us += read_us;
    ++num_requests_[adapter];
    waiting_.Push(std::move(request));
  }
  arriving_ = std::move(held_back);
  return stall_us;
}

void SglangLikeSystem::UpdateDraining(TimeUs now_us) {
  tokens_left_.clear();
  for (const auto& request : running_) {
    std::int32_t& left = tokens_left_[request->adapter_id()];
    left = std::max(left, request->request.max_tokens - request->num_sampled_tokens);
  }
  if (std::cmp_greater_equal(tokens_left_.size(), options_.engine.num_places)) {
    std::set<std::int64_t> helped;
    for (const auto& [running, waiting] : draining_for_) helped.insert(waiting);
    for (const auto& [order, adapter] : waiting_.heads()) {  // oldest first
      const TimeUs arrival_us = waiting_.HeadOf(adapter).request.arrival_us;
      if (now_us - arrival_us <= drain_threshold_us_) break;
      if (helped.contains(adapter)) continue;
      const auto least = std::ranges::min_element(tokens_left_, {}, [&](const auto& entry) {
        return std::pair(draining_for_.contains(entry.first), entry.second);
      });
      if (draining_for_.contains(least->first)) break;
      draining_for_[least->first] = adapter;
    }
  }
  std::erase_if(draining_for_,
                [&](const auto& entry) { return !tokens_left_.contains(entry.first); });
}

bool SglangLikeSystem::MayAdmit(const BaselineRequest& request,
                                const std::set<std::int64_t>& adapters) const {
  const std::int64_t adapter = request.adapter_id();
  if (draining_for_.contains(adapter)) {
    const auto left = static_cast<double>(tokens_left_.at(adapter));
    if (static_cast<double>(request.request.max_tokens) > left * kDrainTolerance) return false;
  }
  return adapters.contains(adapter) || std::cmp_less(adapters.size(), options_.engine.num_places);
}

void SglangLikeSystem::AddPrefillRows(std::set<std::int64_t>& adapters) {
  std::int32_t budget = options_.max_num_batched_tokens;
  const auto add = [&](BaselineRequest& request) {
    const std::int32_t num_tokens = std::min(budget, request.num_missing_tokens());
    AddRow(request, num_tokens);
    budget -= num_tokens;
  };
  for (const auto& request : running_) {
    if (request->num_sampled_tokens == 0 && budget > 0) add(*request);  // in chunks
  }
  std::set<std::int64_t> refused;
  while (budget > 0 && std::cmp_less(running_.size(), options_.max_num_seqs)) {
    std::int64_t chosen = -1;
    for (const auto& [order, adapter] : waiting_.heads()) {
      if (refused.contains(adapter)) continue;
      if (MayAdmit(waiting_.HeadOf(adapter), adapters)) {
        chosen = adapter;
        break;
      }
      refused.insert(adapter);
    }
    if (chosen < 0) break;
    BaselineRequest* admitted = Admit(chosen);
    if (admitted == nullptr) break;
    adapters.insert(chosen);
    add(*admitted);
  }
}

TimeUs SglangLikeSystem::ChooseRows(TimeUs now_us) {
  const TimeUs stall_us = TakeArriving();
  UpdateDraining(now_us);
  std::set<std::int64_t> adapters;
  for (const auto& request : running_) adapters.insert(request->adapter_id());
  const std::size_t num_running = running_.size();
  AddPrefillRows(adapters);
  const bool has_chunk = num_running > 0 && running_[num_running - 1]->num_sampled_tokens == 0;
  if (running_.size() == num_running && !has_chunk) {
    for (const auto& request : running_) AddRow(*request, request->num_missing_tokens());
  }
  return stall_us;
}

}  // namespace lora_serve::sim
