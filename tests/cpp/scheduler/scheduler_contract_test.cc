// What the façade refuses, and aborts at every point.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "common/errors.h"
#include "support/scheduler_harness.h"

namespace lora_serve {
namespace {

using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::RecordedPlan;
using testing::SchedulerHarness;

using Ids = std::vector<std::int64_t>;

constexpr SchedulerOptions kOptions = {.page_size = 4,
                                       .num_device_pages = 16,
                                       .max_num_seqs = 4,
                                       .max_num_batched_tokens = 16,
                                       .max_model_len = 32};

/// The message of the InvalidArgumentError that `call` throws.
std::string Refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgumentError& error) {
    return error.what();
  }
  return "nothing was refused";
}

TEST(SchedulerContractTest, RefusesOptionsOutOfRangeWithTheirNameAndNumbers) {
  const auto refusal = [](const std::function<void(SchedulerOptions&)>& change) {
    SchedulerOptions options = kOptions;
    change(options);
    return Refusal([&] { const Scheduler scheduler(options); });
  };
  EXPECT_NE(refusal([](auto& o) { o.page_size = 0; }).find("page_size is 0"), std::string::npos);
  EXPECT_NE(refusal([](auto& o) { o.max_num_seqs = 0; }).find("max_num_seqs is 0"),
            std::string::npos);
  EXPECT_NE(refusal([](auto& o) {
              o.max_num_batched_tokens = 3;
            }).find("max_num_batched_tokens is 3; expected at least 4"),
            std::string::npos);
  EXPECT_NE(refusal([](auto& o) { o.max_model_len = 1; }).find("max_model_len is 1"),
            std::string::npos);
  EXPECT_NE(refusal([](auto& o) { o.max_loras = 0; }).find("max_loras is 0"), std::string::npos);
  EXPECT_NE(refusal([](auto& o) {
              o.num_device_pages = 7;
            }).find("num_device_pages is 7; expected at least 8"),
            std::string::npos);
  EXPECT_EQ(refusal([](auto& o) { o.num_device_pages = 8; }), "nothing was refused");
  EXPECT_NE(refusal([](auto& o) { o.num_host_pages = -1; }).find("num_host_pages is -1"),
            std::string::npos);
  EXPECT_NE(refusal([](auto& o) {
              o.write_back_watermark_pages = -1;
            }).find("write_back_watermark_pages is -1"),
            std::string::npos);
}

TEST(SchedulerContractTest, RefusesBadRequestsAndChangesNothing) {
  Scheduler scheduler(kOptions);
  const auto add = [&](std::vector<TokenId> prompt, std::int32_t max_tokens,
                       std::int64_t adapter = 0) {
    scheduler.AddRequest({.request_id = RequestId(1),
                          .adapter_id = AdapterId(adapter),
                          .prompt_token_ids = std::move(prompt),
                          .max_tokens = max_tokens});
  };
  EXPECT_THROW(add({}, 1), InvalidArgumentError);
  EXPECT_THROW(add(MakePrompt(32), 1), InvalidArgumentError);
  EXPECT_THROW(add(MakePrompt(31), 2), InvalidArgumentError);
  EXPECT_THROW(add(MakePrompt(31), std::numeric_limits<std::int32_t>::max()), InvalidArgumentError);
  EXPECT_THROW(add({1}, 0), InvalidArgumentError);
  EXPECT_NE(Refusal([&] { add({1, 2, -1}, 1); }).find("token id -1 at prompt position 2"),
            std::string::npos);
  EXPECT_THROW(add({1}, 1, 9), AdapterNotFoundError);
  EXPECT_FALSE(scheduler.HasWork());
  EXPECT_EQ(scheduler.Stats().num_waiting_requests, 0);
  add(MakePrompt(31), 1);
  EXPECT_NE(Refusal([&] { add({1}, 1); }).find("request 1 is live already"), std::string::npos);
  EXPECT_EQ(scheduler.Stats().num_waiting_requests, 1);
  scheduler.CheckInvariants();
}

