// Preemption with a host tier: what the victim computed is written back and loaded back.
#include <gtest/gtest.h>

#include <vector>

#include "support/scheduler_harness.h"

namespace lora_serve {
namespace {

using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::Outcome;
using testing::Overlap;
using testing::RecordedPlan;
using testing::SchedulerHarness;

using Ids = std::vector<std::int64_t>;
using Ints = std::vector<std::int32_t>;
using Kinds = std::vector<std::int8_t>;

class SchedulerTierPreemptionTest : public ::testing::TestWithParam<std::int64_t> {
 protected:
  AdapterId adapter() const { return AdapterId(GetParam()); }

  /// Copies nothing by itself, so that every write-back is that of a victim.
  static SchedulerOptions Options(std::int32_t num_device_pages) {
    return {.page_size = 4,
            .num_device_pages = num_device_pages,
            .max_num_batched_tokens = 128,
            .max_model_len = 32,
            .num_host_pages = 32,
            .write_policy = WritePolicy::kOff};
  }

  static void SetCopies(SchedulerHarness& harness, Outcome outcome) {
    harness.executor().copy_outcome = [outcome](TransferId, TransferKind) { return outcome; };
  }

  /// Load-backs have this outcome from now on, write-backs are done at once.
  static void HoldLoadBacks(SchedulerHarness& harness, Outcome outcome) {
    harness.executor().copy_outcome = [outcome](TransferId, TransferKind kind) {
      return kind == TransferKind::kLoadBack ? outcome : Outcome::kDone;
    };
  }

  /// The pages of `prompt` are on the host, and on a device of at most 14 pages no more.
  void PutOnHost(SchedulerHarness& harness, const std::vector<TokenId>& prompt) {
    harness.Add(101, adapter(), prompt, 1);
    for (std::int64_t id = 102; id <= 103; ++id) {
      harness.RunToEnd();
      harness.Step();  // writes through
      harness.Add(id, kBaseAdapter, MakePrompt(31, static_cast<TokenId>(id)), 1);
    }
    harness.RunToEnd();
    harness.Step();
  }

  /// A request of 8 prompt tokens that samples `num_output_tokens` tokens.
  void AddLong(SchedulerHarness& harness, std::int64_t id, std::int32_t num_output_tokens,
               bool reuse_prefix = true) {
    harness.Add(id, adapter(),
                MakeLongRunningPrompt(adapter(), 8, num_output_tokens, static_cast<TokenId>(id)),
                num_output_tokens, reuse_prefix);
  }

  static std::int64_t NumPreemptions(SchedulerHarness& harness) {
    return harness.scheduler().Stats().total_preemptions;
  }

