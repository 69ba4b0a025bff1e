// PITFALLS 17 to 19: who is charged for a place among the distinct adapters of a batch.
#include <gtest/gtest.h>

#include <vector>

#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::AllScenarios;
using testing::MakePrompt;
using testing::Outcome;
using testing::RecordedPlan;
using testing::ScenarioName;
using testing::SchedulerHarness;

constexpr AdapterId kFirst{11};
constexpr AdapterId kSecond{12};
constexpr AdapterId kThird{13};

class PitfallsPlacesTest : public testing::SchedulerScenarioTest {
 protected:
  /// Places for adapter(), if it needs one, and `num_others` more.
  static SchedulerOptions Options(std::int32_t num_others) {
    return {.page_size = 4,
            .num_device_pages = 16,
            .max_num_seqs = 8,
            .max_num_batched_tokens = 16,
            .max_model_len = 64,
            .max_loras = num_others + (IsBase() ? 0 : 1)};
  }
};
INSTANTIATE_TEST_SUITE_P(All, PitfallsPlacesTest, AllScenarios(), ScenarioName);

// PITFALLS 17
TEST_P(PitfallsPlacesTest, ARequestThatLacksPagesIsNotChargedForAPlace) {
  SchedulerHarness harness(Options(1), overlap());
  for (const AdapterId id : {adapter(), kFirst, kSecond}) harness.OpenAndLoad(id);
  harness.Add(1, adapter(), LongRunningPrompt(15, 8, 1), 8);
  harness.Step();
  harness.Add(2, kFirst, MakePrompt(60, 2), 2);  // 15 pages, at most 12 are left
  harness.Add(3, kSecond, MakePrompt(4, 3), 2);
  EXPECT_EQ(harness.Step().request_ids, (std::vector<std::int64_t>{1, 3}))
      << "the first adapter was charged although its request could not run";
  harness.RunToEndAndCheck();
}

// PITFALLS 17
TEST_P(PitfallsPlacesTest, AnAdapterThatIsStillBeingLoadedIsNotChargedForAPlace) {
  SchedulerHarness harness(Options(1), overlap());
  for (const AdapterId id : {adapter(), kSecond}) harness.OpenAndLoad(id);
  harness.executor().load_outcome = [](AdapterId) { return Outcome::kUnderWay; };
  harness.OpenAdapter(kThird);
  harness.Add(2, kThird, MakePrompt(4, 2), 2);
  harness.Step();
  harness.Add(1, adapter(), LongRunningPrompt(4, 8, 1), 8);
  harness.Add(3, kSecond, LongRunningPrompt(4, 2, 3), 2);
  for (int step = 0; step < 12; ++step) harness.Step();
  EXPECT_TRUE(harness.request(1).is_finished);
  EXPECT_TRUE(harness.request(3).is_finished) << "it waited for somebody else's adapter";
  harness.executor().load_outcome = nullptr;
  harness.RunToEndAndCheck();
}

