// The host tier: hits that are loaded back, copies that take their time or fail, and their reports.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "common/errors.h"
#include "support/scheduler_harness.h"

namespace lora_serve {
namespace {

using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::Outcome;
using testing::RecordedPlan;
using testing::SchedulerHarness;

using Ints = std::vector<std::int32_t>;
using Ids = std::vector<std::int64_t>;
using Kinds = std::vector<std::int8_t>;

constexpr std::int8_t kWriteBackKind = 0;
constexpr std::int8_t kLoadBackKind = 1;

class SchedulerTiersTest : public ::testing::TestWithParam<std::int64_t> {
 protected:
  AdapterId adapter() const { return AdapterId(GetParam()); }

  /// Three pages and a token; the device holds eight pages.
  static std::vector<TokenId> Prompt() { return MakePrompt(13, 1); }

  static constexpr SchedulerOptions kTiers = {.page_size = 4,
                                              .num_device_pages = 8,
                                              .max_num_batched_tokens = 128,
                                              .max_model_len = 32,
                                              .num_host_pages = 32};

  /// From now on copies take until it is called again.
  static void SetCopies(SchedulerHarness& harness, Outcome outcome) {
    harness.executor().copy_outcome = [outcome](TransferId, TransferKind) { return outcome; };
  }

  /// Prompt() is on the host, and of its pages only the first `num_device_pages` on the device.
  void PutOnHost(SchedulerHarness& harness, std::int32_t num_device_pages = 0) {
    harness.OpenAndLoad(adapter());
    harness.Add(101, adapter(), Prompt(), 1);
    harness.RunToEnd();
    harness.Step();  // writes through
    harness.Add(102, kBaseAdapter, MakePrompt(31 - 4 * num_device_pages, 99), 1);
    harness.RunToEnd();
    harness.Step();
    ASSERT_EQ(harness.scheduler().Stats().num_transfers, 0);
    ASSERT_EQ(harness.StatsOf(adapter()).num_host_pages,
              adapter() == kBaseAdapter ? 10 - num_device_pages : 3);
  }
};
INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, SchedulerTiersTest, ::testing::Values(0, 1));

TEST_P(SchedulerTiersTest, AHitOnTheHostIsLoadedBackAndContinuesWithTheSameTokens) {
  SchedulerHarness harness(kTiers);
  PutOnHost(harness);
  harness.Add(1, adapter(), Prompt(), 3);
  const RecordedPlan loading = harness.Step();
  EXPECT_EQ(loading.transfer_kinds, Kinds{kLoadBackKind});
  EXPECT_EQ(loading.transfer_offsets, (Ints{0, 3}));
  EXPECT_FALSE(loading.HasRows()) << "its pages are not there yet";
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.request_ids, Ids{1});
  EXPECT_EQ(plan.num_computed_tokens, Ints{12});
  EXPECT_EQ(plan.num_scheduled_tokens, Ints{1});
  EXPECT_EQ(plan.num_cached_tokens, Ints{12});
  EXPECT_EQ(plan.delta_starts, Ints{0}) << "the row is told with its first plan";
  EXPECT_EQ(harness.scheduler().Stats().total_hit_tokens, 12);
  EXPECT_EQ(harness.scheduler().Stats().total_host_hit_tokens, 12);
  EXPECT_EQ(harness.StatsOf(adapter()).num_hit_tokens, 12);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTiersTest, AHitOnBothTiersLoadsOnlyWhatTheDeviceLacks) {
  SchedulerHarness harness(kTiers);
  PutOnHost(harness, /*num_device_pages=*/1);
  harness.Add(1, adapter(), Prompt(), 3);
  EXPECT_EQ(harness.Step().transfer_offsets, (Ints{0, 2}));
  EXPECT_EQ(harness.Step().num_computed_tokens, Ints{12});
  EXPECT_EQ(harness.scheduler().Stats().total_hit_tokens, 12);
  EXPECT_EQ(harness.scheduler().Stats().total_host_hit_tokens, 8);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTiersTest, ALoadMayTakeManyStepsWhileOthersRun) {
  SchedulerHarness harness(kTiers);
  PutOnHost(harness);
  SetCopies(harness, Outcome::kUnderWay);
  harness.Add(1, adapter(), Prompt(), 3);
  harness.Add(2, kBaseAdapter, MakePrompt(3, 5), 6);
  for (int step = 0; step < 4; ++step) EXPECT_EQ(harness.Step().request_ids, Ids{2});
  EXPECT_EQ(harness.scheduler().Stats().num_running_requests, 2) << "a loading request has a row";
  EXPECT_GE(harness.scheduler().Stats().num_transfers, 1);
  SetCopies(harness, Outcome::kDone);
  harness.RunToEnd();
  EXPECT_EQ(harness.request(1).num_cached_tokens, 12);
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTiersTest, WhoseWantedPagesAreOnTheirWayForAnotherIsSkippedAndNotAWall) {
  SchedulerHarness harness(kTiers);
  PutOnHost(harness);
  SetCopies(harness, Outcome::kUnderWay);
  harness.Add(1, adapter(), Prompt(), 3);
  harness.Add(2, adapter(), Prompt(), 2);
  harness.Add(3, adapter(), MakePrompt(3, 5), 4);
  EXPECT_EQ(harness.Step().request_ids, Ids{3});
  EXPECT_EQ(harness.scheduler().Stats().num_running_requests, 2);
  EXPECT_EQ(harness.scheduler().Stats().num_waiting_requests, 1);
  for (std::int64_t id = 10; id < 30; ++id) {  // more than may pass one that lacks pages
    harness.Add(id, kBaseAdapter, MakePrompt(2, static_cast<TokenId>(id)), 1);
    harness.Step();
    EXPECT_TRUE(harness.request(id).is_finished);
  }
  harness.Add(4, adapter(), MakePrompt(3, 6), 9);
  harness.Step();
  SetCopies(harness, Outcome::kDone);
  harness.Step();
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.request_ids, (Ids{4, 1, 2})) << "it takes the pages that have arrived";
  EXPECT_EQ(plan.num_cached_tokens, (Ints{0, 12, 12}));
  EXPECT_EQ(harness.scheduler().Stats().total_host_hit_tokens, 12) << "one copy for both";
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTiersTest, AnAbortWhileLoadingEndsTheRequestAtOnceAndTheCopyGoesOn) {
  SchedulerHarness harness(kTiers);
  PutOnHost(harness);
  SetCopies(harness, Outcome::kUnderWay);
  harness.Add(1, adapter(), Prompt(), 3);
  harness.Step();
  harness.Abort(1);
  EXPECT_EQ(harness.scheduler().Stats().num_running_requests, 0);
  EXPECT_EQ(harness.scheduler().Stats().num_private_pages, 0);
  EXPECT_EQ(harness.scheduler().Stats().num_transfers, 1);
  EXPECT_FALSE(harness.scheduler().HasWork()) << "nobody waits for the copy";
  harness.Add(2, kBaseAdapter, MakePrompt(31, 7), 1);
  EXPECT_TRUE(harness.Step().IsEmpty()) << "the copy still holds three pages";
  EXPECT_TRUE(harness.scheduler().HasWork());
  SetCopies(harness, Outcome::kDone);
  EXPECT_EQ(harness.Report(), 1);
  harness.Abort(2);
  harness.Add(3, adapter(), Prompt(), 3);
  EXPECT_EQ(harness.Step().num_cached_tokens, Ints{12}) << "what arrived is in the tree";
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTiersTest, AnAbortInsideThePlanThatStartsTheCopyTakesEffectAtOnce) {
  SchedulerHarness harness(kTiers);
  PutOnHost(harness);
  harness.Add(1, adapter(), Prompt(), 3);
  harness.Step([&] {
    harness.Abort(1);
    EXPECT_EQ(harness.scheduler().Stats().num_running_requests, 0);
    harness.Add(1, adapter(), Prompt(), 3);  // the id is free
  });
  EXPECT_EQ(harness.Step().num_cached_tokens, Ints{12});
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTiersTest, AFailedLoadIsRecomputedWithTheSameTokens) {
  for (const std::int32_t num_device_pages : {0, 1}) {
    SchedulerHarness harness(kTiers);
    PutOnHost(harness, num_device_pages);
    const std::int64_t num_host_pages = harness.StatsOf(adapter()).num_host_pages;
    harness.Add(1, adapter(), Prompt(), 3);
    SetCopies(harness, Outcome::kFailed);
    EXPECT_EQ(harness.Step().transfer_kinds, Kinds{kLoadBackKind});
    SetCopies(harness, Outcome::kDone);
    EXPECT_EQ(harness.StatsOf(adapter()).num_host_pages, num_host_pages - 3 + num_device_pages)
        << "pages that cannot be read are not offered again";
    const RecordedPlan plan = harness.Step();
    EXPECT_EQ(plan.request_ids, Ids{1});
    EXPECT_EQ(plan.num_computed_tokens, Ints{4 * num_device_pages});
    EXPECT_EQ(plan.num_cached_tokens, Ints{4 * num_device_pages});
    EXPECT_EQ(plan.delta_starts, Ints{0});
    EXPECT_EQ(harness.scheduler().Stats().total_host_hit_tokens, 0);
    EXPECT_EQ(harness.scheduler().Stats().total_hit_tokens, 4 * num_device_pages);
    harness.RunToEnd();
    harness.ExpectRightOutputs();
    harness.ExpectNothingLeft();
  }
}

