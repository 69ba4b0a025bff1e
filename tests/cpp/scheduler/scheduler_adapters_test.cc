// The cap on distinct adapters, loads, failures and drains, as the façade shows them.
#include <gtest/gtest.h>

#include <vector>

#include "common/errors.h"
#include "support/scheduler_harness.h"

namespace lora_serve {
namespace {

using testing::MakePrompt;
using testing::Outcome;
using testing::RecordedPlan;
using testing::SchedulerHarness;

using Ints = std::vector<std::int32_t>;
using Ids = std::vector<std::int64_t>;

constexpr AdapterId kA{1};
constexpr AdapterId kB{2};
constexpr AdapterId kC{3};

SchedulerOptions OptionsWithMaxLoras(std::int32_t max_loras) {
  return {.page_size = 4,
          .num_device_pages = 32,
          .max_num_seqs = 8,
          .max_num_batched_tokens = 16,
          .max_model_len = 64,
          .max_loras = max_loras,
          .scheduling_policy = SchedulingPolicy::kFcfs};
}

TEST(SchedulerAdapterCapTest, ARequestOverTheCapBlocksNobodyBehindIt) {
  SchedulerHarness harness(OptionsWithMaxLoras(1));
  for (const AdapterId id : {kA, kB}) harness.OpenAndLoad(id);
  harness.Add(1, kA, MakePrompt(2, 1), 8);
  harness.Add(2, kB, MakePrompt(2, 2), 8);
  harness.Add(3, kBaseAdapter, MakePrompt(2, 3), 8);
  harness.Add(4, kA, MakePrompt(2, 4), 8);
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 3, 4}));
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST(SchedulerAdapterCapTest, ARequestThatCouldNotBeScheduledIsNotCharged) {
  SchedulerOptions options = OptionsWithMaxLoras(1);
  options.num_device_pages = 16;
  SchedulerHarness harness(options);
  for (const AdapterId id : {kA, kB}) harness.OpenAndLoad(id);
  harness.Add(1, kBaseAdapter, MakePrompt(15, 1), 4);
  harness.Step();
  harness.Add(2, kA, MakePrompt(60, 2), 2);  // 15 pages, 12 are left
  harness.Add(3, kB, MakePrompt(4, 3), 2);
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 3})) << "A was charged although it could not run";
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST(SchedulerAdapterCapTest, AChunkedPrefillInFlightIsCounted) {
  SchedulerHarness harness(OptionsWithMaxLoras(1));
  for (const AdapterId id : {kA, kB}) harness.OpenAndLoad(id);
  harness.Add(1, kA, MakePrompt(40, 1), 1);  // 16 + 16 + 8 tokens
  harness.Add(2, kB, MakePrompt(2, 2), 1);
  EXPECT_EQ(harness.Step().request_ids, Ids{1});
  EXPECT_EQ(harness.Step().request_ids, Ids{1});
  EXPECT_EQ(harness.Step().request_ids, Ids{1}) << "B entered beside A's last chunk";
  EXPECT_EQ(harness.Step().request_ids, Ids{2});
  harness.ExpectRightOutputs();
}

