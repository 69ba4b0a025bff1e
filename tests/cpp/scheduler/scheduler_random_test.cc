// Random operations against the scheduler, with the oracle executor. After every step the harness
// checks the plan, the invariants and the page accounting; at the end every request has ended
// exactly once, with the tokens of a run alone, and nothing is left. LORA_SERVE_TEST_SEED and
// LORA_SERVE_TEST_STEPS override the first seed and the number of steps in total.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "common/errors.h"
#include "support/scheduler_harness.h"

namespace lora_serve {
namespace {

using testing::CopyOutcome;
using testing::MakePrompt;
using testing::OracleExecutor;
using testing::SchedulerHarness;
using testing::TrackedRequest;

constexpr std::int64_t kStepsPerSeed = 500;

std::int64_t FromEnvironment(const char* name, std::int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::stoll(value);
}

/// What the random runs met, so that the test fails when it no longer meets what it is for.
struct Coverage {
  std::int64_t num_steps = 0;
  std::int64_t num_preemptions = 0;
  std::int64_t num_evicted_pages = 0;
  std::int64_t num_hit_tokens = 0;
  std::int64_t num_aborts_in_plan = 0;
  std::int64_t num_other_aborts = 0;
  std::int64_t num_failed_loads = 0;
  std::int64_t num_drained_adapters = 0;
  std::int64_t num_drains_with_requests = 0;
  std::int64_t num_chunks = 0;
  std::int64_t num_requests = 0;
  std::int64_t num_write_backs = 0;
  std::int64_t num_load_backs = 0;
  std::int64_t num_failed_copies = 0;
  std::int64_t num_host_hit_tokens = 0;
  std::int64_t num_waits_for_copies = 0;  // steps in which nothing could run meanwhile
  std::int64_t num_evicted_host_pages = 0;
};

class RandomRun {
 public:
  RandomRun(std::uint64_t seed, Coverage* coverage)
      : random_(seed), coverage_(*coverage), harness_(MakeOptions()) {
    harness_.load_fails = [this](AdapterId id) { return failing_.contains(id); };
    copy_slowness_ = Chance(40) ? 0 : Below(95);
    copy_failures_ = Chance(50) ? 0 : Below(50);
    harness_.executor().copy_outcome = [this](TransferId, TransferKind) {
      return CopyOutcomeNow();
    };
    harness_.change_event = [this](ExecutionEvent& event) {
      std::shuffle(event.completed_transfer_ids.begin(), event.completed_transfer_ids.end(),
                   random_);
      std::shuffle(event.failed_transfer_ids.begin(), event.failed_transfer_ids.end(), random_);
    };
    for (int index = 0; index < 3; ++index) {
      shared_prefixes_.push_back(
          MakePrompt(Below(40), static_cast<TokenId>(seed % 1000) * 8 + index));
    }
  }

  void Run(std::int64_t num_steps) {
    busyness_ = Below(60) + 10;
    for (std::int64_t step = 0; step < num_steps; ++step) {
      if (step % 64 == 0) busyness_ = Below(60) + 10;
      Operate();
      Step(/*with_operations=*/true);
      if (::testing::Test::HasFailure()) return;
    }
    FinishAll();
  }

  /// Every plan, as text: equal for equal seeds.
  [[nodiscard]] const std::string& log() const { return log_; }

 private:
  std::int32_t Below(std::int32_t limit) {
    return static_cast<std::int32_t>(random_() % static_cast<std::uint64_t>(limit));
  }
  bool Chance(std::int32_t percent) { return Below(100) < percent; }

  SchedulerOptions MakeOptions() {
    SchedulerOptions options;
    options.page_size = std::vector{1, 2, 4, 8}[static_cast<std::size_t>(Below(4))];
    options.max_model_len = 16 + Below(64);
    const std::int32_t pages_of_one =
        (options.max_model_len + options.page_size - 1) / options.page_size;
    options.num_device_pages = pages_of_one + Below((Chance(25) ? 12 : 2) * pages_of_one);
    options.max_num_seqs = 1 + Below(8);
    options.max_num_batched_tokens = options.max_num_seqs + Below(Chance(50) ? 6 : 64);
    options.max_loras = 1 + Below(3);
    options.enable_prefix_caching = Chance(75);
    if (Chance(70)) {
      options.num_host_pages = 1 + Below((Chance(60) ? 6 : 1) * options.num_device_pages);
      options.write_policy =
          std::vector{WritePolicy::kOff, WritePolicy::kWriteBack,
                      WritePolicy::kWriteThrough}[static_cast<std::size_t>(Below(3))];
      if (Chance(50)) options.write_back_watermark_pages = 1 + Below(options.num_device_pages);
    }
    return options;
  }

