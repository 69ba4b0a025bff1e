#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "scheduler/scheduler.h"
#include "support/oracle_executor.h"

namespace lora_serve::testing {

/// `num_tokens` tokens that depend on `seed`.
inline std::vector<TokenId> MakePrompt(std::int32_t num_tokens, TokenId seed = 1) {
  std::vector<TokenId> prompt(static_cast<std::size_t>(num_tokens));
  for (std::size_t index = 0; index < prompt.size(); ++index) {
    prompt[index] = static_cast<TokenId>(
        (static_cast<std::uint32_t>(seed) * 7919U + static_cast<std::uint32_t>(index) * 104729U) %
        static_cast<std::uint32_t>(OracleExecutor::kVocabSize));
  }
  return prompt;
}

/// A prompt after which a run alone samples `num_output_tokens` tokens without a stop token.
inline std::vector<TokenId> MakeLongRunningPrompt(AdapterId adapter, std::int32_t num_prompt_tokens,
                                                  std::int32_t num_output_tokens, TokenId seed) {
  for (;; seed += 1000) {
    std::vector<TokenId> prompt = MakePrompt(num_prompt_tokens, seed);
    const std::vector<TokenId> output =
        OracleExecutor::RunAlone(adapter, prompt, num_output_tokens);
    if (std::cmp_equal(output.size(), num_output_tokens) &&
        !OracleExecutor::IsStopToken(output.back())) {
      return prompt;
    }
  }
}

/// What the harness, like an engine, knows of a request.
struct TrackedRequest {
  AdapterId adapter;
  std::vector<TokenId> prompt;
  std::int32_t max_tokens = 0;
  bool reuse_prefix = true;
  std::vector<TokenId> output;
  /// Of the first plan with a row of it; -1 before.
  std::int32_t num_cached_tokens = -1;
  std::int32_t num_steps = 0;
  /// Of its newest plan.
  std::int32_t newest_num_computed_tokens = 0;
  /// The most tokens whose KV it ever had.
  std::int32_t max_computed_tokens = 0;
  std::int64_t arrival = 0;
  /// Newer requests of adapters that were admitted while this one was the first in line.
  std::int32_t num_times_overtaken = 0;
  bool is_finished = false;
  bool is_aborted = false;

  [[nodiscard]] bool HasEnded() const { return is_finished || is_aborted; }
};

/// A scheduler, an oracle executor, and the checks that hold in every step of every test:
/// the plan is well formed and within its limits, carries the right tokens, adapters and cached
/// counts, invariants hold, and the pages of each tier add up.
class SchedulerHarness {
 public:
  explicit SchedulerHarness(const SchedulerOptions& options)
      : executor_(options), scheduler_(options) {}

  [[nodiscard]] Scheduler& scheduler() { return scheduler_; }
  [[nodiscard]] OracleExecutor& executor() { return executor_; }
  [[nodiscard]] const TrackedRequest& request(std::int64_t id) const { return requests_.at(id); }
  [[nodiscard]] const std::map<std::int64_t, TrackedRequest>& requests() const { return requests_; }
  [[nodiscard]] const std::set<AdapterId>& drained() const { return drained_; }
  [[nodiscard]] std::int32_t max_times_overtaken() const { return max_times_overtaken_; }
  /// Copies that plans have given out.
  [[nodiscard]] std::int64_t num_write_backs() const { return num_write_backs_; }
  [[nodiscard]] std::int64_t num_load_backs() const { return num_load_backs_; }

  /// Opens `adapter` and runs the step that loads it. Nothing for the base model.
  void OpenAndLoad(AdapterId adapter) {
    if (adapter == kBaseAdapter) return;
    scheduler_.OpenAdapter(adapter, {});
    Step();
  }

