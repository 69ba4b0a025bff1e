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
  last_now_us_ = now_us;
  ClearPlan(plan);
  const std::vector<AdapterId> drained = adapters_.TakeDrained();
  const std::vector<const Adapter*> loads = adapters_.TakeLoads();
  WriteAdapters(loads, drained, plan);
  // The rows of this step may evict what the last one computed, so it is copied before. But pages
  // whose copies fail again and again must not be kept from the rows for ever.
  const bool rows_come_first = std::exchange(has_write_back_failed_, false);
  if (!rows_come_first) StartWriteBacks();
  std::vector<ScheduledRow> rows = policy_.ScheduleStep();
  WriteRows(rows, plan);
  if (rows_come_first) StartWriteBacks();
  transfers_.Collect();
  WriteTransfers(transfers_.TakeOrders(), plan);
  if (plan.IsEmpty()) return;
  plan.plan_id = next_plan_id_++;
  Remember(plan, std::move(rows));
}

void Scheduler::Impl::StartWriteBacks() {
  if (options_.num_host_pages == 0) return;
  const std::int64_t num_available = cache_.NumAvailablePages();
  cache_.PlanWriteBacks();
  transfers_.Collect();
  if (transfers_.IsEmpty()) return;
  transfers_.NotePagesHeld(transfers_.Newest(), num_available - cache_.NumAvailablePages());
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
  const bool reports_copies =
      !event.completed_transfer_ids.empty() || !event.failed_transfer_ids.empty();
  if (event.plan_id == kNoPlan.value() && reports_copies) {
    CheckEventHasNoRows(event);
    CheckTransferReports(event, transfers_);
    AdvanceTransfers(event);
    return;
  }
  if (outstanding_.empty()) {
    throw InvalidArgumentError(
        "the event of plan " + std::to_string(event.plan_id) +
        " came although no plan is outstanding; an empty plan takes no event");
  }
  CheckEventAnswersPlan(event, outstanding_.front());
  CheckTransferReports(event, transfers_);
  const OutstandingPlan plan = std::move(outstanding_.front());
  outstanding_.pop_front();
  newest_ended_plan_ = plan.id;
  rows_.EndPlan(plan.id);
  AdvanceTransfers(event);  // first: rows cannot publish behind pages that are on their way
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
    End(request, &RequestTable::Abort);
    return;
  }
  if (!row.samples_token) return;
  request.AppendToken(sampled_token);
  if (request.Is<Prefilling>()) request.Take(request_event::CompletePrefill{});
  if (is_finished || request.HasAllOutput()) End(request, &RequestTable::Finish);
}

void Scheduler::Impl::End(Request& request, void (RequestTable::*move)(Request&)) {
  const auto num_pages = request.IsRunning() ? std::ssize(request.running().lease.pages()) : 0;
  transfers_.EndLease(request.adapter().namespace_id, num_pages,
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
