// PITFALLS 57: what an outstanding plan touches is not given to others before that plan returns,
// also not what ends while a later plan has a row of it.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "common/errors.h"
#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::AllScenarios;
using testing::MakePrompt;
using testing::MakeStoppingPrompt;
using testing::Outcome;
using testing::RecordedPlan;
using testing::ScenarioName;
using testing::SchedulerHarness;

using Ids = std::vector<std::int64_t>;
using Ints = std::vector<std::int32_t>;

class PitfallsOverlapTest : public testing::SchedulerScenarioTest {
 protected:
  static constexpr SchedulerOptions kTiers = {.page_size = 4,
                                              .num_device_pages = 8,
                                              .max_num_seqs = 4,
                                              .max_num_batched_tokens = 128,
                                              .max_model_len = 32,
                                              .num_host_pages = 64};

  static SchedulerOptions DeviceOnly() {
    SchedulerOptions options = kTiers;
    options.num_host_pages = 0;
    return options;
  }
  /// Three pages and a token.
  static std::vector<TokenId> HostPrompt() { return MakePrompt(13, 1); }

  /// HostPrompt() is on the host, and nothing of it on the device.
  static void PutOnHost(SchedulerHarness& harness) {
    harness.OpenAndLoad(adapter());
    harness.Add(101, adapter(), HostPrompt(), 1);
    for (std::int64_t id = 102; id <= 103; ++id) {
      harness.RunToEnd();
      harness.Step();  // writes through
      harness.AdvanceAll();
      harness.Add(id, kBaseAdapter, MakePrompt(31, static_cast<TokenId>(id)), 1);
    }
    harness.RunToEnd();
    harness.Step();
    harness.AdvanceAll();
    ASSERT_EQ(harness.scheduler().Stats().num_transfers, 0);
  }

  /// A request of 20 prompt tokens (five pages, with six to come) that a stop token ends after
  /// `num_output_tokens`, although it may have 12.
  static void AddStopping(SchedulerHarness& harness, std::int64_t id,
                          std::int32_t num_output_tokens) {
    harness.Add(id, adapter(),
                MakeStoppingPrompt(adapter(), 20, num_output_tokens, static_cast<TokenId>(id)), 12,
                /*reuse_prefix=*/false);
  }
};
INSTANTIATE_TEST_SUITE_P(All, PitfallsOverlapTest, AllScenarios(), ScenarioName);

TEST_P(PitfallsOverlapTest, PagesOfARequestThatEndedAreNoTargetOfALoadWhileALaterPlanWritesThem) {
  SchedulerHarness harness(kTiers, overlap());
  PutOnHost(harness);
  AddStopping(harness, 1, 3);
  harness.Step();
  harness.Add(2, adapter(), HostPrompt(), 3);  // four pages, three of them loaded
  RecordedPlan plan;
  for (int step = 0; !harness.request(1).is_finished; ++step) {
    ASSERT_LT(step, 5);
    plan = harness.Step();
    EXPECT_EQ(plan.request_ids, Ids{1});
  }
  EXPECT_EQ(harness.num_outstanding(), IsOverlapped() ? 1U : 0U);
  const RecordedPlan next = harness.Step();
  if (IsOverlapped()) {
    EXPECT_EQ(plan.request_ids, Ids{1}) << "the late row";
    EXPECT_TRUE(std::ranges::count(next.transfer_kinds, 1) == 0) << "four pages are not free yet";
    EXPECT_EQ(harness.num_late_finishes(), 1);
    while (harness.num_load_backs() == 0) harness.Step();
  } else {
    EXPECT_EQ(harness.num_load_backs(), 1);
  }
  harness.RunToEnd();
  EXPECT_EQ(harness.request(2).num_cached_tokens, 12);
  harness.ExpectRightOutputs();
  harness.ExpectNothingLeft();
}

TEST_P(PitfallsOverlapTest, PagesAndRowOfARequestThatEndedStayUntilTheLastPlanWithARowOfIt) {
  SchedulerOptions options = DeviceOnly();
  options.max_num_seqs = 1;
  SchedulerHarness harness(options, overlap());
  harness.OpenAndLoad(adapter());
  AddStopping(harness, 1, 2);
  harness.Add(2, adapter(), MakePrompt(5, 2), 2);
  while (!harness.request(1).is_finished) harness.Step();
  const SchedulerStats stats = harness.scheduler().Stats();
  EXPECT_EQ(stats.num_running_requests, IsOverlapped() ? 1 : 0);
  EXPECT_EQ(stats.num_private_pages, IsOverlapped() ? 1 : 0) << "the page of its last tokens";
  EXPECT_EQ(harness.StatsOf(adapter()).num_running_requests, IsOverlapped() ? 1 : 0);
  if (IsOverlapped()) {
    EXPECT_THROW(harness.Add(1, adapter(), MakePrompt(2), 1), InvalidArgumentError)
        << "the id is not free yet";
    EXPECT_TRUE(harness.Step().IsEmpty()) << "the only row is still in use";
    EXPECT_EQ(harness.scheduler().Stats().num_private_pages, 0);
  }
  EXPECT_EQ(harness.Step().request_ids, Ids{2});
  harness.RunToEndAndCheck();
}