  CopyOutcome CopyOutcomeNow() {
    if (Chance(copy_slowness_)) return CopyOutcome::kUnderWay;
    if (!Chance(copy_failures_)) return CopyOutcome::kDone;
    ++coverage_.num_failed_copies;
    return CopyOutcome::kFailed;
  }

  void Operate() {
    if (Chance(busyness_)) AddRequest();
    if (Chance(5)) AbortOne();
    if (Chance(4) && open_.size() < 6) OpenAdapter();
    if (Chance(3) && !open_.empty()) DrainAdapter(PickOpen());
  }

  void OpenAdapter() {
    const AdapterId id(next_adapter_id_++);
    if (Chance(15)) failing_.insert(id);
    harness_.scheduler().OpenAdapter(id, {.digest_seed = random_(), .size_bytes = Below(1000)});
    open_.push_back(id);
  }

  AdapterId PickOpen() {
    return open_[static_cast<std::size_t>(Below(static_cast<std::int32_t>(open_.size())))];
  }

  void DrainAdapter(AdapterId id) {
    std::erase(open_, id);
    draining_.insert(id);
    if (!LiveRequests(id).empty()) ++coverage_.num_drains_with_requests;
    harness_.scheduler().DrainAdapter(id);
    if (Chance(30) && harness_.scheduler().HasWork())
      harness_.scheduler().DrainAdapter(id);  // changes nothing
    EXPECT_THROW(harness_.Add(-1, id, MakePrompt(1), 1), AdapterNotFoundError);
  }

  void AddRequest() {
    ++coverage_.num_requests;
    if (!requests_with_followers_.empty() && Chance(40)) {
      AddFollower();
      return;
    }
    const std::int32_t max_model_len = harness_.scheduler().options().max_model_len;
    std::vector<TokenId> prompt;
    if (Chance(60)) prompt = shared_prefixes_[static_cast<std::size_t>(Below(3))];
    prompt.resize(static_cast<std::size_t>(Below(static_cast<std::int32_t>(prompt.size()) + 1)));
    const std::vector<TokenId> tail = MakePrompt(1 + Below(max_model_len / 2), Below(5000));
    prompt.insert(prompt.end(), tail.begin(), tail.end());
    if (std::cmp_greater_equal(prompt.size(), max_model_len)) {
      prompt.resize(static_cast<std::size_t>(max_model_len - 1));
    }
    const std::int32_t room = max_model_len - static_cast<std::int32_t>(prompt.size());
    const AdapterId adapter = open_.empty() || Chance(30) ? kBaseAdapter : PickOpen();
    harness_.Add(next_request_id_, adapter, std::move(prompt), 1 + Below(room), Chance(80));
    if (Chance(20)) requests_with_followers_.push_back(next_request_id_);
    ++next_request_id_;
  }

  /// A request with the prompt of an earlier one, as in a conversation that is taken up again.
  void AddFollower() {
    // Mostly of the last few: their pages may be anywhere.
    const auto size = static_cast<std::int32_t>(requests_with_followers_.size());
    const std::int32_t index = std::max(0, size - 1 - Below(8));
    const TrackedRequest& earlier =
        harness_.request(requests_with_followers_[static_cast<std::size_t>(index)]);
    AdapterId adapter = earlier.adapter;
    if (adapter != kBaseAdapter && std::ranges::find(open_, adapter) == open_.end()) {
      adapter = kBaseAdapter;
    }
    std::vector<TokenId> prompt = earlier.prompt;
    const std::int32_t max_model_len = harness_.scheduler().options().max_model_len;
    const std::int32_t room = max_model_len - static_cast<std::int32_t>(prompt.size());
    harness_.Add(next_request_id_++, adapter, std::move(prompt), 1 + Below(room), Chance(95));
  }

  std::vector<std::int64_t> LiveRequests(std::optional<AdapterId> adapter = std::nullopt) const {
    std::vector<std::int64_t> ids;
    for (const auto& [id, request] : harness_.requests()) {
      if (!request.HasEnded() && (!adapter || request.adapter == *adapter)) ids.push_back(id);
    }
    return ids;
  }

