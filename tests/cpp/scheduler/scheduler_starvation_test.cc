// Nobody starves: shares of steps and tokens, and the bound on waiting that
// csrc/scheduler/README.md states, over long simulations.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "support/scheduler_scenario.h"
#include "support/trivial_executor.h"

namespace lora_serve {
namespace {

using testing::Overlap;
using testing::TrivialExecutor;

/// Adds requests of a few tokens, and knows who waits.
class Traffic {
 public:
  Traffic(Scheduler* scheduler, std::int32_t num_prompt_tokens, std::int32_t max_tokens)
      : scheduler_backptr_(scheduler),
        num_prompt_tokens_(num_prompt_tokens),
        max_tokens_(max_tokens) {}

  std::int64_t Add(AdapterId adapter) {
    const std::int64_t id = next_id_++;
    scheduler_backptr_->AddRequest(
        {.request_id = RequestId(id),
         .adapter_id = adapter,
         .prompt_token_ids = std::vector<TokenId>(static_cast<std::size_t>(num_prompt_tokens_), 7),
         .max_tokens = max_tokens_});
    return id;
  }

  /// Every one of `adapters` has `num_requests` requests, waiting and running.
  void KeepBusy(const std::vector<AdapterId>& adapters, std::int64_t num_requests) {
    for (const AdapterStats& stats : scheduler_backptr_->Stats().adapters) {
      if (std::ranges::find(adapters, stats.adapter_id) == adapters.end()) continue;
      for (auto live = stats.num_waiting_requests + stats.num_running_requests; live < num_requests;
           ++live) {
        Add(stats.adapter_id);
      }
    }
  }

 private:
  Scheduler* scheduler_backptr_;
  std::int32_t num_prompt_tokens_;
  std::int32_t max_tokens_;
  std::int64_t next_id_ = 0;
};

// --- Two adapters, one place --------------------------------------------------------------------

enum class Scarce : std::uint8_t { kPlaces, kBytes };

class SharedPlaceTest
    : public ::testing::TestWithParam<std::tuple<Scarce, Overlap, std::int32_t, bool>> {};
INSTANTIATE_TEST_SUITE_P(
    All, SharedPlaceTest,
    ::testing::Combine(::testing::Values(Scarce::kPlaces, Scarce::kBytes),
                       ::testing::Values(Overlap::kOff, Overlap::kOn),
                       ::testing::Values(0, 8),  // time slice
                       ::testing::Bool()),       // the base model is busy, too
    [](const auto& param_info) {
      return std::string(std::get<0>(param_info.param) == Scarce::kPlaces ? "Places" : "Bytes") +
             (std::get<1>(param_info.param) == Overlap::kOn ? "Overlapped" : "") +
             (std::get<2>(param_info.param) > 0 ? "TimeSlices" : "") +
             (std::get<3>(param_info.param) ? "BesideTheBase" : "");
    });

TEST_P(SharedPlaceTest, TwoBusyAdaptersEachHaveHalfOfTheSteps) {
  const auto [scarce, overlap, time_slice, base_is_busy] = GetParam();
  Scheduler scheduler({.page_size = 16,
                       .num_device_pages = 256,
                       .max_num_seqs = 8,
                       .max_num_batched_tokens = 256,
                       .max_model_len = 64,
                       .max_loras = scarce == Scarce::kPlaces ? 1 : 8,
                       .adapter_memory_bytes = scarce == Scarce::kBytes ? 10 : 0,
                       .adapter_time_slice_steps = time_slice});
  const std::vector<AdapterId> busy = {AdapterId(1), AdapterId(2)};
  for (const AdapterId id : busy) scheduler.OpenAdapter(id, {.size_bytes = 10});
  Traffic traffic(&scheduler, 8, 32);
  TrivialExecutor executor(&scheduler, overlap, /*num_load_steps=*/1);
  std::map<AdapterId, std::int64_t> num_plans_with_rows;
  std::map<std::int64_t, AdapterId> adapter_of_slot;
  for (int plans = 0; plans < 1000; ++plans) {
    traffic.KeepBusy(busy, 3);
    if (base_is_busy) traffic.KeepBusy({kBaseAdapter}, 2);
    const ExecutionPlan& plan = executor.Step();
    for (std::size_t load = 0; load < plan.load_adapter_ids.size(); ++load) {
      adapter_of_slot[plan.load_adapter_slots[load]] = AdapterId(plan.load_adapter_ids[load]);
    }
    for (const std::int32_t slot : plan.active_lora_ids) {
      if (slot >= 0) ++num_plans_with_rows[adapter_of_slot.at(slot)];
    }
  }
  // A swap of adapters that are not staged costs plans without rows: more of them with time slices.
  const std::int64_t num_plans = num_plans_with_rows[busy[0]] + num_plans_with_rows[busy[1]];
  EXPECT_GE(num_plans, time_slice > 0 ? 600 : 800);
  for (const AdapterId id : busy) {
    EXPECT_GE(10 * num_plans_with_rows[id], 4 * num_plans) << "adapter " << id;
    EXPECT_LE(10 * num_plans_with_rows[id], 6 * num_plans) << "adapter " << id;
  }
  scheduler.CheckInvariants();
}

// --- Weights ------------------------------------------------------------------------------------

class FairSharesTest : public ::testing::TestWithParam<Overlap> {
 protected:
  static constexpr SchedulerOptions kFewRows = {.page_size = 16,
                                                .num_device_pages = 256,
                                                .max_num_seqs = 4,
                                                .max_num_batched_tokens = 256,
                                                .max_model_len = 64};

