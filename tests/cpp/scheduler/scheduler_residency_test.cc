// Which adapters are on the device: room, victims, pins, loads, closing, time slices.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/errors.h"
#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::Outcome;
using testing::Overlap;
using testing::RecordedPlan;
using testing::SchedulerHarness;

using Ids = std::vector<std::int64_t>;

constexpr AdapterId kA{1};
constexpr AdapterId kB{2};
constexpr AdapterId kC{3};
constexpr AdapterId kD{4};
constexpr AdapterId kE{5};

SchedulerOptions OptionsWithMemory(std::int64_t num_bytes) {
  return {.page_size = 4,
          .num_device_pages = 64,
          .max_num_seqs = 8,
          .max_num_batched_tokens = 64,
          .max_model_len = 64,
          .adapter_memory_bytes = num_bytes,
          .scheduling_policy = SchedulingPolicy::kFcfs};
}

constexpr AdapterOptions kTenBytes = {.size_bytes = 10};

class SchedulerResidencyTest : public ::testing::TestWithParam<Overlap> {
 protected:
  static void AddLong(SchedulerHarness& harness, std::int64_t id, AdapterId adapter,
                      std::int32_t num_tokens) {
    harness.Add(id, adapter,
                MakeLongRunningPrompt(adapter, 4, num_tokens, static_cast<TokenId>(id)),
                num_tokens);
  }
  /// A request that runs and ends.
  static void Use(SchedulerHarness& harness, std::int64_t id, AdapterId adapter) {
    harness.Add(id, adapter, MakePrompt(3, static_cast<TokenId>(id)), 1);
    harness.RunToEnd();
  }
  static RecordedPlan StepUntilEviction(SchedulerHarness& harness) {
    RecordedPlan plan;
    for (int step = 0; step < 40 && plan.evicted_adapter_ids.empty(); ++step) plan = harness.Step();
    return plan;
  }
};
INSTANTIATE_TEST_SUITE_P(All, SchedulerResidencyTest, testing::BothWays(), testing::WayName);

TEST_P(SchedulerResidencyTest, WhatFitsIsLoadedWhenItIsOpenedAndTheRestWhenItIsNeeded) {
  SchedulerHarness harness(OptionsWithMemory(20), GetParam());
  EXPECT_TRUE(harness.OpenAdapter(kA, kTenBytes));
  EXPECT_TRUE(harness.OpenAdapter(kB, kTenBytes));
  EXPECT_FALSE(harness.OpenAdapter(kC, kTenBytes));
  EXPECT_EQ(harness.Step().load_adapter_ids, (Ids{1, 2}));
  harness.AdvanceAll();
  EXPECT_EQ(harness.StatsOf(kC).state, AdapterState::kRegistered);
  EXPECT_FALSE(harness.scheduler().HasWork());
  EXPECT_EQ(harness.scheduler().Counters().num_adapter_bytes, 20);
  harness.Add(1, kC, MakePrompt(3), 2);
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.evicted_adapter_ids, Ids{1});
  EXPECT_EQ(plan.load_adapter_ids, Ids{3});
  harness.RunToEndAndCheck();
  EXPECT_EQ(harness.StatsOf(kA).num_evictions, 1);
  EXPECT_EQ(harness.StatsOf(kC).num_loads, 1);
}

