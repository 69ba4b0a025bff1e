#include "support/random_scheduler_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <ostream>
#include <utility>

#include "common/errors.h"

namespace lora_serve::testing {

namespace {

/// More only make the checks of a step slower.
constexpr std::size_t kMaxLiveRequests = 60;

}  // namespace

// --- Set-up --------------------------------------------------------------------------------------

RandomSchedulerRun::RandomSchedulerRun(std::uint64_t seed, Overlap overlap,
                                       RandomCoverage* coverage)
    : script_(seed),
      timing_(seed ^ 0x9e3779b97f4a7c15ULL),
      coverage_(*coverage),
      harness_(MakeOptions(), overlap),
      overlap_(overlap) {
  copy_slowness_ = timing_.Chance(40) ? 0 : timing_.Below(95);
  copy_failures_ = timing_.Chance(50) ? 0 : timing_.Below(50);
  load_slowness_ = timing_.Chance(40) ? 0 : timing_.Below(90);
  harness_.executor().copy_outcome = [this](TransferId, TransferKind) { return CopyOutcomeNow(); };
  harness_.executor().load_outcome = [this](AdapterId id) { return LoadOutcomeNow(id); };
  harness_.change_event = [this](ExecutionEvent& event) {
    for (std::vector<std::int64_t>* reports :
         {&event.completed_transfer_ids, &event.failed_transfer_ids, &event.loaded_adapter_ids,
          &event.failed_adapter_ids}) {
      std::ranges::shuffle(*reports, timing_.engine);
    }
  };
  for (int index = 0; index < 3; ++index) {
    shared_prefixes_.push_back(
        MakePrompt(script_.Below(40), static_cast<TokenId>(seed % 1000) * 8 + index));
  }
}

SchedulerOptions RandomSchedulerRun::MakeOptions() {
  SchedulerOptions options;
  options.page_size = script_.Pick(std::vector{1, 2, 4, 8});
  options.max_model_len = 16 + script_.Below(64);
  const std::int32_t pages_of_one =
      (options.max_model_len + options.page_size - 1) / options.page_size;
  options.num_device_pages =
      pages_of_one + script_.Below((script_.Chance(35) ? 12 : 2) * pages_of_one);
  options.max_num_seqs = 1 + script_.Below(8);
  options.max_num_batched_tokens =
      options.max_num_seqs + script_.Below(script_.Chance(50) ? 6 : 64);
  options.max_loras = 1 + script_.Below(3);
  options.enable_prefix_caching = script_.Chance(75);
  options.scheduling_policy = script_.Pick(
      std::vector{SchedulingPolicy::kFair, SchedulingPolicy::kFcfs, SchedulingPolicy::kLpm});
  options.priority_ageing_us = 1 + script_.Below(script_.Chance(50) ? 20 : 3000);
  AddTiers(options);
  AddAdapterMemory(options);
  AddLimits(options);
  return options;
}

void RandomSchedulerRun::AddTiers(SchedulerOptions& options) {
  if (script_.Chance(35)) return;
  options.num_host_pages =
      1 + script_.Below((script_.Chance(60) ? 6 : 1) * options.num_device_pages);
  options.write_policy = script_.Pick(
      std::vector{WritePolicy::kOff, WritePolicy::kWriteBack, WritePolicy::kWriteThrough});
  if (script_.Chance(50)) {
    options.write_back_watermark_pages = 1 + script_.Below(options.num_device_pages);
  }
}

void RandomSchedulerRun::AddAdapterMemory(SchedulerOptions& options) {
  max_adapter_bytes_ = 1 + script_.Below(100);
  if (script_.Chance(80)) {
    options.adapter_memory_bytes = max_adapter_bytes_ + script_.Below(2 * max_adapter_bytes_);
  }
  options.max_loading_adapters = 1 + script_.Below(4);
  options.loads_staged_only = script_.Chance(40);
  if (script_.Chance(30)) options.adapter_patience_us = script_.Below(300);
  if (script_.Chance(50)) options.adapter_time_slice_steps = 1 + script_.Below(8);
  if (script_.Chance(50)) options.adapter_pause_us = script_.Below(300);
}

void RandomSchedulerRun::AddLimits(SchedulerOptions& options) {
  if (script_.Chance(25)) options.max_queued_requests = 1 + script_.Below(8);
  if (script_.Chance(25)) options.max_queued_tokens = 1 + script_.Below(200);
  if (script_.Chance(25)) options.max_requests_per_adapter = 1 + script_.Below(4);
  if (!script_.Chance(40)) return;
  for (std::int32_t size = 1 + script_.Below(3); size < options.max_num_seqs;
       size += 1 + script_.Below(4)) {
    options.padded_batch_sizes.push_back(size);
  }
}

Outcome RandomSchedulerRun::CopyOutcomeNow() {
  if (timing_.Chance(copy_slowness_)) return Outcome::kUnderWay;
  if (!timing_.Chance(copy_failures_)) return Outcome::kDone;
  ++coverage_.num_failed_copies;
  return Outcome::kFailed;
}

Outcome RandomSchedulerRun::LoadOutcomeNow(AdapterId id) {
  if (timing_.Chance(load_slowness_)) return Outcome::kUnderWay;
  // A first load, or one of those after it.
  if (!failing_.contains(id) || timing_.Chance(40)) return Outcome::kDone;
  ++coverage_.num_failed_loads;
  return Outcome::kFailed;
}

// --- Operations ----------------------------------------------------------------------------------

void RandomSchedulerRun::Run(std::int64_t num_steps) {
  busyness_ = script_.Below(60) + 10;
  for (std::int64_t step = 0; step < num_steps; ++step) {
    if (step % 64 == 0) busyness_ = script_.Below(60) + 10;
    Operate();
    Step(/*with_operations=*/true);
    if (::testing::Test::HasFailure()) return;
  }
  FinishAll();
}

void RandomSchedulerRun::Operate() {
  harness_.AdvanceClock(script_.Below(60));
  if (script_.Chance(busyness_)) AddRequest();
  if (timing_.Chance(2)) AbortOne();
  if (script_.Chance(4) && open_.size() < 8) OpenAdapter();
  if (script_.Chance(4) && !open_.empty()) ChangeAdapter(script_.Pick(open_));
  if (script_.Chance(2) && !open_.empty()) {
    const AdapterId id = script_.Pick(open_);
    std::erase(open_, id);
    DrainAdapter(id);
  }
}

void RandomSchedulerRun::OpenAdapter() {
  const AdapterId id(next_adapter_id_++);
  const AdapterOptions options = {.digest_seed = script_.engine(),
                                  .size_bytes = script_.Below(max_adapter_bytes_ + 1),
                                  .weight = script_.Pick(std::vector{0.1, 1.0, 1.0, 2.0, 10.0}),
                                  .is_pinned = script_.Chance(6),
                                  .is_staged = script_.Chance(50)};
  if (script_.Chance(10)) failing_.insert(id);
  open_.push_back(id);
  try {
    harness_.OpenAdapter(id, options);
  } catch (const CapacityError&) {
    ++coverage_.num_refused_pins;  // with what is pinned it can never fit
    refused_.insert(id);
  }
}

void RandomSchedulerRun::ChangeAdapter(AdapterId id) {
  const bool changes_staging = script_.Chance(40);
  const bool is_staged = script_.Chance(60);
  const bool changes_weight = script_.Chance(40);
  const double weight = script_.Pick(std::vector{0.5, 1.0, 4.0});
  const bool is_pinned = script_.Chance(50);
  try {
    if (changes_staging) {
      harness_.SetAdapterStaged(id, is_staged);
    } else if (changes_weight) {
      harness_.scheduler().SetAdapterWeight(id, weight);
    } else {
      harness_.SetAdapterPinned(id, is_pinned);
      coverage_.num_pins += is_pinned;
    }
  } catch (const CapacityError&) {
    ++coverage_.num_refused_pins;
  } catch (const AdapterNotFoundError&) {
    EXPECT_FALSE(IsOpen(id)) << "adapter " << id;
  }
}

void RandomSchedulerRun::DrainAdapter(AdapterId id) {
  if (refused_.contains(id) || draining_.contains(id) || harness_.drained().contains(id)) return;
  draining_.insert(id);
  coverage_.num_drains_with_requests += !LiveRequests(id).empty();
  harness_.scheduler().DrainAdapter(id);
  if (timing_.Chance(30)) harness_.scheduler().DrainAdapter(id);  // changes nothing
  EXPECT_THROW(harness_.Add(-1, id, MakePrompt(1), 1), AdapterNotFoundError);
}

void RandomSchedulerRun::AddRequest() {
  NewRequest request = MakeRequest(next_request_id_++ * request_id_factor);
  const AdapterId adapter = request.adapter_id;
  if (harness_.live_requests().size() >= kMaxLiveRequests) return;
  ++coverage_.num_requests;
  try {
    harness_.Add(std::move(request));
  } catch (const CapacityError&) {
    ++coverage_.num_rejected;
  } catch (const AdapterNotFoundError&) {
    EXPECT_FALSE(IsOpen(adapter)) << "adapter " << adapter;
  }
}

NewRequest RandomSchedulerRun::MakeRequest(std::int64_t id) {
  NewRequest request;
  request.request_id = RequestId(id);
  request.prompt_token_ids = MakeRequestPrompt();
  if (open_.empty() || script_.Chance(30)) {
    request.adapter_id = kBaseAdapter;
  } else {
    // Often one of the first, so that some adapters are busy.
    request.adapter_id = script_.Chance(40) ? open_.front() : script_.Pick(open_);
  }
  const std::int32_t room = harness_.scheduler().options().max_model_len -
                            static_cast<std::int32_t>(request.prompt_token_ids.size());
  request.max_tokens = 1 + script_.Below(room);
  request.reuse_prefix = script_.Chance(85);
  // Not drawn, so that the other choices of a seed stay what they are.
  const auto domain = static_cast<std::size_t>(id / request_id_factor % 5);
  request.isolation_domain = std::array{"", "", "", "acme", "bolt"}[domain];
  if (script_.Chance(30)) request.priority = script_.Below(5) - 2;
  if (script_.Chance(10)) {
    request.arrival_us = std::max<std::int64_t>(0, harness_.now_us() - script_.Below(100));
  }
  if (script_.Chance(15)) request.deadline_us = harness_.now_us() + script_.Below(1500);
  return request;
}

std::vector<TokenId> RandomSchedulerRun::MakeRequestPrompt() {
  if (!old_prompts_.empty() && script_.Chance(30)) {
    // Mostly one of the last few: their pages may be anywhere.
    const auto size = static_cast<std::int32_t>(old_prompts_.size());
    return old_prompts_[static_cast<std::size_t>(std::max(0, size - 1 - script_.Below(8)))];
  }
  const std::int32_t max_model_len = harness_.scheduler().options().max_model_len;
  std::vector<TokenId> prompt;
  if (script_.Chance(60)) prompt = script_.Pick(shared_prefixes_);
  prompt.resize(
      static_cast<std::size_t>(script_.Below(static_cast<std::int32_t>(prompt.size()) + 1)));
  const std::vector<TokenId> tail =
      MakePrompt(1 + script_.Below(max_model_len / 2), script_.Below(5000));
  prompt.insert(prompt.end(), tail.begin(), tail.end());
  if (std::cmp_greater_equal(prompt.size(), max_model_len)) {
    prompt.resize(static_cast<std::size_t>(max_model_len - 1));
  }
  if (script_.Chance(20)) old_prompts_.push_back(prompt);
  return prompt;
}

std::vector<std::int64_t> RandomSchedulerRun::LiveRequests(AdapterId adapter) const {
  std::vector<std::int64_t> ids;
  for (const std::int64_t id : harness_.live_requests()) {
    if (harness_.request(id).adapter == adapter) ids.push_back(id);
  }
  return ids;
}

void RandomSchedulerRun::AbortOne() {
  const std::set<std::int64_t>& live = harness_.live_requests();
  if (live.empty()) return;
  const std::int64_t late_aborts = harness_.num_late_aborts();
  harness_.Abort(*std::next(live.begin(), timing_.Below(static_cast<std::int32_t>(live.size()))));
  coverage_.num_other_aborts += harness_.num_late_aborts() == late_aborts;
}

// --- Steps ---------------------------------------------------------------------------------------

void RandomSchedulerRun::Step(bool with_operations) {
  const SchedulerCounters before = harness_.scheduler().Counters();
  const bool had_work = harness_.scheduler().HasWork();
  // An engine whose overlap is on still has steps without, for example when its executor is quick.
  if (timing_.Chance(15)) harness_.AdvanceAll();
  const bool was_outstanding = harness_.num_outstanding() > 0;
  std::int64_t num_preemptions = 0;
  const RecordedPlan plan = harness_.Step([&] {
    num_preemptions = harness_.scheduler().Counters().total_preemptions - before.total_preemptions;
    if (with_operations) OperateBesidePlans();
  });
  GiveUpFailed();
  CheckReadAhead();
  if (harness_.scheduler().options().loads_staged_only) ReadAhead();
  if (plan.IsEmpty() && !was_outstanding) CheckEmptyPlan(plan, had_work);
  if (!had_work) {
    EXPECT_TRUE(plan.request_ids.empty() && plan.load_adapter_ids.empty() &&
                plan.drained_adapter_ids.empty())
        << "more than copies are planned although no work was due";
  }
  for (const std::int64_t id : plan.drained_adapter_ids) {
    EXPECT_EQ(draining_.erase(AdapterId(id)), 1U) << "adapter " << id << " was never drained";
    ++coverage_.num_drained_adapters;
  }
  if (was_outstanding) coverage_.num_sit_outs += num_preemptions;
  for (const std::uint8_t samples : plan.samples_token) coverage_.num_chunks += samples == 0;
  CountStarts(plan);
  ++coverage_.num_steps;
  if (on_plan) on_plan(plan);
}

void RandomSchedulerRun::OperateBesidePlans() {
  if (timing_.Chance(3)) AbortOne();
  if (timing_.Chance(20)) harness_.Report();
  if (script_.Chance(20)) Operate();
  GiveUpFailed();
}

/// Nothing was outstanding and yet nothing was planned: everything waits for reports.
void RandomSchedulerRun::CheckEmptyPlan(const RecordedPlan& plan, bool had_work) {
  if (!had_work || !plan.expired_request_ids.empty()) return;
  ++coverage_.num_waits;
}

/// What is to be staged waits without bytes, and comes in the order of those that wait.
void RandomSchedulerRun::CheckReadAhead() {
  const Scheduler& scheduler = harness_.scheduler();
  std::vector<AdapterId> all;
  for (AdapterId id(1); id.value() < next_adapter_id_; id = AdapterId(id.value() + 1)) {
    all.push_back(id);
  }
  const std::vector<AdapterId> waiting = scheduler.WaitingAdapters(all);
  auto next = waiting.begin();
  for (const AdapterId id : scheduler.AdaptersToStage()) {
    next = std::find(next, waiting.end(), id);
    EXPECT_NE(next, waiting.end()) << "adapter " << id << " does not wait, or is out of order";
    EXPECT_FALSE(harness_.executor().staged.contains(id)) << "adapter " << id;
    if (::testing::Test::HasFailure()) return;
    ++coverage_.num_to_stage;
  }
}

/// What an engine does for a scheduler that waits for it; a read takes some steps.
void RandomSchedulerRun::ReadAhead() {
  for (const AdapterId id : harness_.scheduler().AdaptersToStage()) {
    if (!timing_.Chance(40)) break;
    harness_.SetAdapterStaged(id, true);
    ++coverage_.num_read_ahead;
  }
}

/// What an engine does with a generation that could not be loaded.
void RandomSchedulerRun::GiveUpFailed() {
  for (const AdapterId id : harness_.failed()) {
    if (!given_up_.insert(id).second) continue;
    for (const std::int64_t request : LiveRequests(id)) harness_.Abort(request);
    DrainAdapter(id);
  }
}

void RandomSchedulerRun::CountStarts(const RecordedPlan& plan) {
  for (const std::int64_t id : plan.request_ids) {
    const TrackedRequest& started = harness_.request(id);
    if (started.num_steps != 1) continue;
    coverage_.num_overtakings +=
        std::ranges::any_of(harness_.live_requests(), [&](std::int64_t other) {
          const TrackedRequest& waiting = harness_.request(other);
          return waiting.num_steps == 0 && waiting.adapter == started.adapter &&
                 waiting.priority == started.priority && waiting.arrival < started.arrival;
        });
  }
}

// --- The end -------------------------------------------------------------------------------------

void RandomSchedulerRun::FinishAll() {
  // A step computes at least one token or waits for a report, so with the work that preemptions and
  // failed copies repeat this bound is generous; a request that hangs never meets it.
  copy_slowness_ = std::min(copy_slowness_, 50);
  load_slowness_ = std::min(load_slowness_, 50);
  std::int64_t bound = 200;
  for (const std::int64_t id : harness_.live_requests()) {
    const TrackedRequest& request = harness_.request(id);
    bound += 20 + 8 * (static_cast<std::int64_t>(request.prompt.size()) + request.max_tokens);
  }
  for (std::int64_t step = 0; harness_.scheduler().HasWork(); ++step) {
    ASSERT_LT(step, bound) << "requests hang";
    harness_.AdvanceClock(script_.Below(60));
    if (!open_.empty() && timing_.Chance(10)) {
      DrainAdapter(open_.back());
      open_.pop_back();
    }
    Step(/*with_operations=*/false);
    if (::testing::Test::HasFailure()) return;
  }
  for (const AdapterId id : open_) DrainAdapter(id);
  for (std::int64_t step = 0; harness_.scheduler().HasWork(); ++step) {
    ASSERT_LT(step, 500) << "drains hang";
    Step(/*with_operations=*/false);
  }
  while (harness_.scheduler().Stats().num_transfers > 0) harness_.Report();
  harness_.ExpectRightOutputs();
  harness_.ExpectNothingLeft();
  harness_.ExpectCountersAgree();
  EXPECT_TRUE(draining_.empty()) << draining_.size() << " drains never completed";
  EXPECT_TRUE(harness_.executor().OnDevice().empty());
  EXPECT_EQ(harness_.scheduler().Stats().adapters.size(), 1U) << "only the base model is left";
  CountTotals();
}

void RandomSchedulerRun::CountTotals() {
  const SchedulerStats stats = harness_.scheduler().Stats();
  coverage_.num_preemptions += stats.total_preemptions;
  coverage_.num_evicted_pages += stats.total_evicted_pages;
  coverage_.num_hit_tokens += stats.total_hit_tokens;
  coverage_.num_host_hit_tokens += stats.total_host_hit_tokens;
  coverage_.num_evicted_host_pages += stats.total_evicted_host_pages;
  coverage_.num_expired += stats.total_expired_requests;
  coverage_.num_adapter_loads += stats.total_adapter_loads;
  coverage_.num_adapter_evictions += stats.total_adapter_evictions;
  coverage_.num_closings += stats.total_closings;
  coverage_.num_pauses += stats.total_adapter_pauses;
  coverage_.num_write_backs += harness_.num_write_backs();
  coverage_.num_load_backs += harness_.num_load_backs();
  coverage_.num_unknown_tokens += harness_.num_unknown_tokens();
  coverage_.num_late_finishes += harness_.num_late_finishes();
  coverage_.num_late_aborts += harness_.num_late_aborts();
  coverage_.num_padded_rows += harness_.num_padded_rows();
  coverage_.num_adapter_reloads += harness_.num_reloads();
}

void RandomCoverage::ExpectAllCasesWereMet() const {
  EXPECT_GT(num_chunks, 5000);
  EXPECT_GT(num_preemptions, 500);
  EXPECT_GT(num_sit_outs, 100);
  EXPECT_GT(num_evicted_pages, 5000);
  EXPECT_GT(num_hit_tokens, 5000);
  EXPECT_GT(num_unknown_tokens, 5000);
  EXPECT_GT(num_late_finishes, 100);
  EXPECT_GT(num_late_aborts, 200);
  EXPECT_GT(num_other_aborts, 200);
  EXPECT_GT(num_expired, 200);
  EXPECT_GT(num_rejected, 500);
  EXPECT_GT(num_overtakings, 100);
  EXPECT_GT(num_padded_rows, 500);
  EXPECT_GT(num_adapter_reloads, 100);
  EXPECT_GT(num_adapter_evictions, 200);
  EXPECT_GT(num_failed_loads, 50);
  EXPECT_GT(num_to_stage, 1000);
  EXPECT_GT(num_read_ahead, 300);
  EXPECT_GT(num_closings, 200);
  EXPECT_GT(num_pauses, 200);
  EXPECT_GT(num_pins, 100);
  EXPECT_GT(num_refused_pins, 50);
  EXPECT_GT(num_drained_adapters, 300);
  EXPECT_GT(num_drains_with_requests, 100);
  EXPECT_GT(num_write_backs, 1000);
  EXPECT_GT(num_load_backs, 100);
  EXPECT_GT(num_failed_copies, 100);
  EXPECT_GT(num_host_hit_tokens, 500);
  EXPECT_GT(num_evicted_host_pages, 500);
  EXPECT_GT(num_waits, 100);
}

std::ostream& operator<<(std::ostream& os, const RandomCoverage& c) {
  return os << c.num_steps << " steps, " << c.num_requests << " requests (" << c.num_rejected
            << " rejected, " << c.num_expired << " expired, " << c.num_overtakings << " overtook), "
            << c.num_chunks << " chunks, " << c.num_preemptions << " preemptions ("
            << c.num_sit_outs << " sat out), " << c.num_evicted_pages << " pages evicted, "
            << c.num_hit_tokens << " tokens from the cache, " << c.num_unknown_tokens
            << " tokens unknown, " << c.num_late_finishes << " late finishes, " << c.num_late_aborts
            << " late + " << c.num_other_aborts << " aborts, " << c.num_padded_rows
            << " padded rows, " << c.num_adapter_loads << " loads (" << c.num_adapter_reloads
            << " again, " << c.num_failed_loads << " failed), " << c.num_to_stage << " to stage, "
            << c.num_read_ahead << " read ahead, " << c.num_adapter_evictions
            << " adapters evicted, " << c.num_closings << " closings, " << c.num_pauses
            << " pauses, " << c.num_pins << " pins, " << c.num_refused_pins << " refused, "
            << c.num_drained_adapters << " adapters drained (" << c.num_drains_with_requests
            << " in use), " << c.num_write_backs << " write-backs, " << c.num_load_backs
            << " load-backs, " << c.num_failed_copies << " copies failed, " << c.num_host_hit_tokens
            << " tokens from the host, " << c.num_evicted_host_pages << " host pages evicted, "
            << c.num_waits << " waits for reports";
}

}  // namespace lora_serve::testing
