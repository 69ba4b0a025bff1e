// What is refused when much waits, priorities, deadlines, and what is counted.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/errors.h"
#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::AllScenarios;
using testing::MakePrompt;
using testing::RecordedPlan;
using testing::ScenarioName;
using testing::SchedulerHarness;

using Ids = std::vector<std::int64_t>;

class SchedulerLimitsTest : public testing::SchedulerScenarioTest {
 protected:
  static SchedulerOptions Options(std::int32_t max_num_seqs) {
    return {.page_size = 4,
            .num_device_pages = 32,
            .max_num_seqs = max_num_seqs,
            .max_num_batched_tokens = 64,
            .max_model_len = 64};
  }
  /// Refused, with the name of the limit and the numbers, and nothing is changed.
  static void ExpectRefused(SchedulerHarness& harness, std::int32_t num_prompt_tokens,
                            const std::string& part) {
    const SchedulerCounters before = harness.scheduler().Counters();
    try {
      harness.Add(99, adapter(), MakePrompt(num_prompt_tokens), 1);
      ADD_FAILURE() << "nothing was refused; expected " << part;
    } catch (const CapacityError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
    const SchedulerCounters after = harness.scheduler().Counters();
    EXPECT_EQ(after.num_queued_requests, before.num_queued_requests);
    EXPECT_EQ(after.num_queued_tokens, before.num_queued_tokens);
    EXPECT_EQ(after.total_rejected_requests, before.total_rejected_requests + 1);
    harness.scheduler().CheckInvariants();
  }
  static NewRequest Request(std::int64_t id, std::int32_t max_tokens) {
    return {.request_id = RequestId(id),
            .adapter_id = adapter(),
            .prompt_token_ids = LongRunningPrompt(4, max_tokens, static_cast<TokenId>(id)),
            .max_tokens = max_tokens};
  }
};
INSTANTIATE_TEST_SUITE_P(All, SchedulerLimitsTest, AllScenarios(), ScenarioName);

TEST_P(SchedulerLimitsTest, AFullQueueRefusesAndWhatRunsDoesNotCount) {
  SchedulerOptions options = Options(1);
  options.max_queued_requests = 2;
  SchedulerHarness harness(options, overlap());
  harness.OpenAndLoad(adapter());
  harness.Add(Request(1, 3));
  harness.Step();
  for (std::int64_t id = 2; id <= 3; ++id) harness.Add(Request(id, 3));
  ExpectRefused(harness, 1, "3 queued requests; max_queued_requests is 2");
  while (harness.request(2).num_steps == 0) harness.Step();
  harness.Add(Request(4, 3));
  harness.RunToEnd();
  harness.ExpectRightOutputs();
  harness.ExpectCountersAgree();
}

TEST_P(SchedulerLimitsTest, TooManyQueuedTokensAreRefusedButNotOneThatWaitsAlone) {
  SchedulerOptions options = Options(4);
  options.max_queued_tokens = 20;
  SchedulerHarness harness(options, overlap());
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), MakePrompt(30), 1);
  ExpectRefused(harness, 1, "31 queued prompt tokens; max_queued_tokens is 20");
  harness.Step();
  harness.Add(2, adapter(), MakePrompt(12, 2), 1);
  harness.Add(3, adapter(), MakePrompt(8, 3), 1);
  EXPECT_EQ(harness.scheduler().Counters().num_queued_tokens, 20);
  ExpectRefused(harness, 1, "21 queued prompt tokens");
  harness.Abort(3);
  harness.Add(4, adapter(), MakePrompt(8, 4), 1);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerLimitsTest, OneAdapterMayNotHaveMoreThanItsShareOfLiveRequests) {
  SchedulerOptions options = Options(1);
  options.max_requests_per_adapter = 2;
  SchedulerHarness harness(options, overlap());
  const AdapterId other(5);
  for (const AdapterId id : {adapter(), other}) harness.OpenAndLoad(id);
  harness.Add(Request(1, 3));
  harness.Step();
  harness.Add(Request(2, 3));
  ExpectRefused(harness, 1, "3 live requests of adapter " + std::to_string(adapter().value()));
  harness.Add(3, other, MakePrompt(3), 2);
  harness.RunToEnd();
  harness.Add(Request(4, 3));
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerLimitsTest, RequestsAddedTogetherAreAllTakenOrAllRefusedAndNoneIsAborted) {
  struct Limit {
    std::int32_t num_queued = 0;
    std::int64_t num_tokens = 0;
    std::int32_t num_of_adapter = 0;
    const char* message;
  };
  for (const Limit& limit : {Limit{.num_queued = 3, .message = "4 queued requests"},
                             Limit{.num_tokens = 12, .message = "16 queued prompt tokens"},
                             Limit{.num_of_adapter = 3, .message = "4 live requests of adapter"}}) {
    SchedulerOptions options = Options(4);
    options.max_queued_requests = limit.num_queued;
    options.max_queued_tokens = limit.num_tokens;
    options.max_requests_per_adapter = limit.num_of_adapter;
    SchedulerHarness harness(options, overlap());
    harness.OpenAndLoad(adapter());
    harness.Add(Request(1, 3));
    try {
      harness.AddTogether({Request(2, 3), Request(3, 3), Request(4, 3)});
      ADD_FAILURE() << "nothing was refused; expected " << limit.message;
    } catch (const CapacityError& error) {
      EXPECT_NE(std::string(error.what()).find(limit.message), std::string::npos) << error.what();
    }
    const SchedulerCounters counters = harness.scheduler().Counters();
    EXPECT_EQ(counters.num_queued_requests, 1);
    EXPECT_EQ(counters.total_rejected_requests, 3);
    EXPECT_EQ(counters.total_aborted_requests, 0);
    harness.AddTogether({Request(2, 3), Request(3, 3)});
    harness.RunToEndAndCheck();
  }
}