TEST(SchedulerAdapterCapTest, AllAdaptersUpToTheCapRunInOneStep) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  for (const AdapterId id : {kA, kB, kC}) harness.OpenAndLoad(id);
  for (std::int64_t id = 1; id <= 3; ++id) harness.Add(id, AdapterId(id), MakePrompt(3), 4);
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.request_ids, (Ids{1, 2}));
  EXPECT_EQ(plan.adapter_slots, (Ints{0, 1}));
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST(SchedulerAdapterLoadTest, APlanOfOnlyALoadOwesAnAdvanceAndRequestsWaitForIt) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  Scheduler& scheduler = harness.scheduler();
  EXPECT_FALSE(scheduler.HasWork());
  harness.OpenAdapter(kA, {.digest_seed = 5, .size_bytes = 100});
  EXPECT_TRUE(scheduler.HasWork());
  EXPECT_EQ(harness.StatsOf(kA).adapter_slot, kNoAdapterSlot);
  harness.Add(1, kA, MakePrompt(3), 2);
  const RecordedPlan plan = harness.Step([&] {
    EXPECT_EQ(harness.StatsOf(kA).state, AdapterState::kLoading);
    EXPECT_TRUE(scheduler.NextPlan(harness.now_us()).IsEmpty()) << "its load is under way";
  });
  EXPECT_FALSE(plan.IsEmpty());
  EXPECT_FALSE(plan.HasRows());
  EXPECT_EQ(plan.load_adapter_ids, Ids{1});
  EXPECT_EQ(plan.load_adapter_slots, Ints{0});
  EXPECT_EQ(harness.StatsOf(kA).state, AdapterState::kResident);
  EXPECT_EQ(harness.Step().request_ids, Ids{1});
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST(SchedulerAdapterLoadTest, AFailedLoadStopsOnlyItsOwnRequestsUntilTheCallerEndsThem) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  harness.executor().load_outcome = [](AdapterId id) {
    return id == kA ? Outcome::kFailed : Outcome::kDone;
  };
  for (const AdapterId id : {kA, kB}) harness.OpenAdapter(id, {});
  harness.Add(1, kA, MakePrompt(3), 2);
  harness.Add(2, kB, MakePrompt(3), 2);
  harness.Step();
  EXPECT_TRUE(harness.StatsOf(kA).load_failed);
  EXPECT_EQ(harness.StatsOf(kA).state, AdapterState::kRegistered);
  EXPECT_THROW(harness.Add(3, kA, MakePrompt(3), 2), AdapterNotFoundError);
  while (!harness.request(2).is_finished) EXPECT_EQ(harness.Step().request_ids, Ids{2});
  EXPECT_TRUE(harness.Step().IsEmpty()) << "a failed adapter is never retried or scheduled";
  EXPECT_TRUE(harness.scheduler().HasWork()) << "its request still waits";
  harness.Abort(1);
  harness.scheduler().DrainAdapter(kA);
  EXPECT_EQ(harness.Step().drained_adapter_ids, Ids{1});
  EXPECT_FALSE(harness.scheduler().HasWork());
  harness.ExpectRightOutputs();
  harness.ExpectNothingLeft();
}

TEST(SchedulerDrainTest, RunningAndQueuedRequestsEndAndThenOnePlanReportsTheDrain) {
  SchedulerOptions options = OptionsWithMaxLoras(2);
  options.max_num_seqs = 1;
  SchedulerHarness harness(options);
  harness.OpenAndLoad(kA);
  harness.Add(1, kA, MakePrompt(9, 1), 3);
  harness.Add(2, kA, MakePrompt(9, 2), 3);
  harness.Step();
  harness.scheduler().DrainAdapter(kA);
  harness.scheduler().DrainAdapter(kA);
  EXPECT_EQ(harness.StatsOf(kA).state, AdapterState::kDraining);
  EXPECT_THROW(harness.Add(3, kA, MakePrompt(9), 3), AdapterNotFoundError);
  EXPECT_THROW(harness.OpenAdapter(kA, {}), InvalidArgumentError);
  while (!harness.request(2).is_finished) EXPECT_TRUE(harness.Step().drained_adapter_ids.empty());
  EXPECT_EQ(harness.scheduler().Stats().num_free_pages, 32) << "a draining namespace keeps no page";
  EXPECT_TRUE(harness.scheduler().HasWork());
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.drained_adapter_ids, Ids{1});
  EXPECT_FALSE(plan.IsEmpty());
  EXPECT_FALSE(harness.scheduler().HasWork());
  EXPECT_THROW(harness.scheduler().DrainAdapter(kA), AdapterNotFoundError);
  EXPECT_EQ(harness.scheduler().Stats().adapters.size(), 1U);
  harness.ExpectRightOutputs();
}

