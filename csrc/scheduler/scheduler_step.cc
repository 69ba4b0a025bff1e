#include <algorithm>
#include <iterator>
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
  plan_builder_.Begin(plan);  // refuses a memory too small before anything changes
  last_now_us_ = now_us;
  adapters_.BeginStep(now_us);
  ExpireRequests(plan);
  const std::vector<AdapterId> drained = adapters_.TakeDrained();
  const bool is_under_way =
      !outstanding_.empty() || adapters_.num_loading() > 0 || !transfers_.IsEmpty();
  const AdapterResidency::Changes changes =
      residency_.Plan({.now_us = now_us,
                       .newest_ended_plan = newest_ended_plan_,
                       .num_free_rows = rows_.num_free(),
                       .is_stuck = is_stuck_,
                       .is_under_way = is_under_way});
  num_adapter_loads_ += std::ssize(changes.loads);
  num_adapter_evictions_ += std::ssize(changes.evicted);
  WriteAdapters(drained, changes.evicted, changes.loads, plan);
  // The rows of this step may evict what the last one computed, so it is copied before. But pages
  // whose copies fail again and again must not be kept from the rows for ever.
  // Nor may copies take turns in keeping the pages from a request that needs all of them.
  const bool rows_come_first = std::exchange(has_write_back_failed_, false) || nobody_could_run_;
  if (!rows_come_first) StartWriteBacks();
  std::vector<ScheduledRow> rows =
      policy_.ScheduleStep(now_us, newest_ended_plan_, changes.newcomers);
  nobody_could_run_ = rows.empty() && outstanding_.empty() && !requests_.IsEmpty();
  plan_builder_.WriteRows(rows, plan);
  if (rows_come_first && !nobody_could_run_) StartWriteBacks();
  transfers_.Collect();
  WriteTransfers(transfers_.TakeOrders(), plan);
  // Not after a plan without rows that loads: those who come then have not been tried yet.
  is_stuck_ = !plan.HasRows() && (is_stuck_ || (plan.IsEmpty() && !is_under_way));
  if (plan.IsEmpty()) return;
  plan.plan_id = next_plan_id_++;
  if (plan.HasRows()) num_step_adapters_ += std::ssize(adapters_.placed());
  Remember(plan, std::move(rows), changes.loads);
}

void Scheduler::Impl::ExpireRequests(ExecutionPlan& plan) {
  while (Request* request = requests_.FindExpired(last_now_us_)) {
    plan.expired_request_ids.push_back(request->id().value());
    requests_.Abort(*request);
    ++num_expired_requests_;
  }
}

void Scheduler::Impl::StartWriteBacks() {
  if (options_.num_host_pages == 0) return;
  const std::int64_t num_available = cache_.NumAvailablePages();
  cache_.PlanWriteBacks();
  transfers_.Collect();
  if (transfers_.IsEmpty()) return;
  transfers_.NotePagesHeld(transfers_.Newest(), num_available - cache_.NumAvailablePages());
}

void Scheduler::Impl::Remember(const ExecutionPlan& plan, std::vector<ScheduledRow> rows,
                               std::span<const Adapter* const> loads) {
  OutstandingPlan& outstanding = outstanding_.emplace_back();
  outstanding.id = PlanId(plan.plan_id);
  outstanding.rows = std::move(rows);
  for (const Adapter* adapter : loads) {
    if (adapter->load_state != LoadState::kLoading) outstanding.staged_loads.push_back(adapter->id);
  }
  for (const std::int64_t id : plan.drained_adapter_ids) outstanding.drained.emplace_back(id);
  for (const ScheduledRow& row : outstanding.rows) {
    row.request_backptr->last_plan_id = outstanding.id;
    row.request_backptr->adapter().last_plan_id = outstanding.id;
  }
  rows_.BeginPlan(outstanding.id);
}