TEST_P(SchedulerLimitsTest, OfRequestsAddedTogetherNoneIsTakenWhenOneIsWrong) {
  SchedulerHarness harness(Options(4), overlap());
  harness.OpenAndLoad(adapter());
  NewRequest of_nobody = Request(3, 3);
  of_nobody.adapter_id = AdapterId(77);
  NewRequest of_no_tokens = Request(3, 3);
  of_no_tokens.max_tokens = 0;
  EXPECT_THROW(harness.AddTogether({Request(2, 3), of_nobody}), AdapterNotFoundError);
  EXPECT_THROW(harness.AddTogether({Request(2, 3), of_no_tokens}), InvalidArgumentError);
  EXPECT_THROW(harness.AddTogether({Request(2, 3), Request(2, 3)}), InvalidArgumentError);
  harness.AddTogether({});
  EXPECT_EQ(harness.scheduler().Counters().num_queued_requests, 0);
  EXPECT_FALSE(harness.scheduler().HasWork());
  harness.AddTogether({Request(2, 3), Request(3, 3)});
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerLimitsTest, AQueuedRequestWhoseDeadlinePassesEndsInThatPlan) {
  SchedulerHarness harness(Options(1), overlap());
  harness.OpenAndLoad(adapter());
  NewRequest running = Request(1, 30);
  running.deadline_us = harness.now_us() + 5;
  harness.Add(running);
  harness.Step();
  NewRequest in_time = Request(2, 2);
  in_time.deadline_us = harness.now_us() + 100'000;
  harness.Add(in_time);
  NewRequest late = Request(3, 2);
  late.deadline_us = harness.now_us() + 5;
  harness.Add(late);
  for (int step = 1; step <= 4; ++step) {
    EXPECT_TRUE(harness.Step().expired_request_ids.empty()) << "step " << step;
  }
  EXPECT_EQ(harness.Step().expired_request_ids, Ids{3});
  EXPECT_FALSE(harness.scheduler().Abort(RequestId(3)));
  harness.Add(3, adapter(), MakePrompt(3), 1);  // the id is free
  harness.RunToEnd();
  EXPECT_TRUE(harness.request(1).is_finished) << "it had started";
  EXPECT_TRUE(harness.request(2).is_finished);
  harness.ExpectRightOutputs();
  EXPECT_EQ(harness.scheduler().Counters().total_expired_requests, 1);
}

TEST_P(SchedulerLimitsTest, AnEmptyPlanMayListRequestsThatExpired) {
  SchedulerHarness harness(Options(1), overlap());
  harness.OpenAndLoad(adapter());
  NewRequest request = Request(1, 3);
  request.deadline_us = 0;
  harness.Add(request);
  const RecordedPlan plan = harness.Step();
  EXPECT_TRUE(plan.IsEmpty());
  EXPECT_EQ(plan.expired_request_ids, Ids{1});
  EXPECT_FALSE(harness.scheduler().HasWork());
  harness.ExpectNothingLeft();
}