TEST_P(SchedulerTiersTest, ARequestWhoseLoadFailedAndWhosePagesAreGoneWaitsForPages) {
  SchedulerHarness harness(kTiers);
  PutOnHost(harness);
  SetCopies(harness, Outcome::kUnderWay);
  harness.Add(1, adapter(), MakeLongRunningPrompt(adapter(), 15, 9, 4), 9);  // 4 pages, 6 later
  harness.Add(2, adapter(), Prompt(), 3);                                    // 4 pages
  EXPECT_EQ(harness.Step().request_ids, Ids{1});
  // The failed load gives its pages back; request 1 takes one before request 2 can take them again.
  SetCopies(harness, Outcome::kFailed);
  while (harness.request(2).num_steps == 0) harness.Step();
  EXPECT_EQ(harness.scheduler().Stats().total_preemptions, 1);
  EXPECT_EQ(harness.request(2).num_cached_tokens, 0);
  SetCopies(harness, Outcome::kDone);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTiersTest, APlanOfCopiesAloneOwesAnEvent) {
  SchedulerHarness harness(kTiers);
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), Prompt(), 1);
  harness.RunToEnd();
  EXPECT_FALSE(harness.scheduler().HasWork());
  const RecordedPlan plan = harness.Step([&] {
    EXPECT_TRUE(harness.scheduler().HasWork()) << "a plan is outstanding";
    EXPECT_TRUE(harness.scheduler().NextPlan(harness.now_us()).IsEmpty());
  });
  EXPECT_FALSE(plan.IsEmpty());
  EXPECT_FALSE(plan.HasRows());
  EXPECT_EQ(plan.transfer_ids, Ids{0});
  EXPECT_EQ(plan.transfer_kinds, Kinds{kWriteBackKind});
  EXPECT_EQ(plan.transfer_source_pages.size(), 3U);
  EXPECT_EQ(plan.transfer_destination_pages.size(), 3U);
  EXPECT_EQ(harness.StatsOf(adapter()).num_host_pages, 3);
  EXPECT_TRUE(harness.Step().IsEmpty()) << "it was copied once";
}