TEST(SchedulerDrainTest, CachedPagesOfADrainedAdapterAreFreeAtOnce) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  harness.OpenAndLoad(kA);
  harness.Add(1, kA, MakePrompt(9), 1);
  harness.Add(2, kBaseAdapter, MakePrompt(9), 1);
  harness.RunToEnd();
  EXPECT_EQ(harness.StatsOf(kA).num_tree_pages, 2);
  harness.scheduler().DrainAdapter(kA);
  EXPECT_EQ(harness.scheduler().Stats().num_tree_pages, 2) << "only the base's are left";
  EXPECT_EQ(harness.Step().drained_adapter_ids, Ids{1});
}

TEST(SchedulerDrainTest, AnAdapterThatWasNeverLoadedIsReportedAndNotLoaded) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  harness.OpenAdapter(kA, {});
  harness.scheduler().DrainAdapter(kA);
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.drained_adapter_ids, Ids{1});
  EXPECT_TRUE(plan.load_adapter_ids.empty());
  EXPECT_FALSE(harness.scheduler().HasWork());
}

TEST(SchedulerDrainTest, ARegisteredAdapterWithAQueuedRequestIsLoadedAndRunsBeforeItsDrain) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  harness.OpenAdapter(kA, {});
  harness.Add(1, kA, MakePrompt(9), 2);
  harness.scheduler().DrainAdapter(kA);
  EXPECT_EQ(harness.Step().load_adapter_ids, Ids{1});
  harness.RunToEnd();
  EXPECT_TRUE(harness.drained().contains(kA));
  harness.ExpectRightOutputs();
}

TEST(SchedulerDrainTest, ADrainDuringTheLoadWaitsForTheLoad) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  harness.OpenAdapter(kA, {});
  const RecordedPlan loading = harness.Step([&] { harness.scheduler().DrainAdapter(kA); });
  EXPECT_EQ(loading.load_adapter_ids, Ids{1});
  EXPECT_TRUE(loading.drained_adapter_ids.empty());
  EXPECT_EQ(harness.Step().drained_adapter_ids, Ids{1});
  EXPECT_EQ(harness.executor().num_loaded_adapters(), 0U);
}

TEST(SchedulerDrainTest, ASlotIsReusedOnlyAfterThePlanThatReportedTheDrain) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  harness.OpenAndLoad(kA);
  harness.scheduler().DrainAdapter(kA);
  harness.OpenAdapter(kB, {});
  RecordedPlan plan = harness.Step([&] { harness.OpenAdapter(kC, {}); });
  EXPECT_EQ(plan.drained_adapter_ids, Ids{1});
  EXPECT_EQ(plan.load_adapter_slots, Ints{1}) << "A's slot may still be read by this plan";
  plan = harness.Step();
  EXPECT_EQ(plan.load_adapter_ids, Ids{3});
  EXPECT_EQ(plan.load_adapter_slots, Ints{0});
}

TEST(SchedulerDrainTest, ARequestThatEndsAfterTheDrainBeganPublishesNothing) {
  SchedulerHarness harness(OptionsWithMaxLoras(2));
  harness.OpenAndLoad(kA);
  harness.Add(1, kA, MakePrompt(15), 4);
  harness.Step();
  harness.Step([&] { harness.scheduler().DrainAdapter(kA); });
  while (!harness.request(1).is_finished) harness.Step();
  EXPECT_EQ(harness.scheduler().Stats().num_tree_pages, 0);
  harness.RunToEnd();
  harness.OpenAdapter(kB, {});
  harness.Add(2, kB, MakePrompt(15), 4);
  harness.RunToEnd();
  EXPECT_EQ(harness.request(2).num_cached_tokens, 0);
  harness.ExpectRightOutputs();
}

}  // namespace
}  // namespace lora_serve
