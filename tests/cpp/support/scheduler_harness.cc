#include "support/scheduler_harness.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/errors.h"
#include "support/lora_tiles_check.h"

namespace lora_serve::testing {

namespace {

bool IsPaused(const SchedulerStats& stats, AdapterId adapter) {
  return std::ranges::any_of(stats.adapters, [adapter](const AdapterStats& entry) {
    return entry.adapter_id == adapter && entry.is_paused;
  });
}

}  // namespace

SchedulerHarness::SchedulerHarness(const SchedulerOptions& options, Overlap overlap)
    : executor_(options), scheduler_(options), overlap_(overlap) {}

// --- Control -------------------------------------------------------------------------------------

bool SchedulerHarness::OpenAdapter(AdapterId adapter, const AdapterOptions& options) {
  const bool has_room = scheduler_.OpenAdapter(adapter, options);
  adapters_[adapter] = options;
  if (has_room) opened_with_room_.insert(adapter);
  if (options.is_staged) executor_.staged.insert(adapter);
  return has_room;
}

void SchedulerHarness::OpenAndLoad(AdapterId adapter, const AdapterOptions& options) {
  if (adapter == kBaseAdapter) return;
  OpenAdapter(adapter, options);
  Step();
  AdvanceAll();
  EXPECT_TRUE(executor_.IsLoaded(adapter)) << "there is no room for adapter " << adapter;
}

void SchedulerHarness::SetAdapterPinned(AdapterId adapter, bool is_pinned) {
  scheduler_.SetAdapterPinned(adapter, is_pinned);
  adapters_.at(adapter).is_pinned = is_pinned;
}

void SchedulerHarness::SetAdapterStaged(AdapterId adapter, bool is_staged) {
  scheduler_.SetAdapterStaged(adapter, is_staged);
  if (is_staged) {
    executor_.staged.insert(adapter);
  } else {
    executor_.staged.erase(adapter);
  }
}

void SchedulerHarness::Add(std::int64_t id, AdapterId adapter, std::vector<TokenId> prompt,
                           std::int32_t max_tokens, bool reuse_prefix) {
  Add({.request_id = RequestId(id),
       .adapter_id = adapter,
       .prompt_token_ids = std::move(prompt),
       .max_tokens = max_tokens,
       .reuse_prefix = reuse_prefix});
}

void SchedulerHarness::AddTogether(const std::vector<NewRequest>& requests) {
  const SchedulerCounters before = scheduler_.Counters();
  try {
    requests.size() == 1 ? scheduler_.AddRequest(requests[0]) : scheduler_.AddRequests(requests);
  } catch (const CapacityError&) {
    num_rejected_ += std::ssize(requests);
    EXPECT_EQ(scheduler_.Counters().num_queued_requests, before.num_queued_requests);
    throw;
  }
  for (const NewRequest& request : requests) Track(request);
}

void SchedulerHarness::Track(const NewRequest& request) {
  const std::int64_t id = request.request_id.value();
  TrackedRequest tracked = {.adapter = request.adapter_id,
                            .prompt = request.prompt_token_ids,
                            .max_tokens = request.max_tokens,
                            .reuse_prefix = request.reuse_prefix,
                            .priority = request.priority,
                            .arrival_us = request.arrival_us,
                            .deadline_us = request.deadline_us,
                            .output = {},
                            .arrival = next_arrival_,
                            .arrival_step = num_steps_};
  ++next_arrival_;
  const Queue queue = {tracked.adapter, tracked.priority};
  if (tracked.arrival_us < 0) ++num_in_order_[queue];
  tracked.num_before =
      NumBeforeIn(queue) - std::ranges::count_if(live_, [this](std::int64_t other) {
        return requests_.at(other).num_steps == 0;
      });
  requests_[id] = std::move(tracked);
  live_.insert(id);
}

void SchedulerHarness::Abort(std::int64_t id) {
  EXPECT_TRUE(scheduler_.Abort(RequestId(id))) << "request " << id;
  EXPECT_FALSE(scheduler_.Abort(RequestId(id))) << "a second abort of request " << id;
  requests_.at(id).is_aborted = true;
  live_.erase(id);
}

AdapterStats SchedulerHarness::StatsOf(AdapterId adapter) const {
  for (const AdapterStats& stats : scheduler_.Stats().adapters) {
    if (stats.adapter_id == adapter) return stats;
  }
  ADD_FAILURE() << "adapter " << adapter << " has no statistics";
  return {};
}

// --- Steps ---------------------------------------------------------------------------------------

RecordedPlan SchedulerHarness::Step(const std::function<void()>& between) {
  ExecutionPlan& plan = plans_[static_cast<std::size_t>(num_steps_) % plans_.size()];
  ++num_steps_;
  scheduler_.NextPlan(++now_us_, plan);
  StopWhenNothingMoves(plan);
  CheckPlan(plan);
  CheckState();
  RecordedPlan recorded(plan);
  if (!plan.IsEmpty()) {
    executor_.Submit(plan);
    outstanding_.push_back(recorded);
    CheckMemory();
    CheckSlots(recorded);
  }
  if (between) between();
  if (outstanding_.empty()) {
    Report();
  } else if (overlap_ == Overlap::kOff || plan.IsEmpty() ||
             outstanding_.size() == kMaxOutstandingPlans) {
    AdvanceOldest();
  }
  return recorded;
}

void SchedulerHarness::AdvanceOldest() {
  ExecutionEvent event = executor_.Collect();
  if (change_event) change_event(event);
  CheckState();
  AbortBroken(event);
  scheduler_.Advance(event);
  const RecordedPlan plan = std::move(outstanding_.front());
  outstanding_.pop_front();
  Record(plan, event);
  CheckState();
}

std::int64_t SchedulerHarness::Report() {
  ExecutionEvent event = executor_.Report();
  const std::int64_t num_reports =
      std::ssize(event.completed_transfer_ids) + std::ssize(event.failed_transfer_ids) +
      std::ssize(event.loaded_adapter_ids) + std::ssize(event.failed_adapter_ids);
  if (num_reports == 0) return 0;
  if (change_event) change_event(event);
  scheduler_.Advance(event);
  RecordLoads(event);
  CheckState();
  return num_reports;
}

void SchedulerHarness::RunToEnd(std::int32_t max_steps) {
  for (std::int32_t step = 0; scheduler_.HasWork(); ++step) {
    ASSERT_LT(step, max_steps) << "requests hang";
    Step();
  }
}

/// Loops of tests wait for something to happen: this ends them when it never will.
void SchedulerHarness::StopWhenNothingMoves(const ExecutionPlan& plan) {
  num_empty_plans_ = plan.IsEmpty() ? num_empty_plans_ + 1 : 0;
  if (num_empty_plans_ <= kMaxEmptyPlans && num_steps_ <= kMaxSteps) return;
  throw std::runtime_error("the scheduler does not move: " + std::to_string(num_empty_plans_) +
                           " empty plans in a row, " + std::to_string(num_steps_) + " steps");
}

void SchedulerHarness::Record(const RecordedPlan& plan, const ExecutionEvent& event) {
  for (std::size_t index = 0; index < event.sampled_token_ids.size(); ++index) {
    const std::int64_t id = plan.request_ids[index];
    TrackedRequest& request = requests_.at(id);
    num_late_finishes_ += request.is_finished;
    num_late_aborts_ += request.is_aborted;
    if (plan.samples_token[index] == 0) continue;
    --request.num_pending_tokens;
    if (request.HasEnded()) continue;
    request.output.push_back(event.sampled_token_ids[index]);
    request.is_finished = event.is_finished[index] == 1 ||
                          static_cast<std::int32_t>(request.output.size()) == request.max_tokens;
    if (!request.is_finished) continue;
    live_.erase(id);
    EXPECT_FALSE(scheduler_.Abort(RequestId(id))) << "request " << id << " has finished";
  }
  for (const std::int64_t id : plan.drained_adapter_ids) {
    std::erase_if(draining_slots_, [id](const auto& entry) { return entry.second == id; });
  }
  RecordLoads(event);
}

void SchedulerHarness::AbortBroken(const ExecutionEvent& event) {
  for (const std::int64_t failed : event.failed_adapter_ids) {
    const AdapterId adapter(failed);
    if (!executor_.IsBroken(adapter)) continue;
    for (const std::int64_t id : std::set<std::int64_t>(live_)) {
      if (requests_.at(id).adapter == adapter) Abort(id);
    }
  }
}

void SchedulerHarness::RecordLoads(const ExecutionEvent& event) {
  num_failed_loads_ += std::ssize(event.failed_adapter_ids);
  for (const std::int64_t id : event.failed_adapter_ids) {
    // One that was staged may have been evicted meanwhile, or drained; then it was not needed.
    const AdapterId adapter(id);
    const std::vector<AdapterStats> all = scheduler_.Stats().adapters;
    const auto stats = std::ranges::find(all, adapter, &AdapterStats::adapter_id);
    const bool has_failed = stats != all.end() && stats->load_failed;
    EXPECT_TRUE(has_failed || executor_.IsBroken(adapter)) << "adapter " << id;
    if (has_failed) failed_.insert(adapter);
  }
  for (const std::int64_t id : event.failed_adapter_ids) loading_unasked_.erase(AdapterId(id));
  for (const std::int64_t id : event.loaded_adapter_ids) loading_unasked_.erase(AdapterId(id));
}

// --- What must hold in every step ----------------------------------------------------------------

void SchedulerHarness::CheckState() const {
  scheduler_.CheckInvariants();
  const SchedulerStats stats = scheduler_.Stats();
  EXPECT_EQ(stats.num_free_pages + stats.num_tree_pages + stats.num_private_pages,
            stats.num_device_pages);
  std::int64_t num_used_host_pages = 0;
  for (const AdapterStats& adapter : stats.adapters) num_used_host_pages += adapter.num_host_pages;
  EXPECT_EQ(stats.num_free_host_pages + num_used_host_pages, stats.num_host_pages);
}

/// Who has started and has tokens left is in the plan, unless pages or tokens of the step are
/// short, or a copy is awaited.
void SchedulerHarness::CheckWhoRuns(const ExecutionPlan& plan) const {
  const SchedulerStats stats = scheduler_.Stats();
  EXPECT_LE(static_cast<std::int64_t>(plan.request_ids.size()), stats.num_running_requests);
  const auto max_tokens = static_cast<std::size_t>(scheduler_.options().max_num_batched_tokens);
  // Who runs on needs one page at most.
  const bool has_pages = stats.num_free_pages >= stats.num_running_requests;
  if (plan.IsEmpty() || stats.num_transfers > 0 || stats.num_preempted_requests > 0 || !has_pages ||
      plan.token_ids.size() == max_tokens) {
    return;
  }
  // One that never had a row comes from a load that failed, and may need pages of others.
  if (stats.num_running_requests > NumRunningWithRows(plan)) return;
  std::vector<std::int64_t> left_out;
  for (const std::int64_t id : live_) {
    const TrackedRequest& request = requests_.at(id);
    if (request.num_steps == 0 || !request.HasTokensToPlan()) continue;
    const bool has_time_slices = HasTimeSlices() && request.adapter != kBaseAdapter;
    if (has_time_slices && IsPaused(stats, request.adapter)) continue;
    // It comes back from somewhere, and may need many pages, also those of others.
    if (request.newest_plan_id < plan.plan_id - 1) return;
    if (has_time_slices) continue;  // it may be about to be paused
    if (request.newest_plan_id < plan.plan_id) left_out.push_back(id);
  }
  EXPECT_EQ(left_out, std::vector<std::int64_t>()) << "requests that run are not in the plan";
}

/// Running requests that had a row once: those that are live or in a plan that is out.
std::int64_t SchedulerHarness::NumRunningWithRows(const ExecutionPlan& plan) const {
  std::set<std::int64_t> ids(plan.request_ids.begin(), plan.request_ids.end());
  for (const RecordedPlan& outstanding : outstanding_) {
    ids.insert(outstanding.request_ids.begin(), outstanding.request_ids.end());
  }
  for (const std::int64_t id : live_) {
    if (requests_.at(id).num_steps > 0) ids.insert(id);
  }
  return std::ssize(ids);
}

void SchedulerHarness::CheckPlan(const ExecutionPlan& plan) {
  CheckExpired(plan);
  ASSERT_EQ(plan.plan_id, plan.IsEmpty() ? kNoPlan.value() : last_plan_id_ + 1);
  if (!plan.IsEmpty()) last_plan_id_ = plan.plan_id;
  CheckShape(plan);
  CheckPadding(plan);
  CheckMetadata(plan);
  CheckTransfers(plan);
  CheckAdapters(plan);
  std::set<std::int32_t> rows;
  std::set<std::int32_t> slots;
  std::size_t offset = 0;
  bool is_in_decodes = true;
  for (std::size_t index = 0; index < plan.request_ids.size(); ++index) {
    EXPECT_TRUE(rows.insert(plan.page_table_rows[index]).second) << "a row is used twice";
    if (plan.adapter_slots[index] >= 0) slots.insert(plan.adapter_slots[index]);
    const bool is_decode = IsDecode(plan, index);
    EXPECT_TRUE(is_decode <= is_in_decodes) << "a decode stands behind a prefill";
    is_in_decodes = is_decode;
    CheckRow(plan, index, offset);
    offset += static_cast<std::size_t>(plan.num_scheduled_tokens[index]);
  }
  EXPECT_LE(slots.size(), static_cast<std::size_t>(scheduler_.options().max_loras));
  CheckWhoRuns(plan);
  CheckOvertaking(plan);
}

/// A request that newer ones of its own queue pass lacks pages. It lets 16 pass when it is the
/// first that does; before that, everybody who is tried before it may let 16 pass.
void SchedulerHarness::CheckOvertaking(const ExecutionPlan& plan) {
  const SchedulerOptions& options = scheduler_.options();
  // Its pages may be on their way for another one; and the longest prefix first lets more pass.
  if (options.num_host_pages > 0 || options.scheduling_policy == SchedulingPolicy::kLpm) return;
  for (const std::int64_t starter_id : plan.request_ids) {
    const TrackedRequest& starter = requests_.at(starter_id);
    if (starter.num_steps != 1 || starter.arrival_us >= 0) continue;
    for (const std::int64_t id : live_) {
      TrackedRequest& waiting = requests_.at(id);
      if (waiting.num_steps > 0 || waiting.arrival > starter.arrival || waiting.arrival_us >= 0 ||
          waiting.adapter != starter.adapter || waiting.priority != starter.priority) {
        continue;
      }
      ++waiting.num_times_overtaken;
      max_times_overtaken_ = std::max(max_times_overtaken_, waiting.num_times_overtaken);
      const std::int64_t num_before =
          NumBeforeIn({waiting.adapter, waiting.priority}) - waiting.num_before;
      EXPECT_LE(waiting.num_times_overtaken, kMaxTimesOvertaken * (1 + num_before))
          << "request " << id << " starves";
    }
  }
}

std::int64_t SchedulerHarness::NumBeforeIn(const Queue& queue) const {
  const auto it = num_in_order_.find(queue);
  const std::int64_t num_behind = it == num_in_order_.end() ? 0 : it->second;
  return next_arrival_ - num_behind + scheduler_.Counters().total_preemptions;
}

void SchedulerHarness::CheckShape(const ExecutionPlan& plan) const {
  const SchedulerOptions& options = scheduler_.options();
  const std::size_t num_rows = plan.request_ids.size();
  ASSERT_LE(num_rows, static_cast<std::size_t>(options.max_num_seqs));
  ASSERT_LE(plan.token_ids.size(), static_cast<std::size_t>(options.max_num_batched_tokens));
  for (const std::size_t size : {plan.page_table_rows.size(), plan.num_scheduled_tokens.size(),
                                 plan.num_computed_tokens.size(), plan.num_cached_tokens.size(),
                                 plan.adapter_slots.size(), plan.samples_token.size()}) {
    ASSERT_EQ(size, num_rows);
  }
  ASSERT_EQ(plan.load_adapter_ids.size(), plan.load_adapter_slots.size());
}

/// A plan of single tokens is filled up to the next batch size of a graph, any other is not.
void SchedulerHarness::CheckPadding(const ExecutionPlan& plan) {
  const std::vector<std::int32_t>& sizes = scheduler_.options().padded_batch_sizes;
  const auto num_rows = static_cast<std::int32_t>(plan.request_ids.size());
  const auto size = std::ranges::lower_bound(sizes, num_rows);
  const bool is_padded =
      num_rows > 0 && std::cmp_equal(plan.token_ids.size(), num_rows) && size != sizes.end();
  ASSERT_EQ(plan.num_padded_rows, is_padded ? *size : num_rows);
  num_padded_rows_ += plan.num_padded_rows - num_rows;
  const PlanArrays padded = plan.Padded();
  ASSERT_EQ(std::ssize(padded.seq_lens), plan.num_padded_rows);
  for (auto row = static_cast<std::size_t>(num_rows); row < padded.seq_lens.size(); ++row) {
    EXPECT_EQ(padded.seq_lens[row], 0);
    EXPECT_EQ(padded.adapter_slots[row], kNoAdapterSlot.value());
    EXPECT_EQ(padded.page_table_rows[row], scheduler_.options().max_num_seqs);
  }
}

/// The arrays by row and token that a device reads follow from the others.
void SchedulerHarness::CheckMetadata(const ExecutionPlan& plan) const {
  std::map<std::int32_t, std::vector<std::int32_t>> tokens_of_slot;
  std::int32_t num_tokens = 0;
  for (std::size_t row = 0; row < plan.request_ids.size(); ++row) {
    EXPECT_EQ(plan.query_start_loc[row], num_tokens);
    EXPECT_EQ(plan.seq_lens[row], plan.num_computed_tokens[row] + plan.num_scheduled_tokens[row]);
    for (std::int32_t token = 0; token < plan.num_scheduled_tokens[row]; ++token) {
      EXPECT_EQ(plan.token_lora_mapping[static_cast<std::size_t>(num_tokens)],
                plan.adapter_slots[row]);
      tokens_of_slot[plan.adapter_slots[row]].push_back(num_tokens++);
    }
  }
  std::size_t group = 0;
  std::size_t offset = 0;
  for (const auto& [slot, tokens] : tokens_of_slot) {
    EXPECT_EQ(plan.active_lora_ids[group], slot);
    EXPECT_EQ(plan.num_tokens_per_lora[group], std::ssize(tokens));
    EXPECT_TRUE(std::cmp_equal(plan.lora_token_start_loc[group], offset));
    EXPECT_TRUE(std::ranges::equal(
        plan.token_indices_sorted_by_lora_ids.subspan(offset, tokens.size()), tokens));
    offset += tokens.size();
    ++group;
  }
  ExpectLoraTilesCoverGroups(plan);
}

void SchedulerHarness::CheckTransfers(const ExecutionPlan& plan) {
  const SchedulerOptions& options = scheduler_.options();
  const std::size_t num_copies = plan.transfer_ids.size();
  ASSERT_EQ(plan.transfer_kinds.size(), num_copies);
  ASSERT_EQ(plan.transfer_offsets.size(), num_copies + 1);
  ASSERT_EQ(plan.transfer_source_pages.size(), plan.transfer_destination_pages.size());
  ASSERT_EQ(plan.transfer_offsets.front(), 0);
  ASSERT_EQ(plan.transfer_offsets.back(), std::ssize(plan.transfer_source_pages));
  for (std::size_t index = 0; index < num_copies; ++index) {
    EXPECT_GT(plan.transfer_ids[index], newest_transfer_) << "a copy was given out before";
    newest_transfer_ = plan.transfer_ids[index];
    const bool is_load_back = plan.transfer_kinds[index] == 1;
    EXPECT_TRUE(is_load_back || plan.transfer_kinds[index] == 0);
    num_load_backs_ += is_load_back;
    num_write_backs_ += !is_load_back;
    ASSERT_LT(plan.transfer_offsets[index], plan.transfer_offsets[index + 1]);
    for (auto at = plan.transfer_offsets[index]; at < plan.transfer_offsets[index + 1]; ++at) {
      std::int32_t device_page = plan.transfer_source_pages[static_cast<std::size_t>(at)];
      std::int32_t host_page = plan.transfer_destination_pages[static_cast<std::size_t>(at)];
      if (is_load_back) std::swap(device_page, host_page);
      EXPECT_TRUE(device_page >= 0 && device_page < options.num_device_pages) << device_page;
      EXPECT_TRUE(host_page >= 0 && host_page < options.num_host_pages) << host_page;
    }
  }
}

// --- Adapters ------------------------------------------------------------------------------------

void SchedulerHarness::CheckAdapters(const ExecutionPlan& plan) {
  for (const std::int64_t id : plan.drained_adapter_ids) {
    const AdapterId adapter(id);
    EXPECT_TRUE(drained_.insert(adapter).second) << "adapter " << id << " was drained twice";
    if (const std::int32_t slot = executor_.SlotOf(adapter); slot >= 0) draining_slots_[slot] = id;
  }
  CheckEvictions(plan);
  CheckLoads(plan);
}

void SchedulerHarness::CheckEvictions(const ExecutionPlan& plan) const {
  if (plan.evicted_adapter_ids.empty()) return;
  for (const std::int64_t id : plan.evicted_adapter_ids) {
    const AdapterId adapter(id);
    EXPECT_FALSE(adapters_.at(adapter).is_pinned) << "adapter " << id << " is pinned";
    if (!HasTimeSlices()) {
      EXPECT_FALSE(HasStarted(adapter)) << "adapter " << id << " has requests that started";
      EXPECT_EQ(StatsOf(adapter).num_running_requests, 0) << "adapter " << id;
    }
    EXPECT_EQ(std::ranges::count(plan.load_adapter_ids, id), 0)
        << "adapter " << id << " is evicted and loaded";
    EXPECT_EQ(std::ranges::count(plan.evicted_adapter_ids, id), 1);
  }
}

bool SchedulerHarness::HasStarted(AdapterId adapter) const {
  return std::ranges::any_of(live_, [&](std::int64_t id) {
    const TrackedRequest& request = requests_.at(id);
    return request.adapter == adapter && request.num_steps > 0;
  });
}

void SchedulerHarness::CheckLoads(const ExecutionPlan& plan) {
  num_evictions_ += std::ssize(plan.evicted_adapter_ids);
  for (const std::int64_t id : plan.evicted_adapter_ids) evicted_.insert(AdapterId(id));
  num_loads_ += std::ssize(plan.load_adapter_ids);
  for (std::size_t index = 0; index < plan.load_adapter_ids.size(); ++index) {
    const AdapterId adapter(plan.load_adapter_ids[index]);
    EXPECT_FALSE(drained_.contains(adapter)) << "adapter " << adapter << " is gone";
    EXPECT_FALSE(failed_.contains(adapter)) << "a failed load of adapter " << adapter << " again";
    EXPECT_FALSE(draining_slots_.contains(plan.load_adapter_slots[index]))
        << "the plan that empties slot " << plan.load_adapter_slots[index] << " has not returned";
    num_reloads_ += evicted_.erase(adapter) > 0 ? 1 : 0;
    if (opened_with_room_.erase(adapter) > 0) {
      loading_unasked_.insert(adapter);
      continue;
    }
    const bool is_wanted =
        adapters_.at(adapter).is_pinned || std::ranges::any_of(live_, [&](std::int64_t id) {
          return requests_.at(id).adapter == adapter;
        });
    EXPECT_TRUE(is_wanted) << "nobody waits for adapter " << adapter;
  }
  const auto num_asked = executor_.num_loading_adapters() + plan.load_adapter_ids.size();
  EXPECT_LE(num_asked, static_cast<std::size_t>(scheduler_.options().max_loading_adapters) +
                           loading_unasked_.size());
}

void SchedulerHarness::CheckSlots(const RecordedPlan& plan) const {
  for (std::size_t index = 0; index < plan.request_ids.size(); ++index) {
    EXPECT_EQ(executor_.AdapterIn(plan.adapter_slots[index]),
              requests_.at(plan.request_ids[index]).adapter);
  }
}

void SchedulerHarness::CheckMemory() const {
  const std::int64_t num_bytes = scheduler_.options().adapter_memory_bytes;
  if (num_bytes == 0) return;
  std::int64_t num_used = 0;
  for (const AdapterId adapter : executor_.OnDevice()) num_used += adapters_.at(adapter).size_bytes;
  EXPECT_LE(num_used, num_bytes) << "the adapters on the device and on their way do not fit";
}

// --- Rows ----------------------------------------------------------------------------------------

void SchedulerHarness::CheckExpired(const ExecutionPlan& plan) {
  for (const std::int64_t id : plan.expired_request_ids) {
    TrackedRequest& request = requests_.at(id);
    EXPECT_FALSE(request.HasEnded()) << "request " << id;
    EXPECT_EQ(request.num_steps, 0) << "request " << id << " expired although it ran";
    EXPECT_LE(request.deadline_us, now_us_) << "request " << id << " expired too early";
    request.is_expired = true;
    live_.erase(id);
    EXPECT_FALSE(scheduler_.Abort(RequestId(id))) << "request " << id << " has expired";
  }
}

/// True when the request has been sampled a token since its admission.
bool SchedulerHarness::IsDecode(const ExecutionPlan& plan, std::size_t index) const {
  const TrackedRequest& request = requests_.at(plan.request_ids[index]);
  if (!request.newest_row_samples) return false;
  for (std::size_t delta = 0; delta < plan.delta_rows.size(); ++delta) {
    if (plan.delta_rows[delta] == plan.page_table_rows[index]) return plan.delta_starts[delta] > 0;
  }
  return true;
}

void SchedulerHarness::CheckRow(const ExecutionPlan& plan, std::size_t index, std::size_t offset) {
  TrackedRequest& request = requests_.at(plan.request_ids[index]);
  SCOPED_TRACE(::testing::Message() << "request " << plan.request_ids[index]);
  EXPECT_FALSE(request.HasEnded());
  EXPECT_TRUE(request.HasTokensToPlan()) << "a row beyond max_tokens";
  ASSERT_GE(plan.num_scheduled_tokens[index], 1);
  CheckTokens(plan, index, offset, request);
  const bool is_outstanding =
      !outstanding_.empty() && request.newest_plan_id >= outstanding_.front().plan_id;
  const std::int32_t num_computed = plan.num_computed_tokens[index];
  if (is_outstanding) {
    EXPECT_EQ(num_computed, request.newest_end()) << "it does not go on where it is";
    EXPECT_EQ(plan.page_table_rows[index], request.newest_page_table_row);
  }
  if (request.num_cached_tokens < 0) request.num_cached_tokens = num_computed;
  EXPECT_EQ(plan.num_cached_tokens[index], request.num_cached_tokens);
  if (!request.reuse_prefix || !scheduler_.options().enable_prefix_caching) {
    EXPECT_LE(num_computed, request.max_computed_tokens) << "another request's prefix was reused";
  }
  RecordRow(plan, index, request);
}

void SchedulerHarness::CheckTokens(const ExecutionPlan& plan, std::size_t index, std::size_t offset,
                                   const TrackedRequest& request) {
  const std::int32_t begin = plan.num_computed_tokens[index];
  const std::int32_t end = begin + plan.num_scheduled_tokens[index];
  const std::int32_t num_known = request.num_known_tokens();
  ASSERT_LE(end, num_known + request.num_pending_tokens);
  EXPECT_EQ(plan.samples_token[index], end == num_known + request.num_pending_tokens ? 1 : 0);
  ASSERT_LE(offset + static_cast<std::size_t>(end - begin), plan.token_ids.size());
  for (std::int32_t position = begin; position < end; ++position) {
    const TokenId found = plan.token_ids[offset + static_cast<std::size_t>(position - begin)];
    const bool is_known = position < num_known;
    EXPECT_EQ(found, is_known ? request.TokenAt(position) : -1) << "position " << position;
    num_unknown_tokens_ += !is_known;
  }
}

void SchedulerHarness::RecordRow(const ExecutionPlan& plan, std::size_t index,
                                 TrackedRequest& request) {
  request.newest_num_computed_tokens = plan.num_computed_tokens[index];
  request.newest_num_scheduled_tokens = plan.num_scheduled_tokens[index];
  request.newest_page_table_row = plan.page_table_rows[index];
  request.newest_plan_id = plan.plan_id;
  request.newest_row_samples = plan.samples_token[index] == 1;
  request.num_pending_tokens += plan.samples_token[index];
  request.max_computed_tokens = std::max(request.max_computed_tokens, request.newest_end());
  if (request.first_step < 0) request.first_step = num_steps_;
  ++request.num_steps;
}

// --- What must hold in the end -------------------------------------------------------------------

void SchedulerHarness::ExpectRightOutputs() const {
  for (const auto& [id, request] : requests_) {
    EXPECT_TRUE(request.HasEnded()) << "request " << id;
    std::vector<TokenId> expected =
        OracleExecutor::RunAlone(request.adapter, request.prompt, request.max_tokens);
    if (!request.is_finished) expected.resize(std::min(expected.size(), request.output.size()));
    EXPECT_EQ(request.output, expected) << "request " << id << ", adapter " << request.adapter;
  }
}

void SchedulerHarness::ExpectNothingLeft() const {
  EXPECT_TRUE(live_.empty());
  EXPECT_TRUE(outstanding_.empty());
  EXPECT_FALSE(scheduler_.HasWork());
  const SchedulerStats stats = scheduler_.Stats();
  EXPECT_EQ(stats.num_waiting_requests, 0);
  EXPECT_EQ(stats.num_running_requests, 0);
  EXPECT_EQ(stats.num_queued_requests, 0);
  EXPECT_EQ(stats.num_queued_tokens, 0);
  EXPECT_EQ(stats.num_preempted_requests, 0);
  EXPECT_EQ(stats.num_loading_adapters, 0);
  EXPECT_EQ(stats.num_adapters_in_line, 0);
  EXPECT_EQ(stats.num_private_pages, 0);
  EXPECT_EQ(stats.num_transfers, 0);
  for (const AdapterStats& adapter : stats.adapters) {
    EXPECT_NE(adapter.state, AdapterState::kDraining) << "adapter " << adapter.adapter_id;
  }
}

void SchedulerHarness::RunToEndAndCheck() {
  RunToEnd();
  ExpectRightOutputs();
  ExpectNothingLeft();
  ExpectCountersAgree();
}

void SchedulerHarness::ExpectCountersAgree() const {
  std::int64_t num_finished = 0;
  std::int64_t num_aborted = 0;
  std::int64_t num_expired = 0;
  std::int64_t num_started = 0;
  for (const auto& [id, request] : requests_) {
    num_finished += request.is_finished;
    num_aborted += request.is_aborted;
    num_expired += request.is_expired;
    num_started += request.num_steps > 0;
  }
  const SchedulerCounters counters = scheduler_.Counters();
  EXPECT_EQ(counters.total_plans, last_plan_id_ + 1);
  EXPECT_EQ(counters.total_finished_requests, num_finished);
  EXPECT_EQ(counters.total_aborted_requests, num_aborted);
  EXPECT_EQ(counters.total_expired_requests, num_expired);
  EXPECT_EQ(counters.total_rejected_requests, num_rejected_);
  EXPECT_EQ(counters.total_started_requests, num_started);
  EXPECT_EQ(counters.total_adapter_loads, num_loads_);
  EXPECT_EQ(counters.total_failed_adapter_loads, num_failed_loads_);
  EXPECT_EQ(counters.total_adapter_evictions, num_evictions_);
}

}  // namespace lora_serve::testing