  void AbortOne() {
    const std::vector<std::int64_t> live = LiveRequests();
    if (live.empty()) return;
    harness_.Abort(live[static_cast<std::size_t>(Below(static_cast<std::int32_t>(live.size())))]);
    ++(is_plan_outstanding_ ? coverage_.num_aborts_in_plan : coverage_.num_other_aborts);
  }

  void Step(bool with_operations) {
    const bool had_work = harness_.scheduler().HasWork();
    const bool had_copies = harness_.scheduler().Stats().num_transfers > 0;
    const ExecutionPlan plan = harness_.Step([&] {
      if (!with_operations) return;
      is_plan_outstanding_ = true;
      if (Chance(25)) Operate();
      if (Chance(25)) harness_.ReportCopies();
      is_plan_outstanding_ = false;
    });
    // Loads end within their step and failed adapters are cleaned up below, so something can always
    // run, unless it waits for copies.
    if (plan.IsEmpty()) {
      EXPECT_TRUE(!had_work || had_copies) << "work is due but the plan is empty";
      coverage_.num_waits_for_copies += had_work;
    } else if (!had_work) {
      EXPECT_TRUE(plan.request_ids.empty() && plan.load_adapter_ids.empty() &&
                  plan.drained_adapter_ids.empty())
          << "more than copies are planned although no work was due";
    }
    for (const std::int64_t id : plan.drained_adapter_ids) {
      EXPECT_EQ(draining_.erase(AdapterId(id)), 1U) << "adapter " << id << " was never drained";
      EXPECT_TRUE(LiveRequests(AdapterId(id)).empty()) << "adapter " << id << " is still in use";
      ++coverage_.num_drained_adapters;
    }
    for (const std::int64_t id : plan.load_adapter_ids) {
      if (failing_.contains(AdapterId(id))) GiveUp(AdapterId(id));
    }
    for (const std::uint8_t samples : plan.samples_token) coverage_.num_chunks += samples == 0;
    ++coverage_.num_steps;
    Log(plan);
  }

  /// What an engine does with a generation that could not be loaded.
  void GiveUp(AdapterId id) {
    ++coverage_.num_failed_loads;
    for (const std::int64_t request : LiveRequests(id)) harness_.Abort(request);
    if (!draining_.contains(id)) DrainAdapter(id);
  }

  void FinishAll() {
    // A step computes at least one token or waits for copies, so with the work that preemptions and
    // failed copies repeat this bound is generous; a request that hangs never meets it.
    copy_slowness_ = std::min(copy_slowness_, 50);
    std::int64_t bound = 50;
    for (const std::int64_t id : LiveRequests()) {
      const TrackedRequest& request = harness_.request(id);
      bound += 8 * (static_cast<std::int64_t>(request.prompt.size()) + request.max_tokens);
    }
    for (std::int64_t step = 0; harness_.scheduler().HasWork(); ++step) {
      ASSERT_LT(step, bound) << "requests hang";
      if (!open_.empty() && Chance(30)) DrainAdapter(PickOpen());
      Step(/*with_operations=*/false);
      if (::testing::Test::HasFailure()) return;
    }
    while (!open_.empty()) DrainAdapter(PickOpen());
    while (harness_.scheduler().HasWork()) Step(/*with_operations=*/false);
    while (harness_.scheduler().Stats().num_transfers > 0) harness_.ReportCopies();
    harness_.ExpectRightOutputs();
    harness_.ExpectNothingLeft();
    EXPECT_TRUE(draining_.empty()) << draining_.size() << " drains never completed";
    EXPECT_EQ(harness_.executor().num_loaded_adapters(), 0U);
    const SchedulerStats stats = harness_.scheduler().Stats();
    EXPECT_EQ(stats.adapters.size(), 1U) << "only the base model is left";
    coverage_.num_preemptions += stats.total_preemptions;
    coverage_.num_evicted_pages += stats.total_evicted_pages;
    coverage_.num_hit_tokens += stats.total_hit_tokens;
    coverage_.num_host_hit_tokens += stats.total_host_hit_tokens;
    coverage_.num_evicted_host_pages += stats.total_evicted_host_pages;
    coverage_.num_write_backs += harness_.num_write_backs();
    coverage_.num_load_backs += harness_.num_load_backs();
  }

