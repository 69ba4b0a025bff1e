#pragma once

#include <cstdint>
#include <string>

#include "scheduler_sim/recorder.h"
#include "scheduler_sim/sim_request.h"

namespace lora_serve::sim {

/// What a system counts itself; the rest is in the Recorder.
struct SystemCounts {
  std::int64_t num_host_loads = 0;
  std::int64_t num_disk_loads = 0;
  std::int64_t num_evictions = 0;
  std::int64_t num_preemptions = 0;
  std::int64_t num_queried_tokens = 0;
  std::int64_t num_hit_tokens = 0;
};

/// An engine in virtual time: a scheduler, a device, a loader of adapters.
///
/// The simulation calls Submit for what arrives, and Process whenever something has arrived or
/// NextEventUs() has come; time never goes back.
class ServingSystem {
 public:
  virtual ~ServingSystem() = default;
  /// Takes a request that arrives at `now_us`; Process follows.
  virtual void Submit(SimRequest request, TimeUs now_us) = 0;
  /// Does all that happens at `now_us`.
  virtual void Process(TimeUs now_us) = 0;
  /// When something happens by itself next; kNever when nothing is under way.
  [[nodiscard]] virtual TimeUs NextEventUs() const = 0;
  [[nodiscard]] virtual SystemCounts Counts() const = 0;
  /// Throws: InternalError when something is left although every request has ended.
  virtual void CheckNothingLeft() const = 0;

  [[nodiscard]] const Recorder& recorder() const { return recorder_; }

 protected:
  Recorder recorder_;
};

}  // namespace lora_serve::sim