  void Add(std::int64_t id, AdapterId adapter, std::vector<TokenId> prompt, std::int32_t max_tokens,
           bool reuse_prefix = true) {
    scheduler_.AddRequest({.request_id = RequestId(id),
                           .adapter_id = adapter,
                           .prompt_token_ids = prompt,
                           .max_tokens = max_tokens,
                           .reuse_prefix = reuse_prefix});
    requests_[id] = {.adapter = adapter,
                     .prompt = std::move(prompt),
                     .max_tokens = max_tokens,
                     .reuse_prefix = reuse_prefix,
                     .output = {},
                     .arrival = next_arrival_++};
  }

  void Abort(std::int64_t id) {
    EXPECT_TRUE(scheduler_.Abort(RequestId(id))) << "request " << id;
    EXPECT_FALSE(scheduler_.Abort(RequestId(id))) << "a second abort of request " << id;
    requests_.at(id).is_aborted = true;
  }

  /// One step; `between` runs while the plan is outstanding. Returns the plan. After an empty plan
  /// only copies are reported.
  ExecutionPlan Step(const std::function<void()>& between = nullptr) {
    ExecutionPlan plan = scheduler_.NextPlan(++now_us_);
    num_empty_plans_ = plan.IsEmpty() ? num_empty_plans_ + 1 : 0;
    // Loops of tests wait for something to happen: end them when it never will.
    if (num_empty_plans_ > kMaxEmptyPlans || now_us_ > kMaxSteps) {
      throw std::runtime_error("the scheduler does not move: " + std::to_string(num_empty_plans_) +
                               " empty plans in a row, " + std::to_string(now_us_) + " steps");
    }
    CheckPlan(plan);
    CheckState();
    CheckWhoRuns(plan);
    if (plan.IsEmpty()) {
      if (between) between();
      ReportCopies();
      return plan;
    }
    ExecutionEvent event = executor_.Execute(plan, load_fails);
    if (change_event) change_event(event);
    if (between) between();
    CheckState();
    scheduler_.Advance(event);
    Record(plan, event);
    CheckState();
    return plan;
  }

  /// Reports the copies that end now without a plan; allowed at any time. Returns how many.
  std::int64_t ReportCopies() {
    ExecutionEvent event = executor_.ReportCopies();
    const std::int64_t num_copies =
        std::ssize(event.completed_transfer_ids) + std::ssize(event.failed_transfer_ids);
    if (num_copies == 0) return 0;
    if (change_event) change_event(event);
    scheduler_.Advance(event);
    CheckState();
    return num_copies;
  }

  /// Steps until nothing is left to do; fails the test when that takes more than `max_steps`.
  void RunToEnd(std::int32_t max_steps = 10000) {
    for (std::int32_t step = 0; scheduler_.HasWork(); ++step) {
      ASSERT_LT(step, max_steps) << "requests hang";
      Step();
    }
  }

  /// Every request that was not aborted has ended with the tokens of a run alone; aborted ones with
  /// a prefix of them.
  void ExpectRightOutputs() const {
    for (const auto& [id, request] : requests_) {
      EXPECT_TRUE(request.HasEnded()) << "request " << id;
      std::vector<TokenId> expected =
          OracleExecutor::RunAlone(request.adapter, request.prompt, request.max_tokens);
      if (request.is_aborted) expected.resize(std::min(expected.size(), request.output.size()));
      EXPECT_EQ(request.output, expected) << "request " << id << ", adapter " << request.adapter;
    }
  }

  /// No request, lease or private page is left, and every drained adapter is gone.
  void ExpectNothingLeft() const {
    const SchedulerStats stats = scheduler_.Stats();
    EXPECT_EQ(stats.num_waiting_requests, 0);
    EXPECT_EQ(stats.num_running_requests, 0);
    EXPECT_EQ(stats.num_private_pages, 0);
    EXPECT_EQ(stats.num_transfers, 0);
    for (const AdapterStats& adapter : stats.adapters) {
      EXPECT_NE(adapter.state, AdapterState::kDraining) << "adapter " << adapter.adapter_id;
    }
  }

  [[nodiscard]] AdapterStats StatsOf(AdapterId adapter) const {
    for (const AdapterStats& stats : scheduler_.Stats().adapters) {
      if (stats.adapter_id == adapter) return stats;
    }
    ADD_FAILURE() << "adapter " << adapter << " has no statistics";
    return {};
  }