  /// Tokens that each had in `num_steps` steps with requests always waiting.
  static std::map<AdapterId, std::int64_t> TokensOf(Scheduler& scheduler, TrivialExecutor& executor,
                                                    Traffic& traffic,
                                                    const std::vector<AdapterId>& busy,
                                                    int num_steps) {
    std::map<AdapterId, std::int64_t> tokens;
    for (const AdapterStats& stats : scheduler.Stats().adapters) {
      tokens[stats.adapter_id] = -stats.num_scheduled_tokens;
    }
    for (int step = 0; step < num_steps; ++step) {
      traffic.KeepBusy(busy, 6);
      executor.Step();
    }
    for (const AdapterStats& stats : scheduler.Stats().adapters) {
      tokens[stats.adapter_id] += stats.num_scheduled_tokens;
    }
    return tokens;
  }

  static void ExpectShares(const std::map<AdapterId, std::int64_t>& tokens,
                           const std::map<AdapterId, double>& weights) {
    double num_tokens = 0;
    double sum_of_weights = 0;
    for (const auto& [id, weight] : weights) {
      num_tokens += static_cast<double>(tokens.at(id));
      sum_of_weights += weight;
    }
    for (const auto& [id, weight] : weights) {
      const double expected = num_tokens * weight / sum_of_weights;
      EXPECT_NEAR(static_cast<double>(tokens.at(id)), expected, 0.1 * expected)
          << "adapter " << id << " of weight " << weight;
    }
  }
};
INSTANTIATE_TEST_SUITE_P(All, FairSharesTest, testing::BothWays(), testing::WayName);

TEST_P(FairSharesTest, RowsUnderContentionGiveTokensInProportionToWeights) {
  Scheduler scheduler(kFewRows);
  std::map<AdapterId, double> weights = {
      {kBaseAdapter, 1.0}, {AdapterId(1), 1.0}, {AdapterId(2), 2.0}, {AdapterId(3), 4.0}};
  std::vector<AdapterId> busy;
  for (const auto& [id, weight] : weights) {
    if (id != kBaseAdapter) scheduler.OpenAdapter(id, {.weight = weight});
    busy.push_back(id);
  }
  Traffic traffic(&scheduler, 8, 24);
  TrivialExecutor executor(&scheduler, GetParam());
  for (int step = 0; step < 10; ++step) executor.Step();
  ExpectShares(TokensOf(scheduler, executor, traffic, busy, 4000), weights);
  // A change of weights takes effect from then on.
  weights[kBaseAdapter] = 3.0;
  weights[AdapterId(3)] = 0.5;
  for (const auto& [id, weight] : weights) scheduler.SetAdapterWeight(id, weight);
  TokensOf(scheduler, executor, traffic, busy, 200);
  ExpectShares(TokensOf(scheduler, executor, traffic, busy, 4000), weights);
}

TEST_P(FairSharesTest, LongPromptsCountAsMuchAsLongAnswers) {
  Scheduler scheduler(kFewRows);
  for (const std::int64_t id : {1, 2}) scheduler.OpenAdapter(AdapterId(id), {});
  Traffic writers(&scheduler, 2, 40);
  Traffic readers(&scheduler, 2, 40);
  TrivialExecutor executor(&scheduler, GetParam());
  std::int64_t next_id = 1'000'000;
  for (int step = 0; step < 3000; ++step) {
    writers.KeepBusy({AdapterId(1)}, 6);
    const std::vector<AdapterStats> all = scheduler.Stats().adapters;
    const AdapterStats& reader = all.at(2);
    for (auto live = reader.num_waiting_requests + reader.num_running_requests; live < 6; ++live) {
      scheduler.AddRequest(
          {.request_id = RequestId(next_id),
           .adapter_id = AdapterId(2),
           .prompt_token_ids = testing::MakePrompt(50, static_cast<TokenId>(next_id)),
           .max_tokens = 4});
      ++next_id;
    }
    executor.Step();
  }
  const std::vector<AdapterStats> all = scheduler.Stats().adapters;
  const auto expected = static_cast<double>(all.at(1).num_scheduled_tokens);
  EXPECT_NEAR(static_cast<double>(all.at(2).num_scheduled_tokens), expected, 0.1 * expected);
}

TEST_P(FairSharesTest, WhoWasAwayDoesNotSaveUpAndShutOutTheOthers) {
  Scheduler scheduler(kFewRows);
  const std::vector<AdapterId> both = {AdapterId(1), AdapterId(2)};
  for (const AdapterId id : both) scheduler.OpenAdapter(id, {});
  Traffic traffic(&scheduler, 8, 24);
  TrivialExecutor executor(&scheduler, GetParam());
  executor.Step();
  TokensOf(scheduler, executor, traffic, {AdapterId(1)}, 1000);
  ExpectShares(TokensOf(scheduler, executor, traffic, both, 1000),
               {{AdapterId(1), 1.0}, {AdapterId(2), 1.0}});
}

// --- The bound ----------------------------------------------------------------------------------

/// The traffic and the scheduler of one simulation, in the letters of the README.
struct Bound {
  std::int64_t num_adapters = 0;      // N
  std::int64_t num_places = 0;        // P
  std::int64_t max_num_seqs = 0;      // S
  std::int64_t max_steps = 0;         // M: of one request
  std::int64_t num_load_steps = 0;    // L: of P adapters
  std::int64_t time_slice_steps = 0;  // 0 = none

