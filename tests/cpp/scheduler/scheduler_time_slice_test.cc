// Time slices: an adapter in place is paused for one that waits, and goes on later.
#include <gtest/gtest.h>

#include <cstdlib>
#include <vector>

#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::Outcome;
using testing::Overlap;
using testing::RecordedPlan;
using testing::SchedulerHarness;

constexpr AdapterId kA{1};
constexpr AdapterId kB{2};
constexpr AdapterId kC{3};
constexpr AdapterId kD{4};
constexpr AdapterOptions kTenBytes = {.size_bytes = 10};
constexpr std::int32_t kLong = 40;

class SchedulerTimeSliceTest : public ::testing::TestWithParam<Overlap> {
 protected:
  /// Two adapters fit.
  static SchedulerOptions Options() {
    return {.page_size = 4,
            .num_device_pages = 128,
            .max_num_seqs = 8,
            .max_num_batched_tokens = 64,
            .max_model_len = 64,
            .adapter_memory_bytes = 20,
            .adapter_time_slice_steps = 4,
            .scheduling_policy = SchedulingPolicy::kFcfs};
  }
  static void AddLong(SchedulerHarness& harness, std::int64_t id, AdapterId adapter,
                      std::int32_t num_tokens = kLong) {
    harness.Add(id, adapter,
                MakeLongRunningPrompt(adapter, 4, num_tokens, static_cast<TokenId>(id)),
                num_tokens);
  }
  /// A has 40 tokens to compute and B 30; both run.
  static void StartTwoLongOnes(SchedulerHarness& harness) {
    for (const AdapterId id : {kA, kB}) harness.OpenAndLoad(id, kTenBytes);
    for (const AdapterId id : {kC, kD}) harness.OpenAdapter(id, kTenBytes);
    AddLong(harness, 1, kA);
    AddLong(harness, 2, kB, 30);
    harness.Step();
  }
  static std::int64_t NumPauses(const SchedulerHarness& harness) {
    return harness.scheduler().Counters().total_adapter_pauses;
  }
};
INSTANTIATE_TEST_SUITE_P(All, SchedulerTimeSliceTest, testing::BothWays(), testing::WayName);

TEST_P(SchedulerTimeSliceTest, OneThatWaitsIsLetInBeforeLongRequestsEndAndNothingIsComputedTwice) {
  SchedulerHarness harness(Options(), GetParam());
  StartTwoLongOnes(harness);
  harness.Add(3, kC, MakePrompt(3, 3), 2);
  bool was_paused = false;
  for (int step = 0; step < 12 && !harness.request(3).is_finished; ++step) {
    harness.Step();
    const AdapterStats stats = harness.StatsOf(kA);
    was_paused |= stats.is_paused;
    EXPECT_EQ(stats.num_running_requests, 1) << "it keeps its row and pages";
    EXPECT_FALSE(harness.StatsOf(kB).is_paused) << "it will end sooner by itself";
  }
  EXPECT_TRUE(harness.request(3).is_finished) << "it waited for the whole of a long request";
  EXPECT_TRUE(was_paused);
  harness.RunToEnd();
  EXPECT_EQ(harness.request(1).num_steps, kLong);
  EXPECT_EQ(harness.StatsOf(kA).num_evictions, 1);
  EXPECT_EQ(harness.StatsOf(kA).num_loads, 2);
  EXPECT_EQ(harness.StatsOf(kB).num_evictions, 0);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTimeSliceTest, AfterASliceThoseThatWereLoadedRunThoughNobodyElseDidMeanwhile) {
  SchedulerHarness harness(Options(), GetParam());
  StartTwoLongOnes(harness);
  harness.Add(3, kC, MakePrompt(3, 3), 2);
  harness.Add(4, kD, MakePrompt(3, 4), 2);
  for (int step = 1; step <= 3; ++step) {
    EXPECT_EQ(harness.Step().request_ids.size(), 2U) << "step " << step << " after the first";
  }
  EXPECT_EQ(NumPauses(harness), 0);
  for (int step = 0; step < 12 && !harness.request(4).is_finished; ++step) harness.Step();
  EXPECT_TRUE(harness.request(4).is_finished);
  EXPECT_GE(NumPauses(harness), 1);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTimeSliceTest, TwoLongRequestsShareOnePlaceSliceBySlice) {
  SchedulerOptions options = Options();
  options.max_loras = 1;
  options.adapter_pause_us = 0;
  SchedulerHarness harness(options, GetParam());
  for (const AdapterId id : {kA, kB}) harness.OpenAndLoad(id, kTenBytes);
  AddLong(harness, 1, kA);
  AddLong(harness, 2, kB);
  std::int32_t num_in_a_row = 0;
  std::int64_t last = 0;
  for (int step = 0; harness.live_requests().size() == 2; ++step) {
    ASSERT_LT(step, 200);
    const RecordedPlan plan = harness.Step();
    if (plan.request_ids.empty()) continue;
    ASSERT_EQ(plan.request_ids.size(), 1U);
    num_in_a_row = plan.request_ids[0] == last ? num_in_a_row + 1 : 1;
    last = plan.request_ids[0];
    EXPECT_LE(num_in_a_row, 4 + 1) << "the other one waits for longer than a slice";
    const auto lead = harness.request(1).num_steps - harness.request(2).num_steps;
    EXPECT_LE(std::abs(lead), 4 + 1);
  }
  EXPECT_EQ(harness.StatsOf(kA).num_evictions, 0) << "there are bytes for both";
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTimeSliceTest, TwoPausedAdaptersBesideAPinnedOneDoNotEvictEachOtherForEver) {
  for (const bool pinned_is_busy : {false, true}) {
    SchedulerOptions options = Options();
    options.adapter_pause_us = 0;
    options.adapter_time_slice_steps = 1;
    SchedulerHarness harness(options, GetParam());
    harness.OpenAndLoad(kA, {.size_bytes = 10, .is_pinned = true});
    for (const AdapterId id : {kB, kC, kD}) harness.OpenAdapter(id, kTenBytes);
    if (pinned_is_busy) AddLong(harness, 4, kA);
    AddLong(harness, 1, kB);
    AddLong(harness, 2, kC);
    AddLong(harness, 3, kD);
    harness.RunToEnd(/*max_steps=*/6 * 3 * kLong);  // at worst a swap for each token
    EXPECT_GT(harness.StatsOf(kB).num_evictions + harness.StatsOf(kC).num_evictions, 2);
    for (const std::int64_t id : {1, 2, 3}) EXPECT_EQ(harness.request(id).num_steps, kLong);
    harness.RunToEndAndCheck();
  }
}