  /// Whether the load of an adapter fails; by default none does.
  std::function<bool(AdapterId)> load_fails;
  /// Applied to events that are good already: another order of the reports, for example.
  std::function<void(ExecutionEvent&)> change_event;

 private:
  static constexpr std::int64_t kMaxEmptyPlans = 100;  // in a row
  static constexpr std::int64_t kMaxSteps = 20000;

  void CheckState() const {
    scheduler_.CheckInvariants();
    const SchedulerStats stats = scheduler_.Stats();
    EXPECT_EQ(stats.num_free_pages + stats.num_tree_pages + stats.num_private_pages,
              stats.num_device_pages);
    std::int64_t num_used_host_pages = 0;
    for (const AdapterStats& adapter : stats.adapters)
      num_used_host_pages += adapter.num_host_pages;
    EXPECT_EQ(stats.num_free_host_pages + num_used_host_pages, stats.num_host_pages);
  }

  /// Who holds a row is in the plan, unless it waits for copies or for tokens of the step.
  void CheckWhoRuns(const ExecutionPlan& plan) const {
    const SchedulerStats stats = scheduler_.Stats();
    const auto max_tokens = static_cast<std::size_t>(scheduler_.options().max_num_batched_tokens);
    if (stats.num_transfers > 0 || plan.token_ids.size() == max_tokens) {
      EXPECT_LE(std::ssize(plan.request_ids), stats.num_running_requests);
    } else {
      EXPECT_EQ(std::ssize(plan.request_ids), stats.num_running_requests)
          << "a request holds a row but is not in the plan";
    }
  }

  void CheckPlan(const ExecutionPlan& plan) {
    const SchedulerOptions& options = scheduler_.options();
    const std::size_t num_rows = plan.request_ids.size();
    ASSERT_EQ(plan.plan_id, plan.IsEmpty() ? -1 : ++last_plan_id_);
    ASSERT_LE(num_rows, static_cast<std::size_t>(options.max_num_seqs));
    ASSERT_LE(plan.token_ids.size(), static_cast<std::size_t>(options.max_num_batched_tokens));
    for (const std::size_t size : {plan.page_table_rows.size(), plan.num_scheduled_tokens.size(),
                                   plan.num_computed_tokens.size(), plan.num_cached_tokens.size(),
                                   plan.adapter_slots.size(), plan.samples_token.size()}) {
      ASSERT_EQ(size, num_rows);
    }
    ASSERT_EQ(plan.load_adapter_ids.size(), plan.load_adapter_slots.size());
    for (const std::int64_t id : plan.drained_adapter_ids) {
      EXPECT_TRUE(drained_.insert(AdapterId(id)).second)
          << "adapter " << id << " was drained twice";
    }
    CheckTransfers(plan);
    std::set<std::int32_t> rows;
    std::set<std::int32_t> slots;
    std::size_t offset = 0;
    for (std::size_t index = 0; index < num_rows; ++index) {
      EXPECT_TRUE(rows.insert(plan.page_table_rows[index]).second) << "a row is used twice";
      if (plan.adapter_slots[index] >= 0) slots.insert(plan.adapter_slots[index]);
      CheckRow(plan, index, offset);
      offset += static_cast<std::size_t>(plan.num_scheduled_tokens[index]);
    }
    EXPECT_EQ(offset, plan.token_ids.size());
    EXPECT_LE(slots.size(), static_cast<std::size_t>(options.max_loras));
    CheckOvertaking(plan);
  }