// PITFALLS 17
TEST_P(PitfallsPlacesTest, ARequestWhoseLoadFailsIsNotChargedForAPlace) {
  SchedulerHarness harness(Options(1), overlap());
  for (const AdapterId id : {adapter(), kSecond}) harness.OpenAndLoad(id);
  harness.executor().load_outcome = [](AdapterId) { return Outcome::kFailed; };
  harness.OpenAdapter(kThird);
  harness.Add(2, kThird, MakePrompt(4, 2), 2);
  harness.Step();
  harness.AdvanceAll();
  ASSERT_TRUE(harness.StatsOf(kThird).load_failed);
  harness.Add(1, adapter(), MakePrompt(4, 1), 3);
  harness.Add(3, kSecond, MakePrompt(4, 3), 3);
  EXPECT_EQ(harness.Step().request_ids, (std::vector<std::int64_t>{1, 3}));
  harness.Abort(2);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

// PITFALLS 18
TEST_P(PitfallsPlacesTest, ARequestOverTheCapBlocksNobodyBehindIt) {
  SchedulerHarness harness(Options(1), overlap());
  for (const AdapterId id : {adapter(), kFirst, kSecond}) harness.OpenAndLoad(id);
  harness.Add(1, kFirst, testing::MakeLongRunningPrompt(kFirst, 2, 12, 1), 12);
  harness.Add(3, adapter(), LongRunningPrompt(2, 12, 3), 12);
  harness.Add(2, kSecond, MakePrompt(2, 2), 3);  // over the cap
  harness.Add(4, kBaseAdapter, MakePrompt(2, 4), 3);
  harness.Add(5, kFirst, MakePrompt(2, 5), 3);
  harness.Step();
  harness.Step();
  harness.AdvanceAll();
  for (const std::int64_t id : {1, 3, 4, 5}) {
    EXPECT_GT(harness.request(id).num_steps, 0) << "request " << id << " stood behind the wall";
  }
  EXPECT_EQ(harness.request(2).num_steps, 0);
  harness.RunToEndAndCheck();
}

// PITFALLS 18
TEST_P(PitfallsPlacesTest, RequestsOfTheBaseModelNeedNoPlaceAndPassALineOfAdapters) {
  SchedulerHarness harness(Options(1), overlap());
  for (const AdapterId id : {adapter(), kFirst, kSecond}) harness.OpenAndLoad(id);
  harness.Add(1, adapter(), LongRunningPrompt(2, 20, 1), 20);
  harness.Add(2, kFirst, testing::MakeLongRunningPrompt(kFirst, 2, 20, 1), 20);
  harness.Add(3, kSecond, MakePrompt(2, 3), 2);
  harness.Step();
  for (std::int64_t id = 10; id < 15; ++id) {
    harness.Add(id, kBaseAdapter, MakePrompt(2, static_cast<TokenId>(id)), 1);
    EXPECT_TRUE(harness.Step().HasRowOf(id));
    EXPECT_EQ(harness.request(3).num_steps, 0);
  }
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

// PITFALLS 19
TEST_P(PitfallsPlacesTest, AChunkedPrefillInFlightCountsAmongTheAdaptersOfTheBatch) {
  SchedulerHarness harness(Options(0).max_loras == 0 ? Options(1) : Options(0), overlap());
  for (const AdapterId id : {adapter(), kSecond}) harness.OpenAndLoad(id);
  harness.Add(1, adapter(), MakePrompt(40, 1), 1);  // 16 + 16 + 8 tokens
  harness.Step();
  harness.Add(2, kSecond, MakePrompt(2, 2), 1);
  for (int chunk = 1; chunk < 3; ++chunk) {
    const RecordedPlan plan = harness.Step();
    EXPECT_TRUE(plan.HasRowOf(1));
    const bool has_budget = chunk == 2;
    EXPECT_EQ(plan.HasRowOf(2), IsBase() && has_budget) << "it entered beside a chunk";
  }
  while (harness.request(2).num_steps == 0) harness.Step();
  EXPECT_TRUE(IsBase() || harness.request(1).is_finished);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

// PITFALLS 19
TEST_P(PitfallsPlacesTest, ARequestThatHasItsLastTokenPlannedStillCountsUntilItsPlanReturns) {
  SchedulerHarness harness(Options(0).max_loras == 0 ? Options(1) : Options(0), overlap());
  for (const AdapterId id : {adapter(), kSecond}) harness.OpenAndLoad(id);
  harness.Add(1, adapter(), LongRunningPrompt(4, 2, 1), 2);
  harness.Step();
  harness.Add(2, kSecond, MakePrompt(2, 2), 1);
  const RecordedPlan last =
      harness.Step([&] { EXPECT_EQ(harness.StatsOf(adapter()).num_running_requests, 1); });
  EXPECT_TRUE(last.HasRowOf(1));
  EXPECT_EQ(last.HasRowOf(2), IsBase());
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

}  // namespace
}  // namespace lora_serve
