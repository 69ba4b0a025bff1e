#include "scheduler_sim/adapter_loader.h"

#include <utility>

#include "common/check.h"

namespace lora_serve::sim {

AdapterLoader::AdapterLoader(const AdapterCatalog& catalog, const LoadPathModel& disk_to_host,
                             const LoadPathModel& host_to_device, std::int64_t max_host_bytes)
    : catalog_(catalog), host_(catalog, max_host_bytes) {
  disk_.model = disk_to_host;
  copy_.model = host_to_device;
}

void AdapterLoader::Start(std::int64_t id, TimeUs now_us) {
  LS_CHECK(pinned_.insert(id).second, "adapter ", id, " is being loaded already");
  if (host_.Contains(id)) {
    host_.Touch(id);
    ++num_host_loads_;
    copy_.waiting.push_back(id);
    StartWaiting(copy_, true, now_us);
  } else {
    ++num_disk_loads_;
    disk_.waiting.push_back(id);
    StartWaiting(disk_, false, now_us);
  }
}

void AdapterLoader::StartWaiting(Path& path, bool is_copy, TimeUs now_us) {
  while (path.num_under_way < path.model.num_parallel && !path.waiting.empty()) {
    const std::int64_t id = path.waiting.front();
    // A read waits until the host has room: copies under way hold theirs.
    if (!is_copy && !TakeRoom(id, [](std::int64_t) { return true; })) return;
    path.waiting.pop_front();
    Begin(path, id, is_copy, now_us);
  }
}

bool AdapterLoader::ReadAhead(std::int64_t id, TimeUs now_us,
                              const std::function<bool(std::int64_t)>& may_go) {
  LS_CHECK(!host_.Contains(id), "adapter ", id, " is on the host already");
  if (disk_.num_under_way >= disk_.model.num_parallel || !TakeRoom(id, may_go)) return false;
  pinned_.insert(id);
  read_ahead_.insert(id);
  ++num_disk_loads_;
  Begin(disk_, id, false, now_us);
  return true;
}

bool AdapterLoader::TakeRoom(std::int64_t id, const std::function<bool(std::int64_t)>& may_go) {
  const bool has_room =
      host_.Add(id, [&](std::int64_t other) { return !pinned_.contains(other) && may_go(other); });
  for (const std::int64_t gone : host_.TakeEvicted()) host_changes_.push_back({gone, false});
  return has_room;
}

void AdapterLoader::Begin(Path& path, std::int64_t id, bool is_copy, TimeUs now_us) {
  ++path.num_under_way;
  ends_.push({.time_us = now_us + path.model.LoadUs(catalog_.BytesOf(id)),
              .order = next_order_++,
              .adapter_id = id,
              .is_copy = is_copy});
}

TimeUs AdapterLoader::NextEventUs() const { return ends_.empty() ? kNever : ends_.top().time_us; }

void AdapterLoader::AdvanceTo(TimeUs now_us) {
  while (NextEventUs() <= now_us) {
    const End end = ends_.top();
    ends_.pop();
    if (end.is_copy) {
      --copy_.num_under_way;
      pinned_.erase(end.adapter_id);
      loaded_.push_back(end.adapter_id);
    } else {
      --disk_.num_under_way;
      host_changes_.push_back({end.adapter_id, true});
      if (read_ahead_.erase(end.adapter_id) > 0) {
        pinned_.erase(end.adapter_id);
      } else {
        copy_.waiting.push_back(end.adapter_id);
      }
    }
    StartWaiting(copy_, true, end.time_us);
    StartWaiting(disk_, false, end.time_us);
  }
}

std::vector<std::int64_t> AdapterLoader::TakeLoaded() { return std::exchange(loaded_, {}); }

std::vector<AdapterLoader::HostChange> AdapterLoader::TakeHostChanges() {
  return std::exchange(host_changes_, {});
}

double AdapterLoader::StepFactor() const {
  double factor = 1.0;
  if (disk_.num_under_way > 0) factor += disk_.model.step_slowdown;
  if (copy_.num_under_way > 0) factor += copy_.model.step_slowdown;
  return factor;
}

}  // namespace lora_serve::sim
