#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler_sim/sim_request.h"

namespace lora_serve::sim {

/// A request in a baseline.
struct BaselineRequest {
  SimRequest request;
  /// Place in the line.
  std::int64_t order = 0;
  Lease lease;
  /// Prompt, then output.
  std::vector<TokenId> tokens;
  std::int32_t num_sampled_tokens = 0;
  std::int32_t num_computed_tokens = 0;

  [[nodiscard]] std::int64_t adapter_id() const { return request.adapter_id; }
  [[nodiscard]] std::int32_t num_missing_tokens() const {
    return static_cast<std::int32_t>(tokens.size()) - num_computed_tokens;
  }
};

/// Waiting requests in order of arrival, also among those of some adapters only, so that a scan of
/// a long line past requests whose adapters cannot run costs nothing.
class WaitingLine {
 public:
  [[nodiscard]] bool empty() const { return heads_.empty(); }

  void Push(std::unique_ptr<BaselineRequest> request) {
    const std::int64_t adapter = request->adapter_id();
    Queue& queue = queues_[adapter];
    if (queue.empty()) heads_.emplace(request->order, adapter);
    queue.push_back(std::move(request));
  }
  /// The first of all; null when the line is empty.
  [[nodiscard]] BaselineRequest* First() const {
    return heads_.empty() ? nullptr : queues_.at(heads_.begin()->second).front().get();
  }
  /// The first of these adapters' requests; null when they have none.
  [[nodiscard]] BaselineRequest* FirstOf(const std::set<std::int64_t>& adapters) const {
    BaselineRequest* first = nullptr;
    for (const std::int64_t adapter : adapters) {
      const auto queue = queues_.find(adapter);
      if (queue == queues_.end() || queue->second.empty()) continue;
      BaselineRequest* head = queue->second.front().get();
      if (first == nullptr || head->order < first->order) first = head;
    }
    return first;
  }
  /// Takes the first request of the adapter out. Requires: there is one.
  [[nodiscard]] std::unique_ptr<BaselineRequest> Pop(std::int64_t adapter) {
    Queue& queue = queues_.at(adapter);
    std::unique_ptr<BaselineRequest> request = std::move(queue.front());
    queue.pop_front();
    heads_.erase({request->order, adapter});
    if (!queue.empty()) heads_.emplace(queue.front()->order, adapter);
    return request;
  }
  /// Adapters with waiting requests and the order of the first of each, oldest first.
  [[nodiscard]] const std::set<std::pair<std::int64_t, std::int64_t>>& heads() const {
    return heads_;
  }
  [[nodiscard]] const BaselineRequest& HeadOf(std::int64_t adapter) const {
    return *queues_.at(adapter).front();
  }

 private:
  using Queue = std::deque<std::unique_ptr<BaselineRequest>>;
  std::unordered_map<std::int64_t, Queue> queues_;  // by adapter; never iterated
  std::set<std::pair<std::int64_t, std::int64_t>> heads_;
};

}  // namespace lora_serve::sim
