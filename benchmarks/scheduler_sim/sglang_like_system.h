#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>

#include "scheduler_sim/baseline_system.h"

namespace lora_serve::sim {

/// Prefill steps before decode steps, a hard cap on the adapters of the running batch, and a
/// drainer with a threshold.
///
/// A step is either prefill (all waiting requests that may be admitted, in order of arrival, and
/// the one prompt that is in chunks) or one decode of everything that runs. The base model counts
/// as one of the adapters. When the batch has all its adapters and one has waited longer than the
/// threshold, the running adapter whose longest request has the fewest tokens left drains for it:
/// it takes only requests whose max_tokens is at most 1.2 times what that request has left. An
/// adapter that is not in host memory is read when its request arrives, between two steps.
///
/// Source: SGLang, python/sglang/srt/lora/lora_drainer.py (LoRADrainer) and
/// python/sglang/srt/managers/scheduler.py (get_new_batch_prefill, _can_schedule_lora_req); the
/// drainer is off there by default. Different here: see BaselineSystem; within one adapter
/// requests keep their order; of the adapters in host memory one without requests goes, so that
/// reading one never waits for others to end as long as there is one.
class SglangLikeSystem : public BaselineSystem {
 public:
  SglangLikeSystem(const BaselineOptions& options, TimeUs drain_threshold_us,
                   const DeviceModel& model, const AdapterCatalog& catalog)
      : BaselineSystem(options, model, catalog), drain_threshold_us_(drain_threshold_us) {}

 protected:
  TimeUs ChooseRows(TimeUs now_us) override;
  void OnArrival(std::unique_ptr<BaselineRequest> request) override {
    arriving_.push_back(std::move(request));
  }
  void OnEnd(std::int64_t adapter_id) override { --num_requests_[adapter_id]; }

 private:
  /// Reads adapters of arriving requests, which then join the line; returns how long that takes.
  [[nodiscard]] TimeUs TakeArriving();
  void UpdateDraining(TimeUs now_us);
  [[nodiscard]] bool MayAdmit(const BaselineRequest& request,
                              const std::set<std::int64_t>& adapters) const;
  void AddPrefillRows(std::set<std::int64_t>& adapters);

  TimeUs drain_threshold_us_;
  std::deque<std::unique_ptr<BaselineRequest>> arriving_;
  /// Of the adapter, waiting and running: keeps it in host memory.
  std::unordered_map<std::int64_t, std::int64_t> num_requests_;
  /// Running adapter -> the adapter that it drains for.
  std::map<std::int64_t, std::int64_t> draining_for_;
  /// Running adapter -> tokens that its longest request has left.
  std::map<std::int64_t, std::int32_t> tokens_left_;
};

}  // namespace lora_serve::sim