TEST_P(SchedulerResidencyTest, TheLeastRecentlyUsedOfTheIdleIsTheVictim) {
  SchedulerHarness harness(OptionsWithMemory(30), GetParam());
  for (const AdapterId id : {kA, kB, kC}) harness.OpenAndLoad(id, kTenBytes);
  harness.OpenAdapter(kD, kTenBytes);
  Use(harness, 1, kB);
  Use(harness, 2, kA);
  Use(harness, 3, kC);
  Use(harness, 4, kA);
  harness.Add(5, kD, MakePrompt(3), 1);
  EXPECT_EQ(StepUntilEviction(harness).evicted_adapter_ids, Ids{2});
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerResidencyTest, AsManyGoAsTheRoomTakesAndNoMore) {
  SchedulerHarness harness(OptionsWithMemory(30), GetParam());
  for (const AdapterId id : {kA, kB, kC}) harness.OpenAndLoad(id, kTenBytes);
  harness.OpenAdapter(kD, {.size_bytes = 20});
  harness.Add(1, kD, MakePrompt(3), 1);
  EXPECT_EQ(StepUntilEviction(harness).evicted_adapter_ids, (Ids{1, 2}));
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerResidencyTest, WhoIsOpenedDoesNotTakeTheRoomThatComesTogetherForAnother) {
  SchedulerHarness harness(OptionsWithMemory(20), GetParam());
  harness.OpenAndLoad(kA, kTenBytes);
  AddLong(harness, 1, kA, 12);
  harness.Step();
  EXPECT_FALSE(harness.OpenAdapter(kB, {.size_bytes = 15}));
  harness.Add(2, kB, MakePrompt(3, 2), 2);
  harness.Step();
  EXPECT_FALSE(harness.OpenAdapter(kC, kTenBytes)) << "ten bytes are free, but B waits for more";
  harness.Add(3, kC, MakePrompt(3, 3), 2);
  while (!harness.request(2).is_finished) {
    harness.Step();
    EXPECT_EQ(harness.request(3).num_steps, 0);
  }
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerResidencyTest, WhoHasWaitingRequestsGoesAfterTheIdle) {
  SchedulerOptions options = OptionsWithMemory(30);
  options.max_loras = 1;
  SchedulerHarness harness(options, GetParam());
  for (const AdapterId id : {kA, kB, kC}) harness.OpenAndLoad(id, kTenBytes);
  harness.OpenAdapter(kD, kTenBytes);
  Use(harness, 100, kC);  // so that B is the least recently used
  AddLong(harness, 1, kA, 12);
  harness.Step();
  harness.Add(2, kB, MakePrompt(3, 2), 2);  // lacks the place
  harness.Add(3, kD, MakePrompt(3, 3), 2);
  EXPECT_EQ(StepUntilEviction(harness).evicted_adapter_ids, Ids{3});
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerResidencyTest, APinnedAdapterStaysAndIsLoadedWithoutRequests) {
  SchedulerHarness harness(OptionsWithMemory(20), GetParam());
  harness.OpenAndLoad(kA, kTenBytes);
  harness.OpenAndLoad(kB, kTenBytes);
  harness.SetAdapterPinned(kA, true);
  EXPECT_TRUE(harness.StatsOf(kA).is_pinned);
  harness.OpenAdapter(kC, kTenBytes);
  Use(harness, 1, kB);
  harness.Add(2, kC, MakePrompt(3), 1);
  EXPECT_EQ(StepUntilEviction(harness).evicted_adapter_ids, Ids{2}) << "A is older, but pinned";
  harness.RunToEnd();
  harness.SetAdapterPinned(kA, false);
  harness.SetAdapterPinned(kB, true);
  EXPECT_TRUE(harness.scheduler().HasWork()) << "a load is due";
  EXPECT_EQ(StepUntilEviction(harness).load_adapter_ids, Ids{2});
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerResidencyTest, PinningMoreThanFitsIsRefusedWithNumbers) {
  SchedulerHarness harness(OptionsWithMemory(25), GetParam());
  harness.OpenAndLoad(kA, kTenBytes);
  harness.OpenAdapter(kB, kTenBytes);
  harness.OpenAdapter(kC, {.size_bytes = 12});
  harness.SetAdapterPinned(kA, true);
  try {
    harness.SetAdapterPinned(kB, true);
    ADD_FAILURE() << "with A and B pinned, C could never run";
  } catch (const CapacityError& error) {
    const std::string message = error.what();
    for (const char* part : {"adapter 2", "10 bytes", "25 bytes", "12"}) {
      EXPECT_NE(message.find(part), std::string::npos) << message;
    }
  }
  EXPECT_FALSE(harness.StatsOf(kB).is_pinned);
  EXPECT_THROW(harness.OpenAdapter(kD, {.size_bytes = 16}), CapacityError) << "beside A";
  EXPECT_THROW(harness.OpenAdapter(kD, {.size_bytes = 5, .is_pinned = true}), CapacityError);
  harness.SetAdapterPinned(kA, false);
  harness.SetAdapterPinned(kB, true);
  harness.OpenAdapter(kD, {.size_bytes = 15});
  harness.RunToEndAndCheck();
  EXPECT_THROW(harness.scheduler().SetAdapterPinned(kBaseAdapter, true), AdapterNotFoundError);
  EXPECT_THROW(harness.scheduler().SetAdapterPinned(AdapterId(99), true), AdapterNotFoundError);
  EXPECT_THROW(harness.OpenAdapter(AdapterId(5), {.size_bytes = 26}), CapacityError);
}