TEST_P(PitfallsOverlapTest, AnAbortKeepsPagesAndRowUntilTheLastPlanWithARowOfIt) {
  SchedulerHarness harness(DeviceOnly(), overlap());
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), LongRunningPrompt(9, 8, 1), 8);
  harness.Step();
  harness.Step([&] {
    harness.Abort(1);
    EXPECT_EQ(harness.scheduler().Stats().num_private_pages, IsOverlapped() ? 3 : 1);
    harness.Add(2, adapter(), MakePrompt(31, 2), 1);  // needs all pages
  });
  if (IsOverlapped()) {
    EXPECT_EQ(harness.scheduler().Stats().num_running_requests, 1);
    EXPECT_TRUE(harness.Step().IsEmpty());
  }
  EXPECT_EQ(harness.scheduler().Stats().num_running_requests, 0);
  EXPECT_EQ(harness.Step().request_ids, Ids{2});
  harness.RunToEnd();
  EXPECT_EQ(harness.num_late_aborts(), IsOverlapped() ? 2 : 1);
  harness.ExpectRightOutputs();
  harness.ExpectNothingLeft();
}

TEST_P(PitfallsOverlapTest, ARequestIsNotPreemptedWhileAPlanHasARowOfIt) {
  SchedulerHarness harness(DeviceOnly(), overlap());
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 2; ++id) {
    harness.Add(id, adapter(), LongRunningPrompt(8, 12, static_cast<TokenId>(id)), 12);
  }
  while (harness.request(1).newest_end() < 16) {
    EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2}));
  }
  // Request 1 needs its fifth page now, and there is none.
  const RecordedPlan plan = harness.Step();
  EXPECT_FALSE(plan.HasRowOf(2));
  EXPECT_EQ(harness.scheduler().Counters().total_preemptions, IsOverlapped() ? 0 : 1)
      << "with overlap it sits out one plan first";
  EXPECT_EQ(plan.HasRowOf(1), !IsOverlapped());
  const RecordedPlan next = harness.Step();
  EXPECT_EQ(harness.scheduler().Counters().total_preemptions, 1);
  EXPECT_EQ(next.request_ids, Ids{1});
  harness.RunToEnd();
  EXPECT_EQ(harness.scheduler().Counters().total_preemptions, 1);
  harness.ExpectRightOutputs();
  harness.ExpectNothingLeft();
}

TEST_P(PitfallsOverlapTest, NoMoreSitOutThanThePagesTake) {
  SchedulerOptions options = DeviceOnly();
  options.num_device_pages = 12;
  SchedulerHarness harness(options, overlap());
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), LongRunningPrompt(8, 12, 1), 12);
  for (std::int64_t id = 2; id <= 3; ++id) {  // these need their fifth page one step later
    harness.Add(id, adapter(), LongRunningPrompt(7, 12, static_cast<TokenId>(id)), 12);
  }
  while (harness.request(1).newest_end() < 16) {
    EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2, 3}));
  }
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.request_ids, IsOverlapped() ? Ids{2} : (Ids{1, 2}));
  harness.RunToEndAndCheck();
}

TEST_P(PitfallsOverlapTest, AVictimThatSatOutRunsOnWhenThePagesHaveComeFromElsewhere) {
  SchedulerOptions options = DeviceOnly();
  options.num_device_pages = 9;
  SchedulerHarness harness(options, overlap());
  harness.OpenAndLoad(adapter());
  // Requests 1 and 2 fill eight pages and need a ninth and tenth at once; request 3 holds the ninth
  // and ends in the plan before.
  harness.Add(1, adapter(), LongRunningPrompt(8, 12, 1), 12);
  harness.Add(2, adapter(), LongRunningPrompt(8, 9, 2), 9);
  while (harness.request(1).newest_end() < 13) harness.Step();
  harness.Add(3, adapter(), MakePrompt(1, 3), 3);
  harness.RunToEnd();
  EXPECT_LE(harness.scheduler().Counters().total_preemptions, 1);
  harness.ExpectRightOutputs();
  harness.ExpectNothingLeft();
}