  void CheckTransfers(const ExecutionPlan& plan) {
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

  /// Whatever the first in line waits for, newer requests of adapters pass it a bounded number of
  /// times. A preempted request is in front of the line, so only plans without one are counted. Nor
  /// are steps with copies: who waits for one is passed freely.
  void CheckOvertaking(const ExecutionPlan& plan) {
    if (scheduler_.Stats().num_transfers > 0) return;
    TrackedRequest* first = nullptr;
    for (auto& [id, request] : requests_) {
      if (request.HasEnded()) continue;
      const bool is_in_plan = std::ranges::find(plan.request_ids, id) != plan.request_ids.end();
      if (request.num_steps > 0 && !is_in_plan) return;  // preempted
      if (request.num_steps > 0 || !executor_.MayRun(request.adapter)) continue;
      if (first == nullptr || request.arrival < first->arrival) first = &request;
    }
    if (first == nullptr) return;
    for (const std::int64_t id : plan.request_ids) {
      const TrackedRequest& request = requests_.at(id);
      first->num_times_overtaken += request.num_steps == 1 && request.adapter != kBaseAdapter &&
                                    request.arrival > first->arrival;
    }
    EXPECT_LE(first->num_times_overtaken, 16) << "a request of adapter " << first->adapter;
    max_times_overtaken_ = std::max(max_times_overtaken_, first->num_times_overtaken);
  }

  void CheckRow(const ExecutionPlan& plan, std::size_t index, std::size_t offset) {
    TrackedRequest& request = requests_.at(plan.request_ids[index]);
    SCOPED_TRACE(::testing::Message() << "request " << plan.request_ids[index]);
    EXPECT_FALSE(request.HasEnded());
    EXPECT_EQ(executor_.AdapterIn(plan.adapter_slots[index]), request.adapter);
    const auto num_scheduled = plan.num_scheduled_tokens[index];
    const auto num_computed = plan.num_computed_tokens[index];
    ASSERT_GE(num_scheduled, 1);
    std::vector<TokenId> tokens = request.prompt;
    tokens.insert(tokens.end(), request.output.begin(), request.output.end());
    const auto num_known = static_cast<std::int32_t>(tokens.size());
    ASSERT_LE(num_computed + num_scheduled, num_known);
    EXPECT_EQ(plan.samples_token[index], num_computed + num_scheduled == num_known ? 1 : 0);
    for (std::int32_t token = 0; token < num_scheduled; ++token) {
      EXPECT_EQ(plan.token_ids.at(offset + static_cast<std::size_t>(token)),
                tokens.at(static_cast<std::size_t>(num_computed + token)));
    }
    request.newest_num_computed_tokens = num_computed;
    if (request.num_cached_tokens < 0) request.num_cached_tokens = num_computed;
    EXPECT_EQ(plan.num_cached_tokens[index], request.num_cached_tokens);
    if (!request.reuse_prefix || !scheduler_.options().enable_prefix_caching) {
      EXPECT_LE(num_computed, request.max_computed_tokens) << "another request's prefix was reused";
    }
    request.max_computed_tokens =
        std::max(request.max_computed_tokens, num_computed + num_scheduled);
    ++request.num_steps;
  }

  void Record(const ExecutionPlan& plan, const ExecutionEvent& event) {
    for (std::size_t index = 0; index < plan.request_ids.size(); ++index) {
      TrackedRequest& request = requests_.at(plan.request_ids[index]);
      if (plan.samples_token[index] == 0 || request.is_aborted) continue;
      request.output.push_back(event.sampled_token_ids[index]);
      request.is_finished = event.is_finished[index] == 1 ||
                            static_cast<std::int32_t>(request.output.size()) == request.max_tokens;
      if (request.is_finished) {
        EXPECT_FALSE(scheduler_.Abort(RequestId(plan.request_ids[index])));
      }
    }
  }

  OracleExecutor executor_;
  Scheduler scheduler_;
  std::map<std::int64_t, TrackedRequest> requests_;
  std::set<AdapterId> drained_;
  std::int64_t now_us_ = 0;
  std::int64_t last_plan_id_ = -1;
  std::int64_t num_empty_plans_ = 0;
  std::int64_t next_arrival_ = 0;
  std::int32_t max_times_overtaken_ = 0;
  std::int64_t newest_transfer_ = -1;
  std::int64_t num_write_backs_ = 0;
  std::int64_t num_load_backs_ = 0;
};

}  // namespace lora_serve::testing
