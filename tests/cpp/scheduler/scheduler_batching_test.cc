// Continuous batching, chunked prefill, the prefix cache and the page table, as the façade shows
// them.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "support/scheduler_harness.h"

namespace lora_serve {
namespace {

using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::OracleExecutor;
using testing::RecordedPlan;
using testing::SchedulerHarness;

constexpr AdapterId kAdapter{1};
constexpr AdapterId kOtherAdapter{2};

/// Every scenario runs for the base model and for an adapter.
class SchedulerBatchingTest : public ::testing::TestWithParam<std::int64_t> {
 protected:
  AdapterId adapter() const { return AdapterId(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, SchedulerBatchingTest, ::testing::Values(0, 1));

using Ints = std::vector<std::int32_t>;
using Ids = std::vector<std::int64_t>;

TEST_P(SchedulerBatchingTest, PrefillChunksFillTheBudgetThatDecodesLeave) {
  SchedulerHarness harness({.page_size = 4,
                            .num_device_pages = 32,
                            .max_num_seqs = 4,
                            .max_num_batched_tokens = 8,
                            .max_model_len = 64});
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), MakePrompt(5, 1), 6);
  harness.Add(2, adapter(), MakePrompt(13, 2), 2);
  harness.Add(3, adapter(), MakePrompt(2, 3), 2);
  RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.request_ids, (Ids{1, 2}));
  EXPECT_EQ(plan.num_scheduled_tokens, (Ints{5, 3}));
  EXPECT_EQ(plan.samples_token, (std::vector<std::uint8_t>{1, 0}));
  plan = harness.Step();
  EXPECT_EQ(plan.request_ids, (Ids{1, 2}));
  EXPECT_EQ(plan.num_scheduled_tokens, (Ints{1, 7}));
  EXPECT_EQ(plan.num_computed_tokens, (Ints{5, 3}));
  plan = harness.Step();
  EXPECT_EQ(plan.request_ids, (Ids{1, 2, 3}));
  EXPECT_EQ(plan.num_scheduled_tokens, (Ints{1, 3, 2}));
  plan = harness.Step();
  EXPECT_EQ(plan.num_scheduled_tokens, (Ints{1, 1, 1})) << "decodes, in the order of admission";
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerBatchingTest, AtMostMaxNumSeqsRequestsRunAndTheRestFollowInOrder) {
  SchedulerHarness harness(
      {.page_size = 4, .num_device_pages = 32, .max_num_seqs = 2, .max_model_len = 16});
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 4; ++id) {
    harness.Add(id, adapter(), MakePrompt(3, static_cast<TokenId>(id)),
                1 + static_cast<std::int32_t>(id % 2));
  }
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 2}));  // 2 ends with its first token
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 3}));
  EXPECT_EQ(harness.Step().request_ids, (Ids{3, 4}));
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerBatchingTest, AFullyCachedPromptRecomputesOnlyTheTokensAfterItsLastUsablePage) {
  SchedulerHarness harness({.page_size = 4, .num_device_pages = 32, .max_model_len = 64});
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), MakePrompt(12), 1);
  harness.RunToEnd();
  harness.Add(2, adapter(), MakePrompt(12), 1);
  const RecordedPlan plan = harness.Step();
  EXPECT_EQ(plan.num_cached_tokens, Ints{8}) << "the page of the last token is computed again";
  EXPECT_EQ(plan.num_scheduled_tokens, Ints{4});
  harness.Add(3, adapter(), MakePrompt(13), 1);
  EXPECT_EQ(harness.Step().num_cached_tokens, Ints{12});
  harness.ExpectRightOutputs();
  const SchedulerStats stats = harness.scheduler().Stats();
  EXPECT_EQ(stats.total_queried_tokens, 12 + 12 + 13);
  EXPECT_EQ(stats.total_hit_tokens, 8 + 12);
}