TEST_P(SchedulerTimeSliceTest, APausedAdapterNeedNotLeaveTheDeviceWhenOnlyPlacesAreShort) {
  SchedulerOptions options = Options();
  options.adapter_memory_bytes = 0;
  options.max_loras = 2;
  SchedulerHarness harness(options, GetParam());
  StartTwoLongOnes(harness);
  harness.Add(3, kC, MakePrompt(3, 3), 2);
  for (int step = 0; step < 12 && !harness.request(3).is_finished; ++step) harness.Step();
  EXPECT_TRUE(harness.request(3).is_finished);
  EXPECT_GE(NumPauses(harness), 1);
  harness.RunToEndAndCheck();
  EXPECT_EQ(harness.StatsOf(kA).num_evictions, 0);
  EXPECT_EQ(harness.request(1).num_steps, kLong);
}

TEST_P(SchedulerTimeSliceTest, NobodyIsPausedWhenNobodyWaits) {
  SchedulerHarness harness(Options(), GetParam());
  StartTwoLongOnes(harness);
  AddLong(harness, 3, kBaseAdapter);
  AddLong(harness, 4, kA);
  harness.RunToEndAndCheck();
  EXPECT_EQ(NumPauses(harness), 0);
  EXPECT_EQ(harness.request(1).num_steps, kLong);
}

TEST_P(SchedulerTimeSliceTest, NobodyIsPausedForAnAdapterThatIsPatient) {
  SchedulerOptions options = Options();
  options.adapter_patience_us = 1000;
  SchedulerHarness harness(options, GetParam());
  StartTwoLongOnes(harness);
  harness.Add(3, kC, MakePrompt(3, 3), 2);
  for (int step = 0; step < 8; ++step) harness.Step();
  EXPECT_EQ(NumPauses(harness), 0);
  harness.AdvanceClock(1000);
  for (int step = 0; step < 12 && !harness.request(3).is_finished; ++step) harness.Step();
  EXPECT_TRUE(harness.request(3).is_finished);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTimeSliceTest, APinnedAdapterIsNotPausedForBytes) {
  SchedulerHarness harness(Options(), GetParam());
  StartTwoLongOnes(harness);
  harness.SetAdapterPinned(kA, true);
  harness.Add(3, kC, MakePrompt(3, 3), 2);
  for (int step = 0; step < 12 && !harness.request(3).is_finished; ++step) {
    EXPECT_TRUE(harness.Step().HasRowOf(1));
  }
  EXPECT_TRUE(harness.request(3).is_finished) << "B was paused instead";
  harness.RunToEndAndCheck();
  EXPECT_EQ(harness.StatsOf(kB).num_evictions, 1);
}

TEST_P(SchedulerTimeSliceTest, ARequestOfAPausedAdapterMayBeAborted) {
  SchedulerHarness harness(Options(), GetParam());
  StartTwoLongOnes(harness);
  AddLong(harness, 3, kC, 30);
  while (!harness.StatsOf(kA).is_paused) harness.Step();
  harness.AdvanceAll();
  harness.Abort(1);
  EXPECT_EQ(harness.StatsOf(kA).num_running_requests, 0);
  EXPECT_FALSE(harness.StatsOf(kA).is_paused);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTimeSliceTest, AReloadThatFailsEndsThePausedRequestsOnly) {
  SchedulerHarness harness(Options(), GetParam());
  StartTwoLongOnes(harness);
  AddLong(harness, 3, kC, 30);
  while (!harness.StatsOf(kA).is_paused) harness.Step();
  harness.executor().load_outcome = [](AdapterId id) {
    return id == kA ? Outcome::kFailed : Outcome::kDone;
  };
  for (int step = 0; step < 80 && !harness.failed().contains(kA); ++step) harness.Step();
  ASSERT_TRUE(harness.failed().contains(kA));
  harness.Abort(1);
  harness.scheduler().DrainAdapter(kA);
  harness.RunToEndAndCheck();
  EXPECT_TRUE(harness.request(2).is_finished);
  EXPECT_TRUE(harness.request(3).is_finished);
}

TEST_P(SchedulerTimeSliceTest, APausedAdapterThatDrainsRunsItsRequestsToTheirEnd) {
  SchedulerHarness harness(Options(), GetParam());
  StartTwoLongOnes(harness);
  AddLong(harness, 3, kC, 30);
  while (!harness.StatsOf(kA).is_paused) harness.Step();
  harness.scheduler().DrainAdapter(kA);
  harness.RunToEndAndCheck();
  EXPECT_TRUE(harness.drained().contains(kA));
  EXPECT_TRUE(harness.request(1).is_finished);
}

}  // namespace
}  // namespace lora_serve