  void Log(const ExecutionPlan& plan) {
    const auto append = [this](const auto& values) {
      for (const auto value : values)
        log_ += std::to_string(static_cast<std::int64_t>(value)) + ' ';
      log_ += ';';
    };
    append(plan.request_ids);
    append(plan.page_table_rows);
    append(plan.num_scheduled_tokens);
    append(plan.num_computed_tokens);
    append(plan.adapter_slots);
    append(plan.delta_pages);
    append(plan.load_adapter_slots);
    append(plan.drained_adapter_ids);
    append(plan.transfer_ids);
    append(plan.transfer_kinds);
    append(plan.transfer_source_pages);
    append(plan.transfer_destination_pages);
  }

  std::mt19937_64 random_;
  Coverage& coverage_;
  SchedulerHarness harness_;
  std::vector<std::vector<TokenId>> shared_prefixes_;
  std::vector<std::int64_t> requests_with_followers_;
  std::vector<AdapterId> open_;
  std::set<AdapterId> draining_;
  std::set<AdapterId> failing_;
  std::int32_t busyness_ = 0;
  std::int32_t copy_slowness_ = 0;  // percent of the steps that a copy stays under way
  std::int32_t copy_failures_ = 0;  // percent of the copies
  bool is_plan_outstanding_ = false;
  std::int64_t next_adapter_id_ = 1;
  std::int64_t next_request_id_ = 0;
  std::string log_;
};

TEST(SchedulerRandomTest, EveryRequestGetsItsOwnTokensAndNothingIsLeft) {
  const auto first_seed = static_cast<std::uint64_t>(FromEnvironment("LORA_SERVE_TEST_SEED", 1));
  const std::int64_t num_steps = FromEnvironment("LORA_SERVE_TEST_STEPS", 24000);
  Coverage coverage;
  for (std::uint64_t seed = first_seed; coverage.num_steps < num_steps; ++seed) {
    SCOPED_TRACE(::testing::Message() << "LORA_SERVE_TEST_SEED=" << seed);
    RandomRun run(seed, &coverage);
    run.Run(kStepsPerSeed);
    if (HasFailure()) {
      std::cerr << "failed with LORA_SERVE_TEST_SEED=" << seed << '\n';
      return;
    }
  }
  std::cout << "seeds from " << first_seed << ": " << coverage.num_steps << " steps, "
            << coverage.num_requests << " requests, " << coverage.num_chunks << " chunks, "
            << coverage.num_preemptions << " preemptions, " << coverage.num_evicted_pages
            << " pages evicted, " << coverage.num_hit_tokens << " tokens from the cache, "
            << coverage.num_aborts_in_plan << " + " << coverage.num_other_aborts << " aborts, "
            << coverage.num_drained_adapters << " adapters drained ("
            << coverage.num_drains_with_requests << " in use), " << coverage.num_failed_loads
            << " loads failed, " << coverage.num_write_backs << " write-backs, "
            << coverage.num_load_backs << " load-backs, " << coverage.num_failed_copies
            << " copies failed, " << coverage.num_host_hit_tokens << " tokens from the host, "
            << coverage.num_evicted_host_pages << " host pages evicted, "
            << coverage.num_waits_for_copies << " waits for copies\n";
  if (num_steps < 20000) return;
  EXPECT_GT(coverage.num_preemptions, 100);
  EXPECT_GT(coverage.num_evicted_pages, 100);
  EXPECT_GT(coverage.num_hit_tokens, 1000);
  EXPECT_GT(coverage.num_aborts_in_plan, 50);
  EXPECT_GT(coverage.num_other_aborts, 50);
  EXPECT_GT(coverage.num_failed_loads, 20);
  EXPECT_GT(coverage.num_drained_adapters, 100);
  EXPECT_GT(coverage.num_drains_with_requests, 50);
  EXPECT_GT(coverage.num_chunks, 1000);
  EXPECT_GT(coverage.num_write_backs, 1000);
  EXPECT_GT(coverage.num_load_backs, 100);
  EXPECT_GT(coverage.num_failed_copies, 50);
  EXPECT_GT(coverage.num_host_hit_tokens, 500);
  EXPECT_GT(coverage.num_evicted_host_pages, 100);
  EXPECT_GT(coverage.num_waits_for_copies, 20);
}

TEST(SchedulerRandomTest, EqualSeedsMakeEqualPlans) {
  for (std::uint64_t seed = 100; seed < 104; ++seed) {
    Coverage coverage;
    RandomRun first(seed, &coverage);
    first.Run(300);
    RandomRun second(seed, &coverage);
    second.Run(300);
    EXPECT_EQ(first.log(), second.log()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace lora_serve