TEST_P(SchedulerLimitsTest, APreemptedRequestDoesNotExpire) {
  SchedulerOptions options = Options(4);
  options.num_device_pages = 8;
  options.max_model_len = 32;
  SchedulerHarness harness(options, overlap());
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 2; ++id) {
    harness.Add({.request_id = RequestId(id),
                 .adapter_id = adapter(),
                 .prompt_token_ids = LongRunningPrompt(8, 12, static_cast<TokenId>(id)),
                 .max_tokens = 12,
                 .deadline_us = harness.now_us() + 3});
  }
  while (harness.scheduler().Counters().total_preemptions == 0) harness.Step();
  harness.RunToEnd();
  EXPECT_TRUE(harness.request(2).is_finished);
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerLimitsTest, WaitingCountsAsMuchAsAClassOfPriorityAlsoAmongAdapters) {
  const AdapterId other(5);
  for (const SchedulingPolicy policy :
       {SchedulingPolicy::kFair, SchedulingPolicy::kFcfs, SchedulingPolicy::kLpm}) {
    for (const AdapterId better : {adapter(), other}) {
      SchedulerOptions options = Options(1);
      options.scheduling_policy = policy;
      options.priority_ageing_us = 1000;
      SchedulerHarness harness(options, overlap());
      for (const AdapterId id : {adapter(), other}) harness.OpenAndLoad(id);
      harness.Add(1, better, testing::MakeLongRunningPrompt(better, 4, 6, 1), 6);
      harness.Step();
      NewRequest low = Request(2, 2);
      low.priority = 3;
      harness.Add(low);
      harness.AdvanceClock(2500);  // not enough yet for three classes
      harness.Step();
      harness.Add(3, better, MakePrompt(4, 3), 2);
      while (harness.request(3).num_steps == 0) harness.Step();
      EXPECT_EQ(harness.request(2).num_steps, 0);
      harness.AdvanceClock(1000);
      harness.Step();
      harness.Add(4, better, MakePrompt(4, 4), 2);
      harness.RunToEnd();
      EXPECT_LT(harness.request(2).first_step, harness.request(4).first_step)
          << "policy " << static_cast<int>(policy) << ", adapter " << better;
      harness.ExpectRightOutputs();
    }
  }
}

TEST_P(SchedulerLimitsTest, TheArrivalMayBeToldAndMakesARequestOlder) {
  SchedulerOptions options = Options(1);
  options.scheduling_policy = SchedulingPolicy::kFcfs;
  SchedulerHarness harness(options, overlap());
  harness.OpenAndLoad(adapter());
  harness.AdvanceClock(1000);
  harness.Step();
  harness.Add(Request(1, 2));
  NewRequest older = Request(2, 2);
  older.arrival_us = 500;
  harness.Add(older);
  harness.RunToEnd();
  EXPECT_LT(harness.request(2).first_step, harness.request(1).first_step);
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerLimitsTest, WhatRunsAndWaitsIsCounted) {
  SchedulerHarness harness(Options(2), overlap());
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 3; ++id) harness.Add(Request(id, 3));
  SchedulerCounters counters = harness.scheduler().Counters();
  EXPECT_EQ(counters.num_queued_requests, 3);
  EXPECT_EQ(counters.num_queued_tokens, 12);
  harness.AdvanceClock(100);
  harness.Step();
  counters = harness.scheduler().Counters();
  EXPECT_EQ(counters.num_queued_requests, 1);
  EXPECT_EQ(counters.num_running_requests, 2);
  EXPECT_EQ(counters.total_prefill_rows, 2);
  EXPECT_EQ(counters.total_prefill_tokens, 8);
  EXPECT_EQ(counters.total_started_requests, 2);
  EXPECT_EQ(counters.total_queue_us, 2 * 101);
  EXPECT_EQ(counters.total_step_adapters, IsBase() ? 0 : 1);
  const AdapterStats stats = harness.StatsOf(adapter());
  EXPECT_EQ(stats.num_waiting_requests, 1);
  EXPECT_EQ(stats.num_running_requests, 2);
  EXPECT_EQ(stats.num_started_requests, 2);
  EXPECT_EQ(stats.num_scheduled_tokens, 8);
  EXPECT_EQ(stats.total_queue_us, 2 * 101);
  harness.RunToEnd();
  EXPECT_EQ(harness.scheduler().Counters().total_decode_rows, 3 * 2);
  EXPECT_EQ(harness.StatsOf(adapter()).num_scheduled_tokens, 3 * (4 + 2));
  harness.ExpectCountersAgree();
  harness.ExpectRightOutputs();
}

}  // namespace
}  // namespace lora_serve
