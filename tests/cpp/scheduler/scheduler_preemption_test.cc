// Preemption by recompute, and the return of the preempted.
#include <gtest/gtest.h>

#include <vector>

#include "support/scheduler_harness.h"

namespace lora_serve {
namespace {

using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::RecordedPlan;
using testing::SchedulerHarness;

using Ints = std::vector<std::int32_t>;
using Ids = std::vector<std::int64_t>;

class SchedulerPreemptionTest : public ::testing::TestWithParam<std::int64_t> {
 protected:
  AdapterId adapter() const { return AdapterId(GetParam()); }

  std::vector<TokenId> LongRunningPrompt(std::int32_t num_prompt_tokens,
                                         std::int32_t num_output_tokens, TokenId seed) const {
    return MakeLongRunningPrompt(adapter(), num_prompt_tokens, num_output_tokens, seed);
  }

  /// Two requests of 8 + 12 tokens in 8 pages of 4: each alone needs 5 in the end.
  void AddTwoThatDoNotFitTogether(SchedulerHarness& harness, bool reuse_prefix = true) {
    harness.OpenAndLoad(adapter());
    harness.Add(1, adapter(), LongRunningPrompt(8, 12, 1), 12, reuse_prefix);
    harness.Add(2, adapter(), LongRunningPrompt(8, 12, 2), 12, reuse_prefix);
  }

  static constexpr SchedulerOptions kSmallPool = {
      .page_size = 4, .num_device_pages = 8, .max_num_batched_tokens = 128, .max_model_len = 32};
};
INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, SchedulerPreemptionTest, ::testing::Values(0, 1));

TEST_P(SchedulerPreemptionTest, TheNewestRunningRequestGivesWayAndRecoversItsOwnPages) {
  SchedulerHarness harness(kSmallPool);
  AddTwoThatDoNotFitTogether(harness);
  while (harness.scheduler().Stats().total_preemptions == 0) harness.Step();
  // Request 1 needed the fifth page for its 17th token.
  EXPECT_EQ(harness.scheduler().Stats().num_preempted_requests, 1);
  EXPECT_EQ(harness.scheduler().Stats().num_waiting_requests, 1);
  EXPECT_FALSE(harness.request(1).is_finished);
  EXPECT_EQ(harness.StatsOf(adapter()).num_waiting_requests, 1);
  EXPECT_EQ(harness.request(2).output.size(), 9U);
  while (!harness.request(1).is_finished) harness.Step();
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.request_ids, Ids{2});
  EXPECT_GE(plan.num_computed_tokens.at(0), 12) << "its published pages were still in the tree";
  EXPECT_EQ(plan.num_computed_tokens.at(0) + plan.num_scheduled_tokens.at(0), 17);
  EXPECT_EQ(plan.delta_starts, Ints{0}) << "a new row is told from its first entry";
  EXPECT_EQ(plan.num_cached_tokens, Ints{0}) << "a recovery is not reported as usage of the cache";
  harness.RunToEndAndCheck();
  EXPECT_EQ(harness.scheduler().Stats().total_preemptions, 1) << "no ping-pong";
  EXPECT_EQ(harness.scheduler().Stats().total_hit_tokens, 0);
}

TEST_P(SchedulerPreemptionTest, WithoutReuseAPreemptedRequestRecoversItsOwnPages) {
  for (const bool enable_prefix_caching : {false, true}) {
    SchedulerOptions options = kSmallPool;
    options.enable_prefix_caching = enable_prefix_caching;
    SchedulerHarness harness(options);
    AddTwoThatDoNotFitTogether(harness, /*reuse_prefix=*/!enable_prefix_caching);
    while (!harness.request(1).is_finished) harness.Step();
    ASSERT_EQ(harness.scheduler().Stats().total_preemptions, 1);
    const RecordedPlan plan = harness.Step();
    EXPECT_GE(plan.num_computed_tokens.at(0), 12);
    EXPECT_EQ(plan.num_cached_tokens, Ints{0});
    harness.RunToEnd();
    harness.ExpectRightOutputs();
  }
}