  /// The plan of the first step that preempts.
  static RecordedPlan StepUntilPreemption(SchedulerHarness& harness) {
    RecordedPlan plan;
    while (NumPreemptions(harness) == 0) plan = harness.Step();
    return plan;
  }
};
INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, SchedulerTierPreemptionTest, ::testing::Values(0, 1));

TEST_P(SchedulerTierPreemptionTest, AVictimIsWrittenBackAndRecoversComputingAtMostOnePage) {
  for (const bool enable_prefix_caching : {true, false}) {
    for (const bool reuse_prefix : {true, false}) {
      SchedulerOptions options = Options(8);
      options.enable_prefix_caching = enable_prefix_caching;
      SchedulerHarness harness(options);
      harness.OpenAndLoad(adapter());
      AddLong(harness, 1, 24, reuse_prefix);  // takes the whole device in the end
      AddLong(harness, 2, 12, reuse_prefix);
      const RecordedPlan preempting = StepUntilPreemption(harness);
      EXPECT_EQ(preempting.transfer_kinds, Kinds{0});
      EXPECT_EQ(preempting.transfer_offsets, (Ints{0, 4})) << "all that it had computed";
      while (!harness.request(1).is_finished) {
        EXPECT_TRUE(harness.Step().transfer_ids.empty());
      }
      EXPECT_EQ(harness.Step().transfer_kinds, Kinds{1});
      const RecordedPlan plan = harness.Step();
      EXPECT_EQ(plan.request_ids, Ids{2});
      EXPECT_EQ(plan.num_computed_tokens, Ints{16});
      EXPECT_LE(plan.num_scheduled_tokens.at(0), 4);
      EXPECT_EQ(plan.samples_token, std::vector<std::uint8_t>{1}) << "it decodes again at once";
      EXPECT_EQ(plan.num_cached_tokens, Ints{0}) << "a recovery is not reported as usage";
      EXPECT_EQ(harness.scheduler().Stats().total_host_hit_tokens, 0);
      harness.RunToEnd();
      harness.ExpectRightOutputs();
      harness.ExpectNothingLeft();
      EXPECT_EQ(NumPreemptions(harness), 1);
    }
  }
}

TEST_P(SchedulerTierPreemptionTest, RowsWaitForTheVictimsCopyInsteadOfTakingAnotherVictim) {
  // Three requests of four pages fill the device and need a fifth page in the same step. With
  // kWriteThrough the victim's copy is one of its last page, but holds all four, and the copies of
  // the others hold nothing that could be waited for.
  for (const WritePolicy policy : {WritePolicy::kOff, WritePolicy::kWriteThrough}) {
    SchedulerOptions options = Options(12);
    options.write_policy = policy;
    SchedulerHarness harness(options);
    harness.OpenAndLoad(adapter());
    for (std::int64_t id = 1; id <= 3; ++id) AddLong(harness, id, 12);
    while (harness.request(1).output.size() < 9) EXPECT_TRUE(harness.Step().HasRows());
    const RecordedPlan preempting = harness.Step();
    EXPECT_EQ(preempting.transfer_offsets,
              policy == WritePolicy::kOff ? (Ints{0, 4}) : (Ints{0, 1, 2, 3}));
    EXPECT_EQ(NumPreemptions(harness), 1) << "the pages of one are enough for the other two";
    EXPECT_FALSE(preempting.HasRows());
    EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2}));
    harness.RunToEnd();
    harness.ExpectRightOutputs();
    harness.ExpectNothingLeft();
    EXPECT_EQ(NumPreemptions(harness), 1);
  }
}