void Scheduler::Impl::Advance(const ExecutionEvent& event) {
  if (event.plan_id == kNoPlan.value() && ReportsAnything(event)) {
    CheckEventHasNoRows(event);
    CheckTransferReports(event, transfers_);
    CheckLoadReports(event, adapters_, {});
    AdvanceTransfers(event);
    AdvanceLoads(event, {});
    return;
  }
  if (outstanding_.empty()) {
    throw InvalidArgumentError(
        "the event of plan " + std::to_string(event.plan_id) +
        " came although no plan is outstanding; an empty plan takes no event");
  }
  CheckEventAnswersPlan(event, outstanding_.front());
  CheckTransferReports(event, transfers_);
  CheckLoadReports(event, adapters_, outstanding_.front().staged_loads);
  const OutstandingPlan plan = std::move(outstanding_.front());
  outstanding_.pop_front();
  newest_ended_plan_ = plan.id;
  rows_.EndPlan(plan.id);
  AdvanceTransfers(event);  // first: rows cannot publish behind pages that are on their way
  for (std::size_t index = 0; index < plan.rows.size(); ++index) {
    AdvanceRow(plan.id, plan.rows[index], event.sampled_token_ids[index],
               event.is_finished[index] == 1);
  }
  AdvanceLoads(event, plan.staged_loads);
  for (const AdapterId id : plan.drained) adapters_.Remove(id);
}

void Scheduler::Impl::AdvanceRow(PlanId plan_id, const ScheduledRow& row, TokenId sampled_token,
                                 bool is_finished) {
  Request& request = *row.request_backptr;
  const bool is_in_later_plan = request.last_plan_id > plan_id;
  request.RecordComputed(row.num_tokens);
  PublishComputed(request);
  if (request.IsEnding()) {
    if (is_in_later_plan) return;
    End(request, request.Is<Aborting>() ? &RequestTable::Abort : &RequestTable::Finish);
    return;
  }
  if (!row.samples_token) return;
  request.AppendToken(sampled_token);
  if (request.Is<Prefilling>()) request.Take(request_event::CompletePrefill{});
  if (!is_finished && !request.HasAllOutput()) return;
  ++num_finished_requests_;
  if (is_in_later_plan) {
    requests_.FinishInPlan(request);
  } else {
    End(request, &RequestTable::Finish);
  }
}

void Scheduler::Impl::AdvanceLoads(const ExecutionEvent& event,
                                   std::span<const AdapterId> staged_loads) {
  const auto was_staged = [&](AdapterId id) {
    return std::ranges::find(staged_loads, id) != staged_loads.end();
  };
  for (const std::int64_t value : event.loaded_adapter_ids) {
    const AdapterId id(value);
    if (!was_staged(id)) adapters_.OnLoaded(id);
  }
  for (const std::int64_t value : event.failed_adapter_ids) {
    const AdapterId id(value);
    was_staged(id) ? adapters_.OnStagedFailed(id) : adapters_.OnFailed(id);
  }
  num_failed_adapter_loads_ += std::ssize(event.failed_adapter_ids);
}

void Scheduler::Impl::End(Request& request, void (RequestTable::*move)(Request&)) {
  if (!request.IsRunning()) {
    (requests_.*move)(request);
    return;
  }
  const RunningResources& running = request.running();
  transfers_.EndLease(running.namespace_handle.id(), std::ssize(running.lease.pages()),
                      [&] { (requests_.*move)(request); });
}

void Scheduler::Impl::AdvanceTransfers(const ExecutionEvent& event) {
  for (const std::int64_t id : event.completed_transfer_ids) EndTransfer(TransferId(id), false);
  for (const std::int64_t id : event.failed_transfer_ids) EndTransfer(TransferId(id), true);
  adapters_.OnCopiesEnded();
}

void Scheduler::Impl::EndTransfer(TransferId id, bool has_failed) {
  Request* request = requests_.FindLoading(id);  // its lease forgets the copy now
  if (has_failed) {
    has_write_back_failed_ |= transfers_.IsWriteBack(id);
    cache_.FailTransfer(id);
    if (request != nullptr) requests_.FailLoad(*request);
  } else {
    cache_.CompleteTransfer(id);
    if (request != nullptr) requests_.CompleteLoad(*request);
  }
  transfers_.Remove(id);
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