TEST(SchedulerContractTest, AnEmptyPlanTakesNoAdvance) {
  Scheduler scheduler(kOptions);
  for (std::int64_t now = 0; now < 3; ++now) {
    const ExecutionPlan& plan = scheduler.NextPlan(now);
    EXPECT_TRUE(plan.IsEmpty());
    EXPECT_EQ(PlanId(plan.plan_id), kNoPlan);
    EXPECT_EQ(RecordedPlan(plan).delta_offsets, std::vector<std::int32_t>{0});
  }
  EXPECT_THROW(scheduler.Advance({}), InvalidArgumentError);
  EXPECT_THROW(static_cast<void>(scheduler.NextPlan(1)), InternalError) << "the clock went back";
}

TEST(SchedulerContractTest, RefusesEventsThatDoNotAnswerThePlanAndChangesNothing) {
  Scheduler scheduler(kOptions);
  scheduler.OpenAdapter(AdapterId(5), {});
  scheduler.AddRequest(
      {.request_id = RequestId(1), .prompt_token_ids = MakePrompt(3, 1), .max_tokens = 4});
  scheduler.AddRequest(
      {.request_id = RequestId(2), .prompt_token_ids = MakePrompt(20, 2), .max_tokens = 4});
  const ExecutionPlan plan = scheduler.NextPlan(0);
  ASSERT_EQ(plan.samples_token, (std::vector<std::uint8_t>{1, 0}));
  ExecutionEvent good;
  good.plan_id = plan.plan_id;
  good.sampled_token_ids = {9, -1};
  good.is_finished = {0, 0};
  good.loaded_adapter_ids = {5};
  const auto refusal = [&](const std::function<void(ExecutionEvent&)>& change) {
    ExecutionEvent event = good;
    change(event);
    std::string message = Refusal([&] { scheduler.Advance(event); });
    scheduler.CheckInvariants();
    return message;
  };
  const auto expect_refusal = [&](const std::string& part,
                                  const std::function<void(ExecutionEvent&)>& change) {
    const std::string message = refusal(change);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect_refusal("while plan 0 is outstanding", [](auto& e) { e.plan_id = 1; });
  expect_refusal("3 entries in sampled_token_ids",
                 [](auto& e) { e.sampled_token_ids.push_back(1); });
  expect_refusal("1 entries in is_finished", [](auto& e) { e.is_finished.pop_back(); });
  expect_refusal("sampled token -1 in row 0", [](auto& e) { e.sampled_token_ids[0] = -1; });
  expect_refusal("sampled token 4 in row 1", [](auto& e) { e.sampled_token_ids[1] = 4; });
  expect_refusal("is_finished 2 in row 0", [](auto& e) { e.is_finished[0] = 2; });
  expect_refusal("is_finished 1 in row 1", [](auto& e) { e.is_finished[1] = 1; });
  expect_refusal("adapter 5 in failed_adapter_ids for the second time",
                 [](auto& e) { e.failed_adapter_ids = {5}; });
  expect_refusal("adapter 5 in loaded_adapter_ids for the second time",
                 [](auto& e) { e.loaded_adapter_ids = {5, 5}; });
  expect_refusal("adapter 6 in loaded_adapter_ids", [](auto& e) { e.loaded_adapter_ids = {6}; });
  expect_refusal("1 entries in is_finished", [](auto& e) {
    e = {};
    e.loaded_adapter_ids = {5};
    e.is_finished = {0};
  });
  scheduler.Advance(good);
  EXPECT_THROW(scheduler.Advance(good), InvalidArgumentError) << "an event returns once";
  EXPECT_EQ(scheduler.Stats().num_running_requests, 2);
}

TEST(SchedulerContractTest, ThePlanIsWrittenIntoTheCallersBuffers) {
  Scheduler scheduler(kOptions);
  scheduler.AddRequest(
      {.request_id = RequestId(1), .prompt_token_ids = MakePrompt(3), .max_tokens = 4});
  ExecutionPlan plan;
  plan.LayOut(
      {.num_groups = 1, .num_tokens = 7, .num_padded_tokens = 7});  // what an earlier step left
  plan.drained_adapter_ids = {4};
  scheduler.NextPlan(0, plan);
  EXPECT_EQ(RecordedPlan(plan).token_ids, MakePrompt(3));
  EXPECT_TRUE(plan.drained_adapter_ids.empty());
}

class SchedulerAbortTest : public ::testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override { harness_.OpenAndLoad(adapter()); }
  AdapterId adapter() const { return AdapterId(GetParam()); }
  SchedulerHarness harness_{kOptions};
};
INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, SchedulerAbortTest, ::testing::Values(0, 1));

