// PITFALLS 20 to 22: nobody starves, nobody takes turns in preempting the other, and the order that
// a policy asks for is the order in which requests run.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::AllScenarios;
using testing::MakePrompt;
using testing::Overlap;
using testing::RecordedPlan;
using testing::ScenarioName;
using testing::SchedulerHarness;
using testing::TrackedRequest;

using Ids = std::vector<std::int64_t>;

class PitfallsFairnessTest : public testing::SchedulerScenarioTest {};
INSTANTIATE_TEST_SUITE_P(All, PitfallsFairnessTest, AllScenarios(), ScenarioName);

// PITFALLS 20
TEST_P(PitfallsFairnessTest, WithTwiceAsManyBusyAdaptersAsPlacesEachHasItsTurnAgainAndAgain) {
  constexpr std::int32_t kNumPlaces = 3;
  constexpr std::int32_t kNumAdapters = 6;
  constexpr std::int32_t kMaxTokens = 4;
  SchedulerHarness harness({.page_size = 4,
                            .num_device_pages = 128,
                            .max_num_seqs = 12,
                            .max_num_batched_tokens = 64,
                            .max_model_len = 32,
                            .max_loras = kNumPlaces},
                           overlap());
  std::vector<AdapterId> busy;
  for (std::int64_t id = 1; id <= kNumAdapters; ++id) busy.emplace_back(id);
  for (const AdapterId id : busy) harness.OpenAndLoad(id);
  if (IsBase()) busy.push_back(kBaseAdapter);
  std::int64_t next_id = 0;
  std::map<AdapterId, std::int64_t> num_live;
  std::map<AdapterId, std::int64_t> newest_start;
  std::int64_t longest_pause = 0;
  for (int step = 0; step < 600; ++step) {
    num_live.clear();
    for (const std::int64_t id : harness.live_requests()) ++num_live[harness.request(id).adapter];
    for (const AdapterId id : busy) {
      for (; num_live[id] < 2; ++num_live[id]) {
        harness.Add(next_id, id, MakePrompt(3, static_cast<TokenId>(next_id)), kMaxTokens);
        ++next_id;
      }
    }
    const RecordedPlan plan = harness.Step();
    for (const std::int64_t id : plan.request_ids) {
      const TrackedRequest& request = harness.request(id);
      if (request.num_steps > 1) continue;
      std::int64_t& newest = newest_start[request.adapter];
      longest_pause = std::max(longest_pause, harness.num_steps() - newest);
      newest = harness.num_steps();
    }
  }
  EXPECT_EQ(newest_start.size(), busy.size());
  // The line moves on by all places at once when their turns have ended, and two moves bring
  // everybody in.
  const std::int64_t turn = 2 * (1 + kMaxTokens) + 2;
  EXPECT_LE(longest_pause, 2 * turn);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

/// Two requests of 8 + 12 tokens in 8 pages of 4: each alone needs 5 in the end.
constexpr SchedulerOptions kSmallPool = {
    .page_size = 4, .num_device_pages = 8, .max_num_batched_tokens = 128, .max_model_len = 32};

// PITFALLS 21
TEST_P(PitfallsFairnessTest, TwoRequestsThatDoNotFitTogetherDoNotPreemptEachOtherInTurns) {
  SchedulerHarness harness(kSmallPool, overlap());
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 2; ++id) {
    harness.Add(id, adapter(), LongRunningPrompt(8, 12, static_cast<TokenId>(id)), 12);
  }
  harness.RunToEnd(60);
  EXPECT_EQ(harness.scheduler().Counters().total_preemptions, 1);
  EXPECT_LT(harness.request(1).num_steps, 14) << "the elder was held up";
  harness.ExpectRightOutputs();
  harness.ExpectNothingLeft();
}

// PITFALLS 21
TEST_P(PitfallsFairnessTest, APreemptedRequestReturnsBeforeWorkThatNeverStopsToArrive) {
  SchedulerHarness harness(kSmallPool, overlap());
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 2; ++id) {
    harness.Add(id, adapter(), LongRunningPrompt(8, 12, static_cast<TokenId>(id)), 12);
  }
  while (harness.scheduler().Counters().total_preemptions == 0) harness.Step();
  const std::int64_t num_steps_at_preemption = harness.request(2).num_steps;
  std::int64_t next_id = 100;
  for (int step = 0; !harness.request(1).is_finished; ++step) {
    ASSERT_LT(step, 20);
    harness.Add(next_id, adapter(), MakePrompt(7, static_cast<TokenId>(next_id)), 8);
    ++next_id;
    harness.Step();
  }
  for (int step = 0; harness.request(2).num_steps == num_steps_at_preemption; ++step) {
    ASSERT_LT(step, 20) << "the preempted request starves";
    harness.Add(next_id, adapter(), MakePrompt(7, static_cast<TokenId>(next_id)), 8);
    ++next_id;
    harness.Step();
  }
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