  /// The most steps until the first row of the request that is number `queue_position`, from 1 on,
  /// of its adapter's queue. As csrc/scheduler/README.md has it.
  [[nodiscard]] std::int64_t MaxWait(std::int64_t queue_position) const {
    const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    const std::int64_t slice = 27 * time_slice_steps;  // Q
    const std::int64_t steps =
        time_slice_steps == 0 ? max_steps : max_steps * (4 * slice + num_load_steps + 2);
    return ceil_div(queue_position, max_num_seqs / num_places) *
               ceil_div(num_adapters, num_places) * (2 * steps + num_load_steps) +
           steps;
  }
};

struct BoundCase {
  const char* name;
  Scarce scarce;
  Overlap overlap;
  std::int32_t time_slice_steps;
  SchedulingPolicy policy;
};

class WaitingBoundTest : public ::testing::TestWithParam<BoundCase> {};
INSTANTIATE_TEST_SUITE_P(All, WaitingBoundTest,
                         ::testing::Values(BoundCase{"Places", Scarce::kPlaces, Overlap::kOn, 0,
                                                     SchedulingPolicy::kFair},
                                           BoundCase{"Bytes", Scarce::kBytes, Overlap::kOff, 0,
                                                     SchedulingPolicy::kFair},
                                           BoundCase{"BytesTimeSlices", Scarce::kBytes,
                                                     Overlap::kOn, 8, SchedulingPolicy::kFair}),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

/// Draws from 64 adapters, number k as often as 1 / k.
class ZipfAdapters {
 public:
  explicit ZipfAdapters(std::int64_t num_adapters) {
    std::vector<double> weights;
    for (std::int64_t k = 1; k <= num_adapters; ++k) {
      weights.push_back(1.0 / static_cast<double>(k));
    }
    distribution_ = std::discrete_distribution<std::int64_t>(weights.begin(), weights.end());
  }
  AdapterId Draw(std::mt19937_64& random) { return AdapterId(1 + distribution_(random)); }

 private:
  std::discrete_distribution<std::int64_t> distribution_;
};

TEST_P(WaitingBoundTest, Of64AdaptersOn8PlacesNoRequestOf100000WaitsLonger) {
  constexpr std::int64_t kNumAdapters = 64;
  constexpr std::int32_t kNumPlaces = 8;
  constexpr std::int64_t kNumRequests = 100'000;
  constexpr std::int32_t kMaxTokens = 3;
  constexpr std::int64_t kNumLoadSteps = 1;
  const BoundCase& param = GetParam();
  const bool has_loads = param.scarce == Scarce::kBytes;
  const SchedulerOptions options = {.page_size = 16,
                                    .num_device_pages = 1024,
                                    .max_num_seqs = 64,
                                    .max_num_batched_tokens = 256,
                                    .max_model_len = 16,
                                    .max_loras = kNumPlaces,
                                    .enable_prefix_caching = false,
                                    .adapter_memory_bytes = has_loads ? kNumPlaces : 0,
                                    .max_loading_adapters = kNumPlaces,
                                    .adapter_time_slice_steps = param.time_slice_steps,
                                    .scheduling_policy = param.policy};
  const bool is_overlapped = param.overlap == Overlap::kOn;
  const Bound bound = {
      .num_adapters = kNumAdapters,
      .num_places = kNumPlaces,
      .max_num_seqs = options.max_num_seqs,
      // With overlap an end is known one step later.
      .max_steps = kMaxTokens + (is_overlapped ? 1 : 0),
      .num_load_steps = has_loads ? kNumLoadSteps + 1 + (is_overlapped ? 1 : 0) : 0,
      .time_slice_steps = param.time_slice_steps};
  Scheduler scheduler(options);
  for (std::int64_t id = 1; id <= kNumAdapters; ++id) {
    scheduler.OpenAdapter(AdapterId(id), {.size_bytes = 1});
  }
  Traffic traffic(&scheduler, 3, kMaxTokens);
  TrivialExecutor executor(&scheduler, param.overlap, kNumLoadSteps);
  ZipfAdapters adapters(kNumAdapters);
  std::mt19937_64 random(11);
  struct Waiting {
    std::int64_t arrival_step = 0;
    std::int64_t max_wait = 0;
    AdapterId adapter;
  };
  std::map<std::int64_t, Waiting> waiting;
  std::map<AdapterId, std::int64_t> queue_lengths;
  std::int64_t num_added = 0;
  std::int64_t longest_wait = 0;
  double largest_part = 0;
  std::int64_t num_too_late = 0;
  std::int64_t step = 0;
  while (num_added < kNumRequests || !waiting.empty()) {
    ASSERT_LT(++step, 200'000) << waiting.size() << " requests wait for ever";
    // In waves: quiet, and more than can be served.
    const std::int64_t num_arrivals = step / 100 % 2 == 0 ? 2 + step % 2 : 8 + step % 5;
    for (std::int64_t arrival = 0; arrival < num_arrivals && num_added < kNumRequests; ++arrival) {
      const AdapterId adapter = adapters.Draw(random);
      const std::int64_t id = traffic.Add(adapter);
      waiting[id] = {step, bound.MaxWait(++queue_lengths[adapter]), adapter};
      ++num_added;
    }
    const ExecutionPlan& plan = executor.Step();
    for (std::size_t row = 0; row < plan.request_ids.size(); ++row) {
      const auto it = waiting.find(plan.request_ids[row]);
      if (it == waiting.end()) continue;
      const std::int64_t wait = step - it->second.arrival_step;
      longest_wait = std::max(longest_wait, wait);
      largest_part = std::max(largest_part,
                              static_cast<double>(wait) / static_cast<double>(it->second.max_wait));
      num_too_late += wait > it->second.max_wait;
      --queue_lengths[it->second.adapter];
      waiting.erase(it);
    }
  }
  EXPECT_EQ(num_too_late, 0);
  std::cout << num_added << " requests in " << step << " steps; the longest wait was "
            << longest_wait << " steps, and at most " << std::lround(100 * largest_part)
            << "% of the bound, which is " << bound.MaxWait(1) << " for the first of a queue\n";
  EXPECT_GT(longest_wait, 20) << "too little traffic to learn anything";
  scheduler.CheckInvariants();
}

}  // namespace
}  // namespace lora_serve