TEST_P(SchedulerPreemptionTest, ANewerRequestThatNeedsAPageGivesWayItself) {
  SchedulerHarness harness(kSmallPool);
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), LongRunningPrompt(13, 12, 1), 12);
  harness.Add(2, adapter(), LongRunningPrompt(16, 12, 2),
              12);  // its first decode needs a ninth page
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2}));
  EXPECT_EQ(harness.Step().request_ids, Ids{1});
  EXPECT_EQ(harness.scheduler().Stats().total_preemptions, 1);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerPreemptionTest, TheVictimIsTheNewestArrivalAndNotTheNewestAdmission) {
  // Request 1 arrives first, but its adapter is loaded only after request 2 was admitted.
  const AdapterId late(7);
  SchedulerHarness harness(kSmallPool);
  harness.OpenAndLoad(adapter());
  harness.OpenAdapter(late, {});
  harness.Add(1, late, MakeLongRunningPrompt(late, 13, 4, 1), 4);
  harness.Add(2, adapter(), LongRunningPrompt(15, 12, 2), 12);
  EXPECT_EQ(harness.Step().request_ids, Ids{2});
  EXPECT_EQ(harness.Step().request_ids, (Ids{2, 1}));
  // Now 4 + 4 pages are taken, and request 2, first in the order of admission, needs a page.
  EXPECT_EQ(harness.Step().request_ids, Ids{1});
  EXPECT_EQ(harness.scheduler().Stats().num_preempted_requests, 1);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerPreemptionTest, AStepThatPreemptsAdmitsNobodyAndThePreemptedReturnBeforeTheQueue) {
  SchedulerHarness harness(kSmallPool);
  AddTwoThatDoNotFitTogether(harness);
  while (harness.request(1).output.size() < 9) harness.Step();
  ASSERT_EQ(harness.scheduler().Stats().total_preemptions, 0);
  harness.Add(3, kBaseAdapter, MakePrompt(4, 3), 1);
  const RecordedPlan preempting = harness.Step();
  EXPECT_EQ(preempting.request_ids, Ids{1});
  EXPECT_EQ(harness.scheduler().Stats().num_preempted_requests, 1);
  harness.Add(4, adapter(), MakePrompt(17, 4), 1);  // as large as 2, and newer
  while (!harness.request(1).is_finished) harness.Step();
  const RecordedPlan plan = harness.Step();
  ASSERT_FALSE(plan.request_ids.empty());
  EXPECT_EQ(plan.request_ids[0], 2)
      << "the preempted request returns before newer work of its size";
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerPreemptionTest, APreemptedRequestKeepsItsAdaptersPlace) {
  SchedulerOptions options = kSmallPool;
  options.max_loras = 1;
  SchedulerHarness harness(options);
  const AdapterId mine(1);
  const AdapterId other(2);
  for (const AdapterId id : {mine, other}) harness.OpenAndLoad(id);
  // The base's request is older and grows, the adapter's gives way.
  harness.Add(1, kBaseAdapter, MakeLongRunningPrompt(kBaseAdapter, 12, 12, 1), 12);
  harness.Add(2, mine, MakeLongRunningPrompt(mine, 15, 12, 2), 12);
  while (harness.scheduler().Stats().num_preempted_requests == 0) harness.Step();
  harness.Add(3, other, MakePrompt(4, 3), 12);
  while (!harness.request(2).is_finished) {
    const RecordedPlan plan = harness.Step();
    EXPECT_EQ(std::count(plan.request_ids.begin(), plan.request_ids.end(), 3), 0)
        << "another adapter took the place of the preempted one";
  }
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerPreemptionTest, APlanIsNeverEmptyBecauseTheLastRunningRequestLostItsPages) {
  // Request 2 computes what request 1 has cached: its pages have twins in the tree, which are
  // pinned with it, and in the end the pool has no page left for it although it runs alone.
  SchedulerHarness harness({.page_size = 4, .num_device_pages = 8, .max_model_len = 32});
  harness.OpenAndLoad(adapter());
  const std::vector<TokenId> prompt = LongRunningPrompt(16, 8, 1);
  harness.Add(1, adapter(), prompt, 1);
  harness.RunToEnd();
  harness.Add(2, adapter(), prompt, 8, /*reuse_prefix=*/false);
  while (harness.scheduler().HasWork()) EXPECT_FALSE(harness.Step().IsEmpty());
  EXPECT_GE(harness.scheduler().Stats().total_preemptions, 1);
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerPreemptionTest, APreemptedRequestOfADrainingAdapterEndsWithItsTokens) {
  SchedulerHarness harness(kSmallPool);
  AddTwoThatDoNotFitTogether(harness);
  while (harness.scheduler().Stats().num_preempted_requests == 0) harness.Step();
  if (adapter() != kBaseAdapter) {
    harness.scheduler().DrainAdapter(adapter());
    EXPECT_EQ(harness.StatsOf(adapter()).state, AdapterState::kDraining);
  }
  harness.RunToEndAndCheck();
  EXPECT_EQ(harness.drained().contains(adapter()), adapter() != kBaseAdapter);
}

}  // namespace
}  // namespace lora_serve