/// Runs one request at a time; returns their ids in the order in which they started.
Ids OrderOfStarts(SchedulerHarness& harness) {
  while (!harness.live_requests().empty()) harness.Step();
  harness.AdvanceAll();
  std::map<std::int64_t, std::int64_t> by_start;
  for (const auto& [id, request] : harness.requests()) {
    if (id < 1000) by_start[request.first_step] = id;
  }
  Ids ids;
  for (const auto& [start, id] : by_start) ids.push_back(id);
  return ids;
}

SchedulerOptions OneAtATime(SchedulingPolicy policy) {
  return {.page_size = 4,
          .num_device_pages = 64,
          .max_num_seqs = 1,
          .max_num_batched_tokens = 64,
          .max_model_len = 64,
          .scheduling_policy = policy};
}

// PITFALLS 22
TEST_P(PitfallsFairnessTest, InOrderOfArrivalMeansThatAndNotInOrderOfIds) {
  SchedulerHarness harness(OneAtATime(SchedulingPolicy::kFcfs), overlap());
  harness.OpenAndLoad(adapter());
  const Ids arrivals = {7, 3, 9, 1, 8};
  for (const std::int64_t id : arrivals) {
    harness.Add(id, id == 9 ? kBaseAdapter : adapter(), MakePrompt(5, static_cast<TokenId>(id)), 2);
  }
  EXPECT_EQ(OrderOfStarts(harness), arrivals);
  harness.ExpectRightOutputs();
}

// PITFALLS 22
TEST_P(PitfallsFairnessTest, TheLongestCachedPrefixFirstMeansThatAndNotInOrderOfArrival) {
  SchedulerHarness harness(OneAtATime(SchedulingPolicy::kLpm), overlap());
  harness.OpenAndLoad(adapter());
  const std::vector<TokenId> prompt = MakePrompt(24, 1);
  harness.Add(1000, adapter(), prompt, 1);
  harness.RunToEnd();
  const auto add = [&](std::int64_t id, std::size_t num_shared) {
    std::vector<TokenId> tokens(prompt.begin(),
                                prompt.begin() + static_cast<std::ptrdiff_t>(num_shared));
    const std::vector<TokenId> own = MakePrompt(4, static_cast<TokenId>(100 + id));
    tokens.insert(tokens.end(), own.begin(), own.end());
    harness.Add(id, adapter(), std::move(tokens), 2);
  };
  add(1, 0);
  add(2, 8);
  add(3, 16);
  add(4, 20);
  add(5, 4);
  EXPECT_EQ(OrderOfStarts(harness), (Ids{4, 3, 2, 5, 1}));
  harness.ExpectRightOutputs();
}

// PITFALLS 22
TEST_P(PitfallsFairnessTest, PriorityGoesBeforeArrivalUnderEveryPolicy) {
  for (const SchedulingPolicy policy :
       {SchedulingPolicy::kFair, SchedulingPolicy::kFcfs, SchedulingPolicy::kLpm}) {
    SchedulerHarness harness(OneAtATime(policy), overlap());
    harness.OpenAndLoad(adapter());
    for (const std::int64_t id : {1, 2, 3, 4}) {
      harness.Add({.request_id = RequestId(id),
                   .adapter_id = adapter(),
                   .prompt_token_ids = MakePrompt(5, static_cast<TokenId>(id)),
                   .max_tokens = 2,
                   .priority = static_cast<std::int32_t>(4 - id) / 2});
    }
    EXPECT_EQ(OrderOfStarts(harness), (Ids{3, 4, 1, 2}));
    harness.ExpectRightOutputs();
  }
}

// PITFALLS 22
TEST_P(PitfallsFairnessTest, TheFairOrderGoesByTokensAndNotByArrival) {
  SchedulerHarness harness(OneAtATime(SchedulingPolicy::kFair), overlap());
  const AdapterId other(5);
  for (const AdapterId id : {adapter(), other}) harness.OpenAndLoad(id);
  for (std::int64_t id = 1; id <= 3; ++id) {
    harness.Add(id, adapter(), LongRunningPrompt(5, 3, static_cast<TokenId>(id)), 3);
  }
  harness.Add(4, other, testing::MakeLongRunningPrompt(other, 40, 3, 4), 3);
  for (std::int64_t id = 5; id <= 6; ++id) harness.Add(id, other, MakePrompt(5, 6), 3);
  EXPECT_EQ(OrderOfStarts(harness), (Ids{1, 4, 2, 3, 5, 6}))
      << "after its long prompt the other one waits until both have had as much";
  harness.ExpectRightOutputs();
}

}  // namespace
}  // namespace lora_serve
