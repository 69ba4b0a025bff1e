// PITFALLS 23 and 24: what a step costs does not depend on the context, and what it decides does
// not depend on the order of a hash table.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::AllScenarios;
using testing::MakePrompt;
using testing::RecordedPlan;
using testing::ScenarioName;
using testing::SchedulerHarness;

class PitfallsCostTest : public testing::SchedulerScenarioTest {
 protected:
  /// The plans of `num_steps` steps of two decoding requests.
  static std::vector<RecordedPlan> DecodeAt(std::int32_t context, std::int32_t num_steps) {
    constexpr std::int32_t kPageSize = 16;
    SchedulerHarness harness({.page_size = kPageSize,
                              .num_device_pages = 2 * (context / kPageSize + 8),
                              .max_num_seqs = 4,
                              .max_num_batched_tokens = 2 * context,
                              .max_model_len = context + 128,
                              .scheduling_policy = SchedulingPolicy::kFcfs},
                             overlap());
    harness.OpenAndLoad(adapter());
    for (std::int64_t id = 1; id <= 2; ++id) {
      harness.Add(id, adapter(),
                  LongRunningPrompt(context, num_steps + 2, static_cast<TokenId>(id)),
                  num_steps + 2);
    }
    harness.Step();
    std::vector<RecordedPlan> plans;
    for (std::int32_t step = 0; step < num_steps; ++step) plans.push_back(harness.Step());
    harness.RunToEnd();
    harness.ExpectRightOutputs();
    return plans;
  }
};
INSTANTIATE_TEST_SUITE_P(All, PitfallsCostTest, AllScenarios(), ScenarioName);

// PITFALLS 23
TEST_P(PitfallsCostTest, ADecodeStepCarriesAsMuchAt64kTokensAsAt1k) {
  constexpr std::int32_t kNumSteps = 34;
  const std::vector<RecordedPlan> at_1k = DecodeAt(1024, kNumSteps);
  const std::vector<RecordedPlan> at_64k = DecodeAt(65536, kNumSteps);
  for (std::size_t step = 0; step < kNumSteps; ++step) {
    SCOPED_TRACE(::testing::Message() << "step " << step);
    ASSERT_EQ(at_1k[step].token_ids.size(), 2U);
    EXPECT_EQ(at_64k[step].NumEntries(), at_1k[step].NumEntries());
    EXPECT_EQ(at_64k[step].delta_pages.size(), at_1k[step].delta_pages.size());
    EXPECT_LE(at_64k[step].delta_pages.size(), 2U) << "at most one new page a row";
  }
}

// PITFALLS 23
TEST_P(PitfallsCostTest, EveryPageTableEntryIsToldOnce) {
  SchedulerHarness harness({.page_size = 4,
                            .num_device_pages = 64,
                            .max_num_seqs = 4,
                            .max_num_batched_tokens = 16,
                            .max_model_len = 128},
                           overlap());
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), LongRunningPrompt(70, 30, 1), 30);
  std::size_t num_entries = 0;
  while (harness.scheduler().HasWork()) num_entries += harness.Step().delta_pages.size();
  EXPECT_EQ(num_entries, 25U) << "99 tokens with KV in pages of 4";
  harness.ExpectRightOutputs();
}

/// Runs the same calls with other ids, which lie elsewhere in every hash table, and gives the plans
/// with the ids of the first run.
class Replay {
 public:
  Replay(std::int64_t request_factor, std::int64_t adapter_factor, testing::Overlap overlap)
      : request_factor_(request_factor),
        adapter_factor_(adapter_factor),
        harness_({.page_size = 2,
                  .num_device_pages = 40,
                  .max_num_seqs = 6,
                  .max_num_batched_tokens = 24,
                  .max_model_len = 48,
                  .max_loras = 2,
                  .num_host_pages = 60,
                  .adapter_memory_bytes = 30,
                  .max_loading_adapters = 2},
                 overlap) {
    harness_.change_event = nullptr;
  }

  std::string Run(AdapterId adapter) {
    std::mt19937_64 random(5);
    const auto below = [&random](std::int32_t limit) {
      return static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(limit));
    };
    for (std::int64_t id = 1; id <= 5; ++id) {
      harness_.OpenAdapter(AdapterId(id * adapter_factor_), {.size_bytes = 10});
    }
    std::string text;
    for (std::int64_t step = 0; step < 200; ++step) {
      if (below(100) < 60) {
        const bool is_mine = below(2) == 0;
        const AdapterId of = is_mine ? adapter : AdapterId(1 + below(5));
        harness_.Add(step * request_factor_, AdapterId(of.value() * adapter_factor_),
                     MakePrompt(1 + below(20), below(8)), 1 + below(12));
      }
      text += Step();
    }
    while (harness_.scheduler().HasWork()) text += Step();
    return text;
  }

 private:
  std::string Step() {
    RecordedPlan plan = harness_.Step();
    for (std::int64_t& id : plan.request_ids) id /= request_factor_;
    for (std::int64_t& id : plan.load_adapter_ids) id /= adapter_factor_;
    for (std::int64_t& id : plan.evicted_adapter_ids) id /= adapter_factor_;
    return plan.ToText() + '\n';
  }

  std::int64_t request_factor_;
  std::int64_t adapter_factor_;
  SchedulerHarness harness_;
};

// PITFALLS 24
TEST_P(PitfallsCostTest, NothingDependsOnTheOrderOfAHashTable) {
  const std::string plans = Replay(1, 1, overlap()).Run(adapter());
  EXPECT_NE(plans.find("transfer_ids"), std::string::npos);
  EXPECT_NE(plans.find("evicted_adapter_ids"), std::string::npos);
  // The tokens of the oracle depend on the adapter's id, so its ids stay in the second run.
  EXPECT_EQ(Replay(1'000'003, 1, overlap()).Run(adapter()), plans);
}

// PITFALLS 24
TEST_P(PitfallsCostTest, CopiesAreNumberedInTheOrderOfThePlansWithoutGaps) {
  SchedulerHarness harness({.page_size = 2,
                            .num_device_pages = 24,
                            .max_num_seqs = 6,
                            .max_num_batched_tokens = 24,
                            .max_model_len = 48,
                            .num_host_pages = 200},
                           overlap());
  harness.OpenAndLoad(adapter());
  std::int64_t next_transfer = 0;
  for (std::int64_t id = 0; id < 60; ++id) {
    harness.Add(id, id % 3 == 0 ? kBaseAdapter : adapter(),
                MakePrompt(9 + static_cast<std::int32_t>(id % 7), static_cast<TokenId>(id % 20)),
                3);
    for (int step = 0; step < 2; ++step) {
      for (const std::int64_t transfer : harness.Step().transfer_ids) {
        EXPECT_EQ(transfer, next_transfer++);
      }
    }
  }
  EXPECT_GT(next_transfer, 40);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

}  // namespace
}  // namespace lora_serve