TEST_P(SchedulerTiersTest, CopiesThatNobodyWaitsForAreNotWorkAndAreReportedWithoutAPlan) {
  SchedulerHarness harness(kTiers);
  harness.OpenAndLoad(adapter());
  SetCopies(harness, Outcome::kUnderWay);
  harness.Add(1, adapter(), Prompt(), 1);
  harness.RunToEnd();
  harness.Step();
  EXPECT_EQ(harness.scheduler().Stats().num_transfers, 1);
  EXPECT_FALSE(harness.scheduler().HasWork());
  EXPECT_TRUE(harness.Step().IsEmpty());
  SetCopies(harness, Outcome::kDone);
  EXPECT_EQ(harness.Report(), 1);
  harness.ExpectNothingLeft();
}

TEST_P(SchedulerTiersTest, CopiesMayBeReportedWithoutAPlanWhileOneIsOutstanding) {
  SchedulerHarness harness(kTiers);
  PutOnHost(harness);
  SetCopies(harness, Outcome::kUnderWay);
  harness.Add(1, adapter(), Prompt(), 3);
  harness.Add(2, kBaseAdapter, MakePrompt(3, 5), 3);
  harness.Step([&] {
    SetCopies(harness, Outcome::kDone);
    EXPECT_EQ(harness.Report(), 1);
  });
  EXPECT_EQ(harness.Step().request_ids, (Ids{2, 1}));
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTiersTest, ADrainWaitsForTheCopiesOfItsPages) {
  const AdapterId draining(7);
  SchedulerHarness harness(kTiers);
  harness.OpenAndLoad(adapter());
  harness.OpenAndLoad(draining);
  SetCopies(harness, Outcome::kUnderWay);
  harness.Add(1, draining, Prompt(), 1);
  harness.RunToEnd();
  harness.Step();
  harness.scheduler().DrainAdapter(draining);
  EXPECT_EQ(harness.scheduler().Stats().num_free_pages, 5) << "the copy holds both ends";
  EXPECT_TRUE(harness.scheduler().HasWork()) << "the drain is due";
  EXPECT_TRUE(harness.Step().IsEmpty());
  EXPECT_EQ(harness.StatsOf(draining).state, AdapterState::kDraining);
  SetCopies(harness, Outcome::kDone);
  harness.Report();
  EXPECT_EQ(harness.Step().drained_adapter_ids, Ids{7});
  EXPECT_FALSE(harness.scheduler().HasWork());
  EXPECT_EQ(harness.scheduler().Stats().num_free_pages, 8);
  EXPECT_EQ(harness.scheduler().Stats().num_free_host_pages, 32);
}