TEST_P(SchedulerResidencyTest, LoadsStartInTheOrderOfTheQueueAndAFewAtOnce) {
  SchedulerOptions options = OptionsWithMemory(40);
  options.max_loading_adapters = 2;
  SchedulerHarness harness(options, GetParam());
  harness.OpenAndLoad(kA, {.size_bytes = 40});
  for (const AdapterId id : {kB, kC, kD, kE}) EXPECT_FALSE(harness.OpenAdapter(id, kTenBytes));
  harness.executor().load_outcome = [](AdapterId) { return Outcome::kUnderWay; };
  for (const AdapterId id : {kD, kB, kE, kC}) {
    harness.Add(id.value(), id, MakePrompt(3, static_cast<TokenId>(id.value())), 2);
  }
  EXPECT_EQ(harness.Step().load_adapter_ids, (Ids{4, 2}));
  for (int step = 0; step < 5; ++step) EXPECT_TRUE(harness.Step().load_adapter_ids.empty());
  EXPECT_EQ(harness.scheduler().Counters().num_loading_adapters, 2);
  EXPECT_EQ(harness.scheduler().Counters().num_adapters_in_line, 2);
  harness.executor().load_outcome = nullptr;
  harness.Step();
  harness.AdvanceAll();
  EXPECT_EQ(harness.Step().load_adapter_ids, (Ids{5, 3}));
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerResidencyTest, ALoadStartsAlthoughNoRowIsFree) {
  SchedulerOptions options = OptionsWithMemory(20);
  options.max_num_seqs = 1;
  SchedulerHarness harness(options, GetParam());
  harness.OpenAndLoad(kA, kTenBytes);
  AddLong(harness, 1, kA, 10);
  harness.Step();
  harness.OpenAndLoad(kB, kTenBytes);
  harness.OpenAdapter(kC, kTenBytes);
  harness.Add(2, kC, MakePrompt(3), 2);
  const RecordedPlan plan = StepUntilEviction(harness);
  EXPECT_EQ(plan.evicted_adapter_ids, Ids{2});
  EXPECT_EQ(plan.load_adapter_ids, Ids{3});
  EXPECT_FALSE(harness.request(1).is_finished) << "it is brought in ahead of need";
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerResidencyTest, AFailedLoadStopsOnlyItsOwnRequestsAndItsBytesAreFree) {
  SchedulerHarness harness(OptionsWithMemory(10), GetParam());
  harness.executor().load_outcome = [](AdapterId id) {
    return id == kA ? Outcome::kFailed : Outcome::kDone;
  };
  harness.OpenAdapter(kA, kTenBytes);
  harness.OpenAdapter(kB, kTenBytes);
  harness.Add(1, kA, MakePrompt(3, 1), 2);
  harness.Add(2, kB, MakePrompt(3, 2), 2);
  for (int step = 0; step < 12 && !harness.request(2).is_finished; ++step) harness.Step();
  EXPECT_TRUE(harness.request(2).is_finished);
  EXPECT_TRUE(harness.StatsOf(kA).load_failed);
  EXPECT_EQ(harness.request(1).num_steps, 0);
  EXPECT_THROW(harness.Add(3, kA, MakePrompt(3), 2), AdapterNotFoundError);
  harness.Abort(1);
  harness.scheduler().DrainAdapter(kA);
  harness.RunToEndAndCheck();
  EXPECT_TRUE(harness.drained().contains(kA));
}

