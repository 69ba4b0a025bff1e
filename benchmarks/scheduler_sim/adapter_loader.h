#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <queue>
#include <unordered_set>
#include <vector>

#include "scheduler_sim/adapter_catalog.h"
#include "scheduler_sim/device_model.h"
#include "scheduler_sim/host_tier.h"
#include "scheduler_sim/sim_request.h"

namespace lora_serve::sim {

/// Brings adapters to the device beside the steps: first from disk to the host tier where it must,
/// by a few threads, then through the copy engine. Both serve in order of request.
///
/// Does not know: slots, device memory, who waits.
class AdapterLoader {
 public:
  AdapterLoader(const AdapterCatalog& catalog, const LoadPathModel& disk_to_host,
                const LoadPathModel& host_to_device, std::int64_t max_host_bytes);

  /// Requires: `id` is not being loaded; `now_us` never decreases.
  void Start(std::int64_t id, TimeUs now_us);
  /// Begins to read one that is not on the host, ahead of its `Start`; in place of others for which
  /// `may_go`. False, and nothing is read, when as many are under way as can be, or there is no
  /// room.
  bool ReadAhead(std::int64_t id, TimeUs now_us, const std::function<bool(std::int64_t)>& may_go);
  /// When the next read or copy ends; kNever when none is under way.
  [[nodiscard]] TimeUs NextEventUs() const;
  /// Ends reads and copies up to `now_us`.
  void AdvanceTo(TimeUs now_us);
  /// The adapters that have arrived on the device since the last call, in that order.
  [[nodiscard]] std::vector<std::int64_t> TakeLoaded();

  /// An adapter has come to host memory, ready to be copied, or has left it.
  struct HostChange {
    std::int64_t adapter_id = 0;
    bool is_on_host = false;
    friend bool operator==(const HostChange&, const HostChange&) = default;
  };
  /// Those since the last call, in order.
  [[nodiscard]] std::vector<HostChange> TakeHostChanges();
  /// True also for one that is on its way there.
  [[nodiscard]] bool IsOnHost(std::int64_t id) const { return host_.Contains(id); }

  /// The factor by which reads and copies under way lengthen a step.
  [[nodiscard]] double StepFactor() const;
  [[nodiscard]] std::int64_t num_host_loads() const { return num_host_loads_; }
  [[nodiscard]] std::int64_t num_disk_loads() const { return num_disk_loads_; }

 private:
  /// Loads of one path, at most num_parallel at once.
  struct Path {
    LoadPathModel model;
    std::deque<std::int64_t> waiting;
    std::int32_t num_under_way = 0;
  };
  struct End {
    TimeUs time_us;
    std::int64_t order;
    std::int64_t adapter_id;
    bool is_copy;
    friend bool operator>(const End& left, const End& right) {
      return left.time_us != right.time_us ? left.time_us > right.time_us
                                           : left.order > right.order;
    }
  };

  void StartWaiting(Path& path, bool is_copy, TimeUs now_us);
  bool TakeRoom(std::int64_t id, const std::function<bool(std::int64_t)>& may_go);
  void Begin(Path& path, std::int64_t id, bool is_copy, TimeUs now_us);

  const AdapterCatalog& catalog_;
  HostTier host_;
  /// On the host, and read by a copy or waiting for one.
  std::unordered_set<std::int64_t> pinned_;
  /// Of these, the ones that are read without being copied afterwards.
  std::unordered_set<std::int64_t> read_ahead_;
  Path disk_;
  Path copy_;
  std::priority_queue<End, std::vector<End>, std::greater<>> ends_;
  std::vector<std::int64_t> loaded_;
  std::vector<HostChange> host_changes_;
  std::int64_t next_order_ = 0;
  std::int64_t num_host_loads_ = 0;
  std::int64_t num_disk_loads_ = 0;
};

}  // namespace lora_serve::sim