TEST_P(SchedulerBatchingTest, OutputIsCachedButItsLastTokenIsNot) {
  SchedulerHarness harness({.page_size = 2, .num_device_pages = 32, .max_model_len = 64});
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), MakePrompt(3), 3);
  harness.RunToEnd();
  ASSERT_EQ(harness.request(1).output.size(), 3U);
  // Computed: 3 prompt tokens and 2 of the output; the third was sampled, and never computed.
  EXPECT_EQ(harness.scheduler().Stats().num_tree_pages, 2);
  std::vector<TokenId> prompt = MakePrompt(3);
  prompt.insert(prompt.end(), harness.request(1).output.begin(), harness.request(1).output.end());
  prompt.push_back(77);
  harness.Add(2, adapter(), prompt, 2);
  EXPECT_EQ(harness.Step().num_cached_tokens, Ints{4});
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerBatchingTest, ARequestWithoutReuseComputesEveryPromptPosition) {
  SchedulerHarness harness({.page_size = 4, .num_device_pages = 32, .max_model_len = 64});
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 2; ++id) {
    harness.Add(id, adapter(), MakePrompt(12), 1, /*reuse_prefix=*/false);
    EXPECT_EQ(harness.Step().num_cached_tokens, Ints{0});
  }
  harness.Add(3, adapter(), MakePrompt(12), 1);
  EXPECT_EQ(harness.Step().num_cached_tokens, Ints{8}) << "others may still start from its pages";
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerBatchingTest, WithPrefixCachingOffNoRequestStartsFromAnother) {
  SchedulerHarness harness({.page_size = 4,
                            .num_device_pages = 32,
                            .max_model_len = 64,
                            .enable_prefix_caching = false});
  harness.OpenAndLoad(adapter());
  for (std::int64_t id = 1; id <= 2; ++id) {
    harness.Add(id, adapter(), MakePrompt(12), 1);
    EXPECT_EQ(harness.Step().num_cached_tokens, Ints{0});
  }
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerBatchingTest, EveryChunkIsPublishedUnderItsOwnAdapterAndServesNoOther) {
  SchedulerHarness harness({.page_size = 4,
                            .num_device_pages = 64,
                            .max_num_seqs = 4,
                            .max_num_batched_tokens = 8,
                            .max_model_len = 64});
  for (const AdapterId id : {kAdapter, kOtherAdapter}) harness.OpenAndLoad(id);
  harness.Add(1, adapter(), MakePrompt(21), 2);  // 3 chunks
  harness.RunToEnd();
  EXPECT_EQ(harness.StatsOf(adapter()).num_tree_pages, 5);
  std::int64_t id = 2;
  for (const AdapterId other : {kBaseAdapter, kAdapter, kOtherAdapter}) {
    harness.Add(id, other, MakePrompt(21), 2);
    harness.RunToEnd();
    EXPECT_EQ(harness.request(id).num_cached_tokens, other == adapter() ? 20 : 0)
        << "adapter " << other;
    ++id;
  }
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerBatchingTest, ADecodeStepCarriesNothingThatGrowsWithTheContext) {
  for (const std::int32_t context : {32, 4096}) {
    SchedulerHarness harness({.page_size = 16,
                              .num_device_pages = 300,
                              .max_num_batched_tokens = 8192,
                              .max_model_len = 4800});
    harness.OpenAndLoad(adapter());
    harness.Add(1, adapter(), MakeLongRunningPrompt(adapter(), context, 20, 1), 20);
    const RecordedPlan first = harness.Step();
    EXPECT_EQ(first.delta_starts, Ints{0});
    EXPECT_EQ(first.delta_pages.size(), static_cast<std::size_t>(context / 16));
    for (std::int32_t step = 0; step < 19; ++step) {
      const RecordedPlan plan = harness.Step();
      const bool needs_page = step % 16 == 0;
      EXPECT_EQ(plan.token_ids.size(), 1U);
      EXPECT_EQ(plan.delta_rows.size(), needs_page ? 1U : 0U);
      EXPECT_EQ(plan.delta_offsets, needs_page ? (Ints{0, 1}) : Ints{0});
      EXPECT_EQ(plan.delta_pages.size(), needs_page ? 1U : 0U);
      if (needs_page) {
        EXPECT_EQ(plan.delta_starts, Ints{(context + step) / 16});
      }
    }
    harness.ExpectRightOutputs();
  }
}

TEST_P(SchedulerBatchingTest, ASmallRequestOvertakesOneThatLacksPages) {
  SchedulerHarness harness({.page_size = 4, .num_device_pages = 8, .max_model_len = 32});
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), MakePrompt(16, 1), 8);
  harness.Step();
  harness.Add(2, adapter(), MakePrompt(20, 2), 4);  // 5 pages, 4 are left
  harness.Add(3, kBaseAdapter, MakePrompt(4, 3), 1);
  EXPECT_EQ(harness.Step().request_ids, (Ids{1, 3}));
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerBatchingTest, ARequestThatLacksPagesIsOvertakenABoundedNumberOfTimes) {
  SchedulerHarness harness({.page_size = 4, .num_device_pages = 64, .max_model_len = 256});
  harness.OpenAndLoad(adapter());
  // A stream of small requests, so dense that 64 pages are never free at once.
  std::int64_t next_id = 1000;
  const auto add_small = [&] {
    harness.Add(next_id, kBaseAdapter, MakePrompt(4, static_cast<TokenId>(next_id)), 12);
    ++next_id;
  };
  for (int count = 0; count < 8; ++count) add_small();
  harness.Step();
  harness.Add(1, adapter(), MakePrompt(250, 1), 2);
  std::ptrdiff_t num_overtakers = 0;
  for (std::int32_t step = 0; harness.request(1).num_steps == 0; ++step) {
    ASSERT_LT(step, 100) << "the large request starves";
    add_small();
    const RecordedPlan plan = harness.Step();
    if (harness.request(1).num_steps > 0) break;
    num_overtakers +=
        std::count(plan.num_computed_tokens.begin(), plan.num_computed_tokens.end(), 0);
  }
  EXPECT_EQ(num_overtakers, 16);
  harness.RunToEnd();
  harness.ExpectRightOutputs();
}

TEST_P(SchedulerBatchingTest, AStopTokenEndsARequestBeforeMaxTokens) {
  SchedulerHarness harness({.page_size = 4, .num_device_pages = 64, .max_model_len = 256});
  harness.OpenAndLoad(adapter());
  TokenId seed = 0;
  while (OracleExecutor::RunAlone(adapter(), MakePrompt(5, seed), 200).size() > 30) ++seed;
  harness.Add(1, adapter(), MakePrompt(5, seed), 200);
  harness.RunToEnd(40);
  EXPECT_TRUE(harness.request(1).is_finished);
  harness.ExpectRightOutputs();
  harness.ExpectNothingLeft();
}

}  // namespace
}  // namespace lora_serve