TEST_P(SchedulerResidencyTest, AnEvictedAdapterKeepsItsCachedPrefixes) {
  SchedulerHarness harness(OptionsWithMemory(10), GetParam());
  harness.OpenAndLoad(kA, kTenBytes);
  harness.OpenAdapter(kB, kTenBytes);
  harness.Add(1, kA, MakePrompt(13), 1);
  harness.RunToEnd();
  harness.Add(2, kB, MakePrompt(13), 1);
  harness.RunToEnd();
  EXPECT_EQ(harness.request(2).num_cached_tokens, 0) << "the same tokens of another adapter";
  harness.Add(3, kA, MakePrompt(13), 1);
  harness.RunToEndAndCheck();
  EXPECT_EQ(harness.request(3).num_cached_tokens, 12);
  EXPECT_EQ(harness.num_reloads(), 1);
}

TEST_P(SchedulerResidencyTest, TheRowsOfThePlanThatLoadsAStagedAdapterUseIt) {
  SchedulerHarness harness(OptionsWithMemory(20), GetParam());
  harness.OpenAdapter(kA, {.size_bytes = 10, .is_staged = true});
  harness.OpenAdapter(kB, kTenBytes);
  harness.Add(1, kA, MakePrompt(3, 1), 2);
  harness.Add(2, kB, MakePrompt(3, 2), 2);
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.load_adapter_ids, (Ids{1, 2}));
  EXPECT_EQ(plan.request_ids, Ids{1}) << "B's load must be reported first";
  harness.RunToEndAndCheck();
  harness.OpenAdapter(kC, kTenBytes);
  harness.SetAdapterStaged(kC, true);
  harness.Add(3, kC, MakePrompt(3, 3), 2);
  EXPECT_EQ(harness.Step().request_ids, Ids{3});
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerResidencyTest, RequestsOfAStagedAdapterThatFailsEndAndOthersGoOn) {
  SchedulerHarness harness(OptionsWithMemory(20), GetParam());
  harness.executor().load_outcome = [](AdapterId id) {
    return id == kA ? Outcome::kFailed : Outcome::kDone;
  };
  harness.OpenAdapter(kA, {.size_bytes = 10, .is_staged = true});
  harness.Add(1, kA, MakePrompt(3, 1), 5);
  AddLong(harness, 2, kBaseAdapter, 5);
  EXPECT_EQ(harness.Step().request_ids.size(), 2U);
  harness.Step();
  harness.AdvanceAll();
  EXPECT_TRUE(harness.request(1).is_aborted);
  EXPECT_TRUE(harness.StatsOf(kA).load_failed);
  harness.scheduler().DrainAdapter(kA);
  harness.RunToEndAndCheck();
}

// --- Closing ------------------------------------------------------------------------------------

class SchedulerClosingTest : public SchedulerResidencyTest {
 protected:
  /// One place, which A holds with a request of `num_tokens`; B waits from the step after that on.
  /// C is on the device, too, and nobody wants it.
  static void StartWithOneWaiting(SchedulerHarness& harness, std::int32_t num_tokens) {
    for (const AdapterId id : {kA, kB, kC}) harness.OpenAndLoad(id, kTenBytes);
    AddLong(harness, 1, kA, num_tokens);
    harness.Step();
    harness.Add(2, kB, MakePrompt(3, 2), 2);
  }
  static SchedulerOptions OnePlace() {
    SchedulerOptions options = OptionsWithMemory(0);
    options.max_loras = 1;
    return options;
  }
};
INSTANTIATE_TEST_SUITE_P(All, SchedulerClosingTest, testing::BothWays(), testing::WayName);

