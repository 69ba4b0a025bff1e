#include "scheduler_sim/scheduler_system.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/check.h"
#include "common/errors.h"
#include "scheduler_sim/prompt_tokens.h"

namespace lora_serve::sim {

SchedulerSystem::SchedulerSystem(const SchedulerSystemOptions& options, const DeviceModel& model,
                                 const AdapterCatalog& catalog)
    : options_(options),
      model_(model),
      catalog_(catalog),
      loader_(catalog, model.disk_to_host(options.has_cold_disk), model.host_to_device(),
              options.max_host_bytes),
      scheduler_(options.scheduler) {
  for (std::int64_t id = 1; id <= catalog.size(); ++id) {
    scheduler_.OpenAdapter(AdapterId(id), {.digest_seed = static_cast<std::uint64_t>(id),
                                           .size_bytes = catalog.BytesOf(id),
                                           .is_staged = loader_.IsOnHost(id)});
  }
}

void SchedulerSystem::Submit(SimRequest request, TimeUs /*now_us*/) {
  recorder_.OnArrival(request);
  const TimeUs deadline_us =
      options_.deadline_us > 0 ? request.arrival_us + options_.deadline_us : kNoDeadline;
  try {
    scheduler_.AddRequest({.request_id = RequestId(request.id),
                           .adapter_id = AdapterId(request.adapter_id),
                           .prompt_token_ids = std::move(request.prompt_token_ids),
                           .max_tokens = request.max_tokens,
                           .arrival_us = request.arrival_us,
                           .deadline_us = deadline_us});
  } catch (const CapacityError&) {
    recorder_.OnRefused(request.id);
  }
}

TimeUs SchedulerSystem::NextPlanDueUs() const {
  if (!options_.has_overlap || outstanding_.size() != 1 || !outstanding_.front()->has_started) {
    return kNever;
  }
  const TimeUs start_us = 0;  // long over
  return options_.plan_lead_us < 0 ? start_us
                                   : outstanding_.front()->end_us - options_.plan_lead_us;
}

TimeUs SchedulerSystem::NextEventUs() const {
  TimeUs next_us = loader_.NextEventUs();
  if (!outstanding_.empty()) next_us = std::min(next_us, outstanding_.front()->end_us);
  // A plan that was due already and came out empty is asked for again when something changes.
  if (NextPlanDueUs() > last_process_us_) next_us = std::min(next_us, NextPlanDueUs());
  return next_us;
}

void SchedulerSystem::Process(TimeUs now_us) {
  last_process_us_ = now_us;
  loader_.AdvanceTo(now_us);
  TakeLoaded();
  for (bool has_moved = true; has_moved;) {
    has_moved = false;
    if (!outstanding_.empty() && outstanding_.front()->end_us <= now_us) {
      EndStep(now_us);
      has_moved = true;
    }
    if (StartIfReady(now_us)) has_moved = true;
    const bool is_due = outstanding_.empty() || NextPlanDueUs() <= now_us;
    const bool may_report = outstanding_.empty() || options_.plan_lead_us >= 0;
    if (is_due && may_report && !loaded_.empty()) {
      ReportLoads();
      has_moved = true;
    }
    if (is_due && MakePlan(now_us)) has_moved = true;
  }
  if (options_.scheduler.loads_staged_only) ReadAhead(now_us);
}

void SchedulerSystem::ReadAhead(TimeUs now_us) {
  const auto waiting = [&](std::vector<AdapterId> ids) { return scheduler_.WaitingAdapters(ids); };
  for (const AdapterId id : scheduler_.AdaptersToStage()) {
    if (loader_.IsOnHost(id.value())) continue;  // on its way
    const auto nobody_waits = [&](std::int64_t other) {
      return waiting({AdapterId(other)}).empty();
    };
    const auto is_later = [&](std::int64_t other) {
      return waiting({id, AdapterId(other)}).front() == id;
    };
    if (!loader_.ReadAhead(id.value(), now_us, nobody_waits) &&
        !loader_.ReadAhead(id.value(), now_us, is_later)) {
      break;
    }
  }
  ReportHostChanges();
}

void SchedulerSystem::TakeLoaded() {
  for (const std::int64_t id : loader_.TakeLoaded()) {
    std::size_t num_erased = 0;
    for (const auto& step : outstanding_)
      num_erased += std::erase(step->staged_loads_under_way, id);
    if (num_erased == 0) loaded_.push_back(id);
  }
  ReportHostChanges();
}

void SchedulerSystem::ReportHostChanges() {
  for (const AdapterLoader::HostChange& change : loader_.TakeHostChanges()) {
    scheduler_.SetAdapterStaged(AdapterId(change.adapter_id), change.is_on_host);
  }
}

bool SchedulerSystem::MakePlan(TimeUs now_us) {
  if (spare_.empty()) spare_.push_back(std::make_unique<Outstanding>());
  Outstanding& step = *spare_.back();
  scheduler_.NextPlan(now_us, step.plan);
  for (const std::int64_t id : step.plan.expired_request_ids) recorder_.OnRefused(id);
  if (step.plan.IsEmpty()) return false;
  step.has_started = false;
  step.end_us = kNever;
  step.earliest_start_us = outstanding_.empty() ? now_us + options_.host_us : now_us;
  StartLoads(step, now_us);
  step.shape = ShapeOf(step.plan);
  outstanding_.push_back(std::move(spare_.back()));
  spare_.pop_back();
  return true;
}

void SchedulerSystem::StartLoads(Outstanding& step, TimeUs now_us) {
  const ExecutionPlan& plan = step.plan;
  step.staged_loads.clear();
  std::vector<std::int64_t> from_disk;
  for (std::size_t index = 0; index < plan.load_adapter_ids.size(); ++index) {
    const std::int64_t id = plan.load_adapter_ids[index];
    const auto slot = static_cast<std::size_t>(plan.load_adapter_slots[index]);
    if (adapter_in_slot_.size() <= slot) {
      adapter_in_slot_.resize(slot + 1);
      step_of_slot_.resize(slot + 1, -1);
    }
    adapter_in_slot_[slot] = id;
    (loader_.IsOnHost(id) ? step.staged_loads : from_disk).push_back(id);
  }
  step.staged_loads_under_way = step.staged_loads;
  // Those on the host first, before reads take their room.
  for (const std::int64_t id : step.staged_loads) loader_.Start(id, now_us);
  for (const std::int64_t id : from_disk) loader_.Start(id, now_us);
  ReportHostChanges();
}

bool SchedulerSystem::StartIfReady(TimeUs now_us) {
  if (outstanding_.empty()) return false;
  Outstanding& step = *outstanding_.front();
  if (step.has_started || !step.staged_loads_under_way.empty()) return false;
  StartStep(step, std::max(now_us, step.earliest_start_us));
  return true;
}

StepShape SchedulerSystem::ShapeOf(const ExecutionPlan& plan) {
  StepShape shape;
  const std::int64_t this_step = num_shapes_++;
  for (std::size_t row = 0; row < plan.request_ids.size(); ++row) {
    const std::int32_t slot = plan.adapter_slots[row];
    const bool has_adapter = slot != kNoAdapterSlot.value();
    shape.AddRow(plan.num_scheduled_tokens[row], plan.num_computed_tokens[row], has_adapter);
    if (!has_adapter) continue;
    std::int64_t& last_step = step_of_slot_.at(static_cast<std::size_t>(slot));
    if (last_step == this_step) continue;
    last_step = this_step;
    ++shape.num_adapters;
    shape.sum_ranks += catalog_.RankOf(AdapterIn(slot));
  }
  return shape;
}

void SchedulerSystem::StartStep(Outstanding& step, TimeUs start_us) {
  const auto step_us = static_cast<double>(model_.StepUs(step.shape, options_.engine));
  const TimeUs lasts_us = std::llround(step_us * loader_.StepFactor());
  const TimeUs stall_us = start_us - std::max(step.earliest_start_us, device_free_us_);
  step.has_started = true;
  step.end_us = start_us + lasts_us;
  device_free_us_ = step.end_us;
  if (!step.plan.HasRows()) return;
  for (const std::int64_t id : step.plan.request_ids) recorder_.OnRow(id, start_us);
  recorder_.OnStep(step.shape, std::ssize(step.plan.request_ids), lasts_us, stall_us);
  const std::int64_t period = options_.steps_between_checks;
  if (period > 0 && recorder_.steps().num_steps % period == 0) scheduler_.CheckInvariants();
}

void SchedulerSystem::EndStep(TimeUs now_us) {
  std::unique_ptr<Outstanding> step = std::move(outstanding_.front());
  outstanding_.pop_front();
  const ExecutionPlan& plan = step->plan;
  event_.plan_id = plan.plan_id;
  event_.sampled_token_ids.assign(plan.request_ids.size(), -1);
  event_.is_finished.assign(plan.request_ids.size(), 0);
  event_.loaded_adapter_ids = std::exchange(loaded_, {});
  for (const std::int64_t id : step->staged_loads) event_.loaded_adapter_ids.push_back(id);
  // All copies between the tiers of the KV cache end with the step that started them.
  event_.completed_transfer_ids.assign(plan.transfer_ids.begin(), plan.transfer_ids.end());
  for (std::size_t row = 0; row < plan.request_ids.size(); ++row) {
    if (plan.samples_token[row] == 0) continue;
    const std::int64_t id = plan.request_ids[row];
    const RequestRecord& request = recorder_.requests()[static_cast<std::size_t>(id)];
    event_.sampled_token_ids[row] = OutputToken(id, request.num_tokens);
    if (request.has_ended) continue;  // it ended while this plan was made already
    event_.is_finished[row] = recorder_.OnToken(id, now_us) ? 1 : 0;
  }
  scheduler_.Advance(event_);
  spare_.push_back(std::move(step));
}

void SchedulerSystem::ReportLoads() {
  ExecutionEvent event;
  event.loaded_adapter_ids = std::exchange(loaded_, {});
  scheduler_.Advance(event);
}

SystemCounts SchedulerSystem::Counts() const {
  const SchedulerStats stats = scheduler_.Stats();
  return {.num_host_loads = loader_.num_host_loads(),
          .num_disk_loads = loader_.num_disk_loads(),
          .num_evictions = stats.total_adapter_evictions,
          .num_preemptions = stats.total_preemptions,
          .num_queried_tokens = stats.total_queried_tokens,
          .num_hit_tokens = stats.total_hit_tokens};
}

void SchedulerSystem::CheckNothingLeft() const {
  scheduler_.CheckInvariants();
  const SchedulerStats stats = scheduler_.Stats();
  LS_CHECK(stats.num_waiting_requests == 0 && stats.num_queued_requests == 0 &&
               stats.num_queued_tokens == 0 && stats.num_preempted_requests == 0 &&
               stats.num_running_requests == 0 && stats.num_private_pages == 0 &&
               stats.num_adapters_in_line == 0 && stats.num_loading_adapters == 0,
           "waiting ", stats.num_waiting_requests, ", running ", stats.num_running_requests,
           ", private pages ", stats.num_private_pages, ", adapters in line ",
           stats.num_adapters_in_line, ", loading ", stats.num_loading_adapters);
  LS_CHECK(stats.total_finished_requests == recorder_.num_ended(), "finished ",
           stats.total_finished_requests, ", ended ", recorder_.num_ended());
  LS_CHECK(!scheduler_.HasWork(), "the scheduler says that it has work");
}

}  // namespace lora_serve::sim
