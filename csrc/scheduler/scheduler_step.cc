#include <utility>

#include "common/check.h"
#include "scheduler/event_check.h"
#include "scheduler/plan_builder.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {

const ExecutionPlan& Scheduler::Impl::NextPlan(std::int64_t now_us) {
  NextPlan(now_us, own_plan_);
  return own_plan_;
}

void Scheduler::Impl::NextPlan(std::int64_t now_us, ExecutionPlan& plan) {
  LS_CHECK(outstanding_.size() < kMaxOutstandingPlans, "plan ", outstanding_.back().id,
           " is outstanding; advance it before the next plan");
  LS_CHECK(now_us >= last_now_us_, "now_us went back from ", last_now_us_, " to ", now_us);
  last_now_us_ = now_us;
  ClearPlan(plan);
  const std::vector<AdapterId> drained = adapters_.TakeDrained();
  const std::vector<const Adapter*> loads = adapters_.TakeLoads();
  WriteAdapters(loads, drained, plan);
  std::vector<ScheduledRow> rows = policy_.ScheduleStep();
  WriteRows(rows, plan);
  if (plan.IsEmpty()) return;
  plan.plan_id = next_plan_id_++;
  Remember(plan, std::move(rows));
}

void Scheduler::Impl::Remember(const ExecutionPlan& plan, std::vector<ScheduledRow> rows) {
  OutstandingPlan& outstanding = outstanding_.emplace_back();
  outstanding.id = PlanId(plan.plan_id);
  outstanding.rows = std::move(rows);
  for (const std::int64_t id : plan.load_adapter_ids) outstanding.loads.emplace_back(id);
  for (const std::int64_t id : plan.drained_adapter_ids) outstanding.drained.emplace_back(id);
  for (const ScheduledRow& row : outstanding.rows)
    row.request_backptr->last_plan_id = outstanding.id;
  rows_.BeginPlan(outstanding.id);
}

void Scheduler::Impl::Advance(const ExecutionEvent& event) {
  if (outstanding_.empty()) {
    throw InvalidArgumentError(
        "the event of plan " + std::to_string(event.plan_id) +
        " came although no plan is outstanding; an empty plan takes no event");
  }
  CheckEventAnswersPlan(event, outstanding_.front());
  const OutstandingPlan plan = std::move(outstanding_.front());
  outstanding_.pop_front();
  newest_ended_plan_ = plan.id;
  rows_.EndPlan(plan.id);
  for (std::size_t index = 0; index < plan.rows.size(); ++index) {
    AdvanceRow(plan.rows[index], event.sampled_token_ids[index], event.is_finished[index] == 1);
  }
  for (const std::int64_t id : event.loaded_adapter_ids) adapters_.OnLoaded(AdapterId(id));
  for (const std::int64_t id : event.failed_adapter_ids) adapters_.OnFailed(AdapterId(id));
  for (const AdapterId id : plan.drained) adapters_.Remove(id);
}

void Scheduler::Impl::AdvanceRow(const ScheduledRow& row, TokenId sampled_token, bool is_finished) {
  Request& request = *row.request_backptr;
  request.RecordComputed(row.num_tokens);
  PublishComputed(request);
  if (request.Is<Aborting>()) {
    requests_.Abort(request);
    return;
  }
  if (!row.samples_token) return;
  request.AppendToken(sampled_token);
  if (request.Is<Prefilling>()) request.Take(request_event::CompletePrefill{});
  if (is_finished || request.HasAllOutput()) requests_.Finish(request);
}

void Scheduler::Impl::PublishComputed(Request& request) {
  RunningResources& running = request.running();
  const auto num_computed = static_cast<std::size_t>(running.num_computed_tokens);
  const auto num_full_pages = running.num_computed_tokens / options_.page_size;
  if (num_full_pages == running.lease.num_published_pages()) return;
  cache_.Publish(running.lease, request.tokens().first(num_computed));
}

bool Scheduler::Impl::HasWork() const {
  return !outstanding_.empty() || !requests_.IsEmpty() || adapters_.HasWork();
}

}  // namespace lora_serve