TEST_P(SchedulerClosingTest, AClosedAdapterTakesNoNewcomersUntilTheOneThatWaitsGotIn) {
  SchedulerHarness harness(OnePlace(), GetParam());
  StartWithOneWaiting(harness, 10);
  harness.Step();
  EXPECT_TRUE(harness.StatsOf(kA).is_closed);
  EXPECT_FALSE(harness.StatsOf(kB).is_closed);
  harness.Add(3, kA, MakePrompt(3, 3), 2);
  while (harness.request(2).num_steps == 0) {
    harness.Step();
    EXPECT_EQ(harness.request(3).num_steps, 0) << "a newcomer of a closed adapter";
  }
  EXPECT_TRUE(harness.request(1).is_finished);
  harness.RunToEnd();
  EXPECT_GT(harness.request(3).first_step, harness.request(2).first_step);
  EXPECT_GT(harness.scheduler().Counters().total_closings, 0);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerClosingTest, NobodyIsClosedWhileTheOneThatWaitsIsPatient) {
  SchedulerOptions options = OnePlace();
  options.adapter_patience_us = 1000;
  SchedulerHarness harness(options, GetParam());
  StartWithOneWaiting(harness, 20);
  harness.Step();
  EXPECT_FALSE(harness.StatsOf(kA).is_closed);
  harness.Add(3, kA, MakePrompt(3, 3), 2);
  harness.Step();
  EXPECT_GT(harness.request(3).num_steps, 0);
  harness.AdvanceClock(1000);
  harness.Step();
  EXPECT_TRUE(harness.StatsOf(kA).is_closed);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerClosingTest, TheAdapterWithTheLeastRemainingWorkIsClosed) {
  SchedulerOptions options = OptionsWithMemory(0);
  options.max_loras = 2;
  SchedulerHarness harness(options, GetParam());
  for (const AdapterId id : {kA, kB, kC}) harness.OpenAndLoad(id, kTenBytes);
  AddLong(harness, 1, kA, 12);
  AddLong(harness, 2, kB, 6);
  harness.Step();
  harness.Add(3, kC, MakePrompt(3), 2);
  harness.Step();
  EXPECT_FALSE(harness.StatsOf(kA).is_closed);
  EXPECT_TRUE(harness.StatsOf(kB).is_closed);
  harness.RunToEndAndCheck();
  EXPECT_GT(harness.request(3).first_step, 0);
}

TEST_P(SchedulerClosingTest, ATurnIsWhatWaitedAtItsBeginningAndFitsTheRows) {
  SchedulerOptions options = OnePlace();
  options.max_num_seqs = 4;
  SchedulerHarness harness(options, GetParam());
  for (const AdapterId id : {kA, kB}) harness.OpenAndLoad(id, kTenBytes);
  for (std::int64_t id = 1; id <= 6; ++id) AddLong(harness, id, kA, 4);
  harness.Add(10, kB, MakePrompt(3), 2);
  while (harness.request(10).num_steps == 0) harness.Step();
  std::int64_t num_started = 0;
  for (std::int64_t id = 1; id <= 6; ++id) num_started += harness.request(id).num_steps > 0;
  EXPECT_EQ(num_started, 4) << "four rows, one place";
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerClosingTest, OfThoseThatWaitTheBetterPriorityGetsInFirst) {
  SchedulerHarness harness(OnePlace(), GetParam());
  StartWithOneWaiting(harness, 10);
  harness.Step();
  harness.Add({.request_id = RequestId(3),
               .adapter_id = kC,
               .prompt_token_ids = MakePrompt(3, 3),
               .max_tokens = 2,
               .priority = -1});
  harness.RunToEndAndCheck();
  EXPECT_LT(harness.request(3).first_step, harness.request(2).first_step);
}

}  // namespace
}  // namespace lora_serve