TEST_P(PitfallsOverlapTest, TheSlotOfADrainedAdapterIsNotLoadedOverBeforeItsPlanReturns) {
  SchedulerHarness harness(kTiers, overlap());
  const AdapterId draining = IsBase() ? AdapterId(7) : adapter();
  const AdapterId other(8);
  harness.OpenAndLoad(draining);
  if (IsBase()) harness.Add(2, kBaseAdapter, LongRunningPrompt(2, 12, 3), 12);
  harness.Add(1, draining, MakeStoppingPrompt(draining, 4, 2, 1), 8);
  harness.Step();
  harness.scheduler().DrainAdapter(draining);
  harness.executor().load_outcome = [](AdapterId) { return Outcome::kUnderWay; };
  harness.OpenAdapter(other);
  while (!harness.drained().contains(draining)) {
    for (const std::int32_t slot : harness.Step().load_adapter_slots) EXPECT_EQ(slot, 1);
  }
  harness.executor().load_outcome = nullptr;
  harness.RunToEnd();
  harness.AdvanceAll();
  harness.OpenAdapter(AdapterId(9));
  EXPECT_EQ(harness.Step().load_adapter_slots, Ints{0}) << "now it is free";
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(PitfallsOverlapTest, TheSlotOfAnAdapterStaysWhileALatePlanHasARowOfIt) {
  SchedulerOptions options = DeviceOnly();
  options.adapter_memory_bytes = 10;
  SchedulerHarness harness(options, overlap());
  const AdapterId victim = IsBase() ? AdapterId(7) : adapter();
  const AdapterId other(8);
  harness.OpenAndLoad(victim, {.size_bytes = 10});
  harness.OpenAdapter(other, {.size_bytes = 10});
  if (IsBase()) harness.Add(3, kBaseAdapter, LongRunningPrompt(2, 12, 3), 12);
  harness.Add(1, victim, MakeStoppingPrompt(victim, 4, 3, 1), 12);
  harness.Step();
  harness.Add(2, other, MakePrompt(4, 2), 3);
  while (!harness.request(1).is_finished) EXPECT_TRUE(harness.Step().evicted_adapter_ids.empty());
  if (IsOverlapped()) {
    EXPECT_TRUE(harness.Step().evicted_adapter_ids.empty()) << "its late row is outstanding";
  }
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.evicted_adapter_ids, Ids{victim.value()});
  EXPECT_EQ(plan.load_adapter_ids, Ids{other.value()});
  EXPECT_EQ(plan.load_adapter_slots, Ints{0}) << "evictions come before loads";
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(PitfallsOverlapTest, NoRowIsPlannedBeyondMaxTokens) {
  SchedulerHarness harness(kTiers, overlap());
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), LongRunningPrompt(5, 4, 1), 4);
  std::int32_t num_rows = 0;
  while (harness.scheduler().HasWork()) num_rows += harness.Step().HasRowOf(1);
  EXPECT_EQ(num_rows, 4);
  EXPECT_EQ(harness.num_late_finishes(), 0);
  EXPECT_EQ(harness.num_unknown_tokens(), IsOverlapped() ? 3 : 0);
  harness.ExpectRightOutputs();
}

TEST_P(PitfallsOverlapTest, ALateRowPublishesNoTokenThatIsNotKnown) {
  // The stop token is the last of its page: the late row fills that page with a token that was
  // never part of the sequence.
  SchedulerOptions options = DeviceOnly();
  options.num_device_pages = 32;
  SchedulerHarness harness(options, overlap());
  harness.OpenAndLoad(adapter());
  for (std::int32_t num_output = 1; num_output <= 6; ++num_output) {
    const std::int64_t id = num_output;
    std::vector<TokenId> tokens =
        MakeStoppingPrompt(adapter(), 6, num_output, static_cast<TokenId>(id));
    harness.Add(id, adapter(), tokens, 12);
    harness.RunToEnd();
    tokens.insert(tokens.end(), harness.request(id).output.begin(),
                  harness.request(id).output.end());
    tokens.push_back(1);
    harness.Add(100 + id, adapter(), tokens, 2);
    harness.RunToEnd();
    const auto num_known = static_cast<std::int32_t>(tokens.size()) - 2;
    EXPECT_GE(harness.request(100 + id).num_cached_tokens, num_known / 4 * 4);
  }
  harness.ExpectRightOutputs();
  harness.ExpectNothingLeft();
}

}  // namespace
}  // namespace lora_serve