TEST_P(SchedulerTiersTest, ADrainWhileARequestLoadsLetsItRunToItsEnd) {
  for (const Outcome outcome : {Outcome::kDone, Outcome::kFailed}) {
    SchedulerHarness harness(kTiers);
    PutOnHost(harness);
    SetCopies(harness, Outcome::kUnderWay);
    harness.Add(1, adapter(), Prompt(), 3);
    harness.Step();
    if (adapter() != kBaseAdapter) harness.scheduler().DrainAdapter(adapter());
    SetCopies(harness, outcome);
    harness.Step();
    SetCopies(harness, Outcome::kDone);
    harness.RunToEnd();
    harness.ExpectRightOutputs();
    harness.ExpectNothingLeft();
    EXPECT_EQ(harness.drained().contains(adapter()), adapter() != kBaseAdapter);
  }
}

TEST_P(SchedulerTiersTest, ReportsOfCopiesThatAreNotUnderWayAreRefusedAndChangeNothing) {
  Scheduler scheduler(kTiers);
  if (adapter() != kBaseAdapter) {
    scheduler.OpenAdapter(adapter(), {});
    const std::int64_t plan_id = scheduler.NextPlan(0).plan_id;
    scheduler.Advance({.plan_id = plan_id,
                       .sampled_token_ids = {},
                       .is_finished = {},
                       .loaded_adapter_ids = {adapter().value()},
                       .failed_adapter_ids = {},
                       .completed_transfer_ids = {},
                       .failed_transfer_ids = {}});
  }
  scheduler.AddRequest({.request_id = RequestId(1),
                        .adapter_id = adapter(),
                        .prompt_token_ids = MakePrompt(4),
                        .max_tokens = 9});
  ExecutionEvent good;
  good.plan_id = scheduler.NextPlan(0).plan_id;
  good.sampled_token_ids = {5};
  good.is_finished = {0};
  scheduler.Advance(good);
  const ExecutionPlan plan = scheduler.NextPlan(0);
  ASSERT_EQ(plan.transfer_ids, Ids{0});
  good.plan_id = plan.plan_id;
  const auto expect_refusal = [&](const std::string& part,
                                  const std::function<void(ExecutionEvent&)>& change) {
    ExecutionEvent event = good;
    change(event);
    try {
      scheduler.Advance(event);
      ADD_FAILURE() << "nothing was refused; expected " << part;
    } catch (const InvalidArgumentError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
    scheduler.CheckInvariants();
    EXPECT_EQ(scheduler.Stats().num_transfers, 1);
  };
  expect_refusal("copy 1 in completed_transfer_ids",
                 [](auto& e) { e.completed_transfer_ids = {0, 1}; });
  expect_refusal("copy -1 in failed_transfer_ids", [](auto& e) { e.failed_transfer_ids = {-1}; });
  expect_refusal("copy 0 in completed_transfer_ids for the second time",
                 [](auto& e) { e.completed_transfer_ids = {0, 0}; });
  expect_refusal("copy 0 in failed_transfer_ids for the second time", [](auto& e) {
    e.completed_transfer_ids = {0};
    e.failed_transfer_ids = {0};
  });
  const auto without_plan = [](ExecutionEvent& event) {
    event = {};
    event.completed_transfer_ids = {0};
  };
  expect_refusal("copy 3 in", [&](auto& e) {
    without_plan(e);
    e.failed_transfer_ids = {3};
  });
  expect_refusal("1 entries in sampled_token_ids", [&](auto& e) {
    without_plan(e);
    e.sampled_token_ids = {5};
  });
  expect_refusal("1 entries in is_finished", [&](auto& e) {
    without_plan(e);
    e.is_finished = {0};
  });
  expect_refusal("adapter 3 in loaded_adapter_ids", [&](auto& e) {
    without_plan(e);
    e.loaded_adapter_ids = {3};
  });
  expect_refusal("adapter 3 in failed_adapter_ids", [&](auto& e) {
    without_plan(e);
    e.failed_adapter_ids = {3};
  });
  expect_refusal("plan -1 came while plan", [](auto& e) { e = {}; });
  good.completed_transfer_ids = {0};
  scheduler.Advance(good);
  EXPECT_EQ(scheduler.Stats().num_transfers, 0);
  ExecutionEvent late;
  late.completed_transfer_ids = {0};
  EXPECT_THROW(scheduler.Advance(late), InvalidArgumentError) << "a copy is reported once";
}

TEST_P(SchedulerTiersTest, TheWritePolicyDecidesWhatIsCopied) {
  const auto num_write_backs = [&](WritePolicy policy, std::int32_t watermark) {
    SchedulerOptions options = kTiers;
    options.write_policy = policy;
    options.write_back_watermark_pages = watermark;
    SchedulerHarness harness(options);
    harness.OpenAndLoad(adapter());
    harness.Add(1, adapter(), Prompt(), 1);
    harness.RunToEnd();
    harness.Step();
    return harness.num_write_backs();
  };
  EXPECT_EQ(num_write_backs(WritePolicy::kWriteThrough, 0), 1);
  EXPECT_EQ(num_write_backs(WritePolicy::kOff, 8), 0);
  EXPECT_EQ(num_write_backs(WritePolicy::kWriteBack, 5), 0) << "five pages are free";
  EXPECT_EQ(num_write_backs(WritePolicy::kWriteBack, 6), 1);
}

TEST_P(SchedulerTiersTest,
       WithoutAWatermarkWriteBackKeepsRoomForAStepButAtMostAQuarterOfTheDevice) {
  const auto writes_with_free_pages = [&](std::int32_t max_num_batched_tokens,
                                          std::int32_t num_free_pages) {
    SchedulerHarness harness({.page_size = 4,
                              .num_device_pages = 12,
                              .max_num_seqs = 1,
                              .max_num_batched_tokens = max_num_batched_tokens,
                              .max_model_len = 48,
                              .num_host_pages = 12,
                              .write_policy = WritePolicy::kWriteBack});
    harness.OpenAndLoad(adapter());
    harness.Add(1, adapter(), MakePrompt(4 * (12 - num_free_pages)), 1);
    harness.RunToEnd();
    const std::int64_t num_before = harness.num_write_backs();
    harness.Step();
    return harness.num_write_backs() > num_before;
  };
  EXPECT_FALSE(writes_with_free_pages(4, 2)) << "a step takes a page of tokens and one of a decode";
  EXPECT_TRUE(writes_with_free_pages(4, 1));
  EXPECT_FALSE(writes_with_free_pages(48, 3));
  EXPECT_TRUE(writes_with_free_pages(48, 2)) << "a quarter is three pages";
}

TEST_P(SchedulerTiersTest, ThePagesOfALoadedAdapterAreNotTheFirstToGo) {
  SchedulerOptions options = kTiers;
  options.num_host_pages = 0;
  SchedulerHarness harness(options);
  harness.OpenAndLoad(adapter());
  harness.Add(1, kBaseAdapter, MakePrompt(13, 8), 1);
  harness.RunToEnd();
  harness.Add(2, adapter(), Prompt(), 1);
  harness.RunToEnd();
  harness.Add(3, kBaseAdapter, MakePrompt(15, 9), 1);  // needs two pages of the six in the trees
  harness.RunToEnd();
  harness.Add(4, adapter(), Prompt(), 1);
  EXPECT_EQ(harness.Step().num_cached_tokens, Ints{12});
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

}  // namespace
}  // namespace lora_serve