TEST_P(SchedulerAbortTest, AQueuedRequestEndsAtOnce) {
  harness_.Add(1, adapter(), MakePrompt(5), 3);
  harness_.Abort(1);
  EXPECT_FALSE(harness_.scheduler().HasWork());
  harness_.Add(1, adapter(), MakePrompt(5), 3);  // the id is free again
  harness_.RunToEnd();
  harness_.ExpectRightOutputs();
}

TEST_P(SchedulerAbortTest, ARunningRequestEndsAtOnceBetweenSteps) {
  for (const std::int32_t num_prompt_tokens : {20, 5}) {  // in its prefill, and decoding
    harness_.Add(1, adapter(), MakePrompt(num_prompt_tokens), 3);
    harness_.Step();
    harness_.Abort(1);
    EXPECT_EQ(harness_.scheduler().Stats().num_running_requests, 0);
    EXPECT_EQ(harness_.scheduler().Stats().num_private_pages, 0);
    EXPECT_FALSE(harness_.scheduler().HasWork());
  }
}

TEST_P(SchedulerAbortTest, ARequestInsideThePlanKeepsItsPagesAndRowUntilAdvance) {
  harness_.Add(1, adapter(), MakePrompt(9), 3);
  harness_.Step([&] {
    harness_.Abort(1);
    EXPECT_EQ(harness_.scheduler().Stats().num_private_pages, 3);
    EXPECT_EQ(harness_.StatsOf(adapter()).num_running_requests, 1);
    EXPECT_THROW(harness_.Add(1, adapter(), MakePrompt(9), 3), InvalidArgumentError);
  });
  EXPECT_TRUE(harness_.request(1).output.empty());
  EXPECT_EQ(harness_.scheduler().Stats().num_private_pages, 0);
  EXPECT_FALSE(harness_.scheduler().HasWork());
  harness_.Add(2, adapter(), MakePrompt(9), 3);
  EXPECT_EQ(harness_.Step().num_cached_tokens, std::vector<std::int32_t>{8})
      << "what the plan computed was published";
  harness_.RunToEnd();
  harness_.ExpectRightOutputs();
}

TEST_P(SchedulerAbortTest, TheLastAbortOfADrainingAdapterCompletesTheDrain) {
  const AdapterId draining(7);
  harness_.OpenAndLoad(draining);
  harness_.Add(1, draining, MakePrompt(9), 3);
  harness_.Step([&] {
    harness_.scheduler().DrainAdapter(draining);
    harness_.Abort(1);
  });
  EXPECT_EQ(harness_.Step().drained_adapter_ids, Ids{7});
  EXPECT_EQ(harness_.scheduler().Stats().num_free_pages, 16);
}

TEST_P(SchedulerAbortTest, APreemptedRequestEndsAtOnce) {
  for (std::int64_t id = 1; id <= 3; ++id) {
    harness_.Add(id, adapter(), MakeLongRunningPrompt(adapter(), 15, 16, static_cast<TokenId>(id)),
                 16);
  }
  while (harness_.scheduler().Stats().num_preempted_requests == 0) harness_.Step();
  harness_.Abort(3);
  EXPECT_EQ(harness_.scheduler().Stats().num_preempted_requests, 0);
  harness_.RunToEnd();
  harness_.ExpectRightOutputs();
  harness_.ExpectNothingLeft();
}

TEST_P(SchedulerAbortTest, AnUnknownOrFinishedRequestIsALateAbort) {
  EXPECT_FALSE(harness_.scheduler().Abort(RequestId(4)));
  harness_.Add(1, adapter(), MakePrompt(5), 1);
  harness_.RunToEnd();
  EXPECT_FALSE(harness_.scheduler().Abort(RequestId(1)));
}

}  // namespace
}  // namespace lora_serve
