#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler_sim/adapter_catalog.h"
#include "scheduler_sim/device_model.h"
#include "scheduler_sim/host_tier.h"
#include "scheduler_sim/lru_set.h"
#include "scheduler_sim/serving_system.h"
#include "scheduler_sim/waiting_line.h"

namespace lora_serve::sim {

struct BaselineOptions {
  DeviceModel::EngineOptions engine;
  bool has_cold_disk = false;
  std::int64_t max_host_bytes = 0;
  std::int32_t max_num_seqs = 128;
  std::int32_t max_num_batched_tokens = 2048;
  std::int32_t page_size = 16;
  std::int32_t num_device_pages = 0;
  bool enable_prefix_caching = true;
};

/// What the other systems have in common here: continuous batching, adapters in `num_places` slots
/// of equal size (the least recently used one goes), and loads inside the step loop: a step starts
/// when its adapters are there, and all its requests wait for that.
///
/// Kinder than the originals: a request gets the pages of its whole output when it is admitted, so
/// nothing is preempted; planning costs nothing beyond what the device model says of a step. The KV
/// prefix cache is this project's, with a namespace an adapter, so that prefix hits are the same
/// for all systems.
class BaselineSystem : public ServingSystem {
 public:
  BaselineSystem(const BaselineOptions& options, const DeviceModel& model,
                 const AdapterCatalog& catalog);

  void Submit(SimRequest request, TimeUs now_us) override;
  void Process(TimeUs now_us) override;
  [[nodiscard]] TimeUs NextEventUs() const override { return step_end_us_; }
  [[nodiscard]] SystemCounts Counts() const override { return counts_; }
  void CheckNothingLeft() const override;

 protected:
  /// Adds the rows of the next step with AddRow, and returns how long the step waits for loads
  /// other than those of its rows' adapters into their slots.
  virtual TimeUs ChooseRows(TimeUs now_us) = 0;
  /// A request has arrived; by default it joins the line.
  virtual void OnArrival(std::unique_ptr<BaselineRequest> request) {
    waiting_.Push(std::move(request));
  }
  /// A request of the adapter has ended.
  virtual void OnEnd(std::int64_t /*adapter_id*/) {}

  /// Gives the first waiting request of the adapter its pages and moves it to the running ones;
  /// null when there is no room.
  BaselineRequest* Admit(std::int64_t adapter_id);
  void AddRow(BaselineRequest& request, std::int32_t num_tokens) {
    rows_.push_back({&request, num_tokens});
  }
  /// Reads the adapter to the host, if it is not there, and returns how long that takes; -1 when
  /// there is no room, because `may_go` protects the others.
  template <typename MayGo>
  [[nodiscard]] TimeUs BringToHost(std::int64_t id, const MayGo& may_go) {
    if (host_.Contains(id)) {
      host_.Touch(id);
      return 0;
    }
    if (!host_.Add(id, may_go)) return -1;
    ++counts_.num_disk_loads;
    return model_.disk_to_host(options_.has_cold_disk).LoadUs(catalog_.BytesOf(id));
  }

  BaselineOptions options_;
  WaitingLine waiting_;
  /// In order of admission.
  std::vector<std::unique_ptr<BaselineRequest>> running_;

 private:
  struct Row {
    BaselineRequest* request;
    std::int32_t num_tokens;
  };

  void StartStep(TimeUs now_us, TimeUs stall_us);
  void EndStep(TimeUs now_us);
  /// Brings the adapters to their slots and returns how long that takes.
  [[nodiscard]] TimeUs LoadForStep(const std::set<std::int64_t>& adapters);
  [[nodiscard]] NamespaceId NamespaceOf(std::int64_t adapter_id);

  const DeviceModel& model_;
  const AdapterCatalog& catalog_;
  KVPrefixCache cache_;
  std::unordered_map<std::int64_t, NamespaceId> namespaces_;
  HostTier host_;
  LruSet slots_;
  std::vector<Row> rows_;
  TimeUs step_end_us_ = kNever;
  SystemCounts counts_;
  std::int64_t next_order_ = 0;
};

}  // namespace lora_serve::sim