TEST_P(SchedulerTierPreemptionTest, TheWaitLastsUntilTheCopyIsReported) {
  SchedulerHarness harness(Options(12));
  harness.OpenAndLoad(adapter());
  SetCopies(harness, Outcome::kUnderWay);
  for (std::int64_t id = 1; id <= 3; ++id) AddLong(harness, id, 12);
  StepUntilPreemption(harness);
  harness.Add(4, adapter(), MakePrompt(3, 44), 2);
  for (int step = 0; step < 5; ++step) {
    EXPECT_TRUE(harness.Step().IsEmpty()) << "nobody is admitted to the pages that are waited for";
    EXPECT_TRUE(harness.scheduler().HasWork());
  }
  EXPECT_EQ(NumPreemptions(harness), 1);
  SetCopies(harness, Outcome::kDone);
  EXPECT_EQ(harness.Report(), 1);
  const RecordedPlan plan = harness.Step();
  ASSERT_GE(plan.request_ids.size(), 2U);
  EXPECT_EQ(plan.request_ids[0], 1);
  EXPECT_EQ(plan.request_ids[1], 2);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTierPreemptionTest, NobodyIsPreemptedForPagesThatAnEndedRequestLeavesInACopy) {
  SchedulerOptions options = Options(10);
  options.write_policy = WritePolicy::kWriteThrough;
  SchedulerHarness harness(options);
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 2; ++id) AddLong(harness, id, 12);
  SetCopies(harness, Outcome::kFailed);  // an old failure makes no difference
  while (harness.request(1).output.size() < 3) harness.Step();
  SetCopies(harness, Outcome::kDone);
  while (harness.request(1).output.size() < 8) harness.Step();
  harness.Add(3, adapter(), MakePrompt(8, 3), 1);
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2, 3}));
  ASSERT_TRUE(harness.request(3).is_finished);
  EXPECT_FALSE(harness.Step().HasRows()) << "the two pages of request 3 are being written through";
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2}));
  EXPECT_EQ(NumPreemptions(harness), 0);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTierPreemptionTest,
       NobodyIsPreemptedForPagesThatAreStillCopiedWhenTheirRequestEnds) {
  SchedulerOptions options = Options(11);
  options.write_policy = WritePolicy::kWriteThrough;
  SchedulerHarness harness(options);
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 2; ++id) AddLong(harness, id, 12);
  while (harness.request(1).output.size() < 7) harness.Step();
  SetCopies(harness, Outcome::kUnderWay);
  harness.Add(3, adapter(), MakeLongRunningPrompt(adapter(), 8, 2, 3), 2);
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2, 3}));
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2, 3}));
  ASSERT_TRUE(harness.request(3).is_finished);
  for (int step = 0; step < 2; ++step) {
    EXPECT_EQ(harness.Step().request_ids, Ids{1}) << "request 3 left one page that is not copied";
  }
  SetCopies(harness, Outcome::kDone);
  harness.Report();
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2}));
  EXPECT_EQ(NumPreemptions(harness), 0);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTierPreemptionTest, WriteBacksThatAlwaysFailKeepNoPagesFromTheRows) {
  SchedulerOptions options = Options(8);
  options.write_policy = WritePolicy::kWriteBack;
  options.write_back_watermark_pages = 8;
  SchedulerHarness harness(options);
  harness.OpenAndLoad(adapter());
  SetCopies(harness, Outcome::kFailed);
  for (std::int64_t id = 1; id <= 3; ++id)
    harness.Add(id, adapter(), MakePrompt(31, static_cast<TokenId>(id)), 1);
  for (std::int64_t id = 4; id <= 6; ++id) AddLong(harness, id, 12);
  harness.RunToEnd(/*max_steps=*/100);
  EXPECT_GT(harness.num_write_backs(), 0);
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTierPreemptionTest, WhoWaitsForPagesAfterAFailedLoadIsNotPassedByNewcomers) {
  SchedulerOptions options = Options(13);
  options.write_policy = WritePolicy::kWriteThrough;
  SchedulerHarness harness(options);
  harness.OpenAndLoad(adapter());
  const std::vector<TokenId> on_host = MakePrompt(13, 33);
  PutOnHost(harness, on_host);
  Outcome load_outcome = Outcome::kUnderWay;
  harness.executor().copy_outcome = [&load_outcome](TransferId, TransferKind kind) {
    return kind == TransferKind::kLoadBack ? load_outcome : Outcome::kUnderWay;
  };
  harness.Add(9, adapter(), MakePrompt(20, 9), 1);
  harness.RunToEnd();
  harness.Step();  // five pages are being written back
  harness.Add(1, adapter(), MakeLongRunningPrompt(adapter(), 15, 9, 1), 9);
  harness.Add(2, adapter(), on_host, 3);
  ASSERT_EQ(harness.Step().transfer_kinds.at(0), 1);
  load_outcome = Outcome::kFailed;
  harness.Step();  // request 2 loses its four pages, and request 1 takes one of them
  harness.Add(3, adapter(), MakePrompt(3, 3), 1);
  for (int step = 0; step < 3; ++step) EXPECT_EQ(harness.Step().request_ids, Ids{1});
  SetCopies(harness, Outcome::kDone);
  harness.Report();
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2, 3}));
  EXPECT_EQ(NumPreemptions(harness), 0);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTierPreemptionTest, WhoComesBackWithoutItsPagesMayTakeThoseOfNewerRequests) {
  // Request 2 is preempted, and its load fails just when request 1 needs another page: then only
  // the pages of request 3, which an outstanding plan has a row of, are enough.
  SchedulerOptions options = Options(12);
  options.adapter_time_slice_steps = 100;
  SchedulerHarness harness(options, Overlap::kOn);
  harness.OpenAndLoad(adapter());
  HoldLoadBacks(harness, Outcome::kUnderWay);
  const auto add = [&](std::int64_t id, AdapterId of, std::int32_t num_output_tokens) {
    harness.Add(id, of, MakeLongRunningPrompt(of, 8, num_output_tokens, static_cast<TokenId>(id)),
                num_output_tokens);
  };
  add(4, kBaseAdapter, 10);
  add(1, kBaseAdapter, 24);
  add(2, adapter(), 12);
  while (harness.num_load_backs() == 0) harness.Step();
  ASSERT_TRUE(harness.request(4).is_finished);
  harness.Add(3, kBaseAdapter, MakeLongRunningPrompt(kBaseAdapter, 6, 12, 3), 12);
  while (harness.request(1).newest_end() % 4 != 3) harness.Step();
  HoldLoadBacks(harness, Outcome::kFailed);
  ASSERT_EQ(harness.Step().request_ids, (Ids{1, 3}));
  ASSERT_EQ(harness.scheduler().Stats().num_transfers, 0);
  EXPECT_EQ(harness.Step().request_ids, Ids{1}) << "request 3 sits out";
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2}));
  EXPECT_EQ(NumPreemptions(harness), 2);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTierPreemptionTest, WhatAVictimComputedBehindPagesThatHaveArrivedSinceIsKept) {
  // Request 3 computes its whole prompt, and can publish nothing while its first pages are loaded
  // for request 2. They arrive just before it is preempted.
  SchedulerOptions options = Options(14);
  options.write_policy = WritePolicy::kWriteThrough;
  SchedulerHarness harness(options);
  harness.OpenAndLoad(adapter());
  const std::vector<TokenId> on_host = MakePrompt(13, 33);
  PutOnHost(harness, on_host);
  AddLong(harness, 1, 12);
  while (harness.request(1).output.size() < 8) harness.Step();
  HoldLoadBacks(harness, Outcome::kUnderWay);
  std::vector<TokenId> prompt(on_host.begin(), on_host.begin() + 12);
  for (TokenId token = 0; token < 11; ++token) prompt.push_back(500 + token);
  harness.Add(2, adapter(), on_host, 3);
  harness.Add(3, adapter(), prompt, 4, /*reuse_prefix=*/false);
  ASSERT_EQ(harness.Step().request_ids, (Ids{1, 3}));
  SetCopies(harness, Outcome::kDone);
  ASSERT_EQ(harness.Report(), 1);
  harness.Step();  // request 1 needs its fifth page
  ASSERT_EQ(NumPreemptions(harness), 1);
  while (harness.request(3).num_steps == 1) harness.Step();
  EXPECT_EQ(harness.request(3).newest_num_computed_tokens, 20);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerTierPreemptionTest, WhenOneVictimIsNotEnoughAnotherIsTaken) {
  // Eight requests of one page each need a second one, and each victim gives one.
  SchedulerOptions options = Options(8);
  options.max_num_seqs = 8;
  SchedulerHarness harness(options);
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 8; ++id) {
    harness.Add(id, adapter(), MakeLongRunningPrompt(adapter(), 4, 4, static_cast<TokenId>(id)), 4);
  }
  StepUntilPreemption(harness);
  EXPECT_EQ(NumPreemptions(harness), 4) << "four pages for the other four";
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2, 3, 4}));
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTierPreemptionTest, AFailedWriteBackIsRecomputedWithTheSameTokens) {
  SchedulerHarness harness(Options(8));
  harness.OpenAndLoad(adapter());
  SetCopies(harness, Outcome::kFailed);
  AddLong(harness, 1, 24);
  AddLong(harness, 2, 12);
  StepUntilPreemption(harness);
  SetCopies(harness, Outcome::kDone);
  while (!harness.request(1).is_finished) harness.Step();
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.request_ids, Ids{2});
  EXPECT_EQ(plan.num_computed_tokens, Ints{0});
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerTierPreemptionTest, ALoadingRequestGivesWayOnlyWhenNobodyElseCan) {
  for (const bool has_other_victim : {true, false}) {
    SchedulerOptions options = Options(has_other_victim ? 12 : 8);
    options.write_policy = WritePolicy::kWriteThrough;
    SchedulerHarness harness(options);
    harness.OpenAndLoad(adapter());
    const std::vector<TokenId> on_host = MakePrompt(13, 33);
    PutOnHost(harness, on_host);
    AddLong(harness, 1, 12);
    if (has_other_victim) AddLong(harness, 2, 12);
    while (harness.request(1).output.size() < 8) harness.Step();
    HoldLoadBacks(harness, Outcome::kUnderWay);
    harness.Add(3, adapter(), on_host, 3);
    ASSERT_EQ(harness.Step().transfer_kinds.at(0), 1);
    ASSERT_EQ(NumPreemptions(harness), 0);
    harness.Step();  // request 1 needs its fifth page
    EXPECT_EQ(NumPreemptions(harness), 1);
    SetCopies(harness, Outcome::kDone);
    harness.Report();
    const Ids next = harness.Step().request_ids;
    EXPECT_EQ(next, has_other_victim ? (Ids{1, 3}) : Ids{1}) << "the loading one was kept, or not";
    harness.RunToEnd();
    harness.ExpectRightOutputs();
    harness.ExpectNothingLeft();
  }
}

}  // namespace
}  // namespace lora_serve
