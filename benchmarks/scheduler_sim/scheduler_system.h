#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "scheduler/scheduler.h"
#include "scheduler_sim/adapter_catalog.h"
#include "scheduler_sim/adapter_loader.h"
#include "scheduler_sim/device_model.h"
#include "scheduler_sim/serving_system.h"

namespace lora_serve::sim {

struct SchedulerSystemOptions {
  SchedulerOptions scheduler;
  DeviceModel::EngineOptions engine;
  bool has_cold_disk = false;
  std::int64_t max_host_bytes = 0;
  /// The next plan is made while the one before it runs, so that the device never waits for it.
  bool has_overlap = true;
  /// With overlap: how long before the end of the running step the next plan is made, after loads
  /// that have ended meanwhile are reported; -1 = as soon as that step starts.
  TimeUs plan_lead_us = -1;
  /// From a plan's making to the start of its step on an idle device.
  TimeUs host_us = 0;
  /// A request that has not run after this time fails; 0 = none does.
  TimeUs deadline_us = 0;
  /// CheckInvariants after this many steps; 0 = only at the end.
  std::int64_t steps_between_checks = 0;
};

/// The scheduler and cache of csrc/ with an executor in virtual time.
///
/// Whatever plans say is carried out as an engine would: rows take the time that the device model
/// gives them, loads go through the AdapterLoader beside them, from when the plan is made. What the
/// scheduler wants to have in host memory is read ahead, where it loads nothing else. Loads of
/// adapters in host memory (staged) hold their plan's rows back and are reported with them; others
/// are reported in the event of the first plan that ends after them, or without a plan when none is
/// under way.
class SchedulerSystem : public ServingSystem {
 public:
  SchedulerSystem(const SchedulerSystemOptions& options, const DeviceModel& model,
                  const AdapterCatalog& catalog);

  void Submit(SimRequest request, TimeUs now_us) override;
  void Process(TimeUs now_us) override;
  [[nodiscard]] TimeUs NextEventUs() const override;
  [[nodiscard]] SystemCounts Counts() const override;
  void CheckNothingLeft() const override;

 private:
  /// A plan that was made and has not been answered. The first of the two runs.
  struct Outstanding {
    ExecutionPlan plan;
    StepShape shape;
    /// Its loads of adapters that were on the host; it starts when all of them have ended, and its
    /// event reports them.
    std::vector<std::int64_t> staged_loads;
    std::vector<std::int64_t> staged_loads_under_way;
    TimeUs earliest_start_us = 0;
    bool has_started = false;
    TimeUs end_us = kNever;
  };

  /// Makes a plan. Returns whether it has something to execute.
  bool MakePlan(TimeUs now_us);
  /// When the plan behind the running one is due; kNever without one, or without overlap.
  [[nodiscard]] TimeUs NextPlanDueUs() const;
  void StartLoads(Outstanding& step, TimeUs now_us);
  /// Begins the reads that the scheduler asks for, as the engine does: in place of what nobody
  /// waits for, else of what is wanted later.
  void ReadAhead(TimeUs now_us);
  /// Takes over what the loader has done: loads that have ended, changes of the host tier.
  void TakeLoaded();
  void ReportHostChanges();
  /// Starts the first plan if nothing holds it back any more. Returns whether it did.
  bool StartIfReady(TimeUs now_us);
  [[nodiscard]] StepShape ShapeOf(const ExecutionPlan& plan);
  void StartStep(Outstanding& step, TimeUs start_us);
  /// Answers the plan that has ended, and starts the next one.
  void EndStep(TimeUs now_us);
  void ReportLoads();
  [[nodiscard]] std::int64_t AdapterIn(std::int32_t slot) const {
    return adapter_in_slot_[static_cast<std::size_t>(slot)];
  }

  SchedulerSystemOptions options_;
  const DeviceModel& model_;
  const AdapterCatalog& catalog_;
  AdapterLoader loader_;
  Scheduler scheduler_;
  std::deque<std::unique_ptr<Outstanding>> outstanding_;
  /// Used before; their arrays keep their memory.
  std::vector<std::unique_ptr<Outstanding>> spare_;
  /// Loads that have ended and that the next event reports.
  std::vector<std::int64_t> loaded_;
  TimeUs device_free_us_ = 0;
  std::vector<std::int64_t> adapter_in_slot_;
  /// The step that last had a row of the slot; to count distinct ones.
  std::vector<std::int64_t> step_of_slot_;
  std::int64_t num_shapes_ = 0;
  TimeUs last_process_us_ = -1;
  ExecutionEvent event_;
};

}  // namespace lora_serve::sim
