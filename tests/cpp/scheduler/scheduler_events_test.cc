// Events of the cache, with the generation whose pages they are about.
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kv_prefix_cache/event_log.h"
#include "support/scheduler_harness.h"
#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::AllScenarios;
using testing::MakePrompt;
using testing::ScenarioName;
using testing::SchedulerHarness;
using testing::SchedulerScenarioTest;

constexpr SchedulerOptions kOptions = {.page_size = 4,
                                       .num_device_pages = 16,
                                       .max_num_seqs = 4,
                                       .max_num_batched_tokens = 64,
                                       .max_model_len = 32};
constexpr std::uint64_t kSeed = 77;

class SchedulerEventsTest : public SchedulerScenarioTest {};
INSTANTIATE_TEST_SUITE_P(Scenarios, SchedulerEventsTest, AllScenarios(), ScenarioName);

TEST_P(SchedulerEventsTest, StoredPagesNameTheirGeneration) {
  SchedulerHarness harness(kOptions, overlap());
  harness.scheduler().SetEventsEnabled(true);
  harness.OpenAndLoad(adapter(), {.digest_seed = kSeed});
  const std::vector<TokenId> prompt = MakePrompt(9, 1);
  harness.Add(1, adapter(), prompt, 1);
  harness.RunToEnd();

  std::vector<std::uint64_t> hashes;
  std::vector<TokenId> tokens;
  for (const AdapterKVEvent& taken : harness.scheduler().TakeEvents()) {
    EXPECT_EQ(taken.adapter_id, std::optional(adapter()));
    EXPECT_EQ(taken.event.kind, KVEventKind::kStored);
    hashes.insert(hashes.end(), taken.event.page_hashes.begin(), taken.event.page_hashes.end());
    tokens.insert(tokens.end(), taken.event.token_ids.begin(), taken.event.token_ids.end());
  }
  const std::span<const TokenId> all(prompt);
  const std::uint64_t first = ChainHash(ChainRoot(IsBase() ? 0 : kSeed), all.first(4));
  EXPECT_EQ(hashes, (std::vector{first, ChainHash(first, all.subspan(4, 4))}));
  EXPECT_EQ(tokens, std::vector<TokenId>(prompt.begin(), prompt.begin() + 8));
  EXPECT_TRUE(harness.scheduler().TakeEvents().empty());
}

TEST_P(SchedulerEventsTest, NothingIsNotedWhileOff) {
  SchedulerHarness harness(kOptions, overlap());
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), MakePrompt(9, 1), 1);
  harness.RunToEnd();
  EXPECT_TRUE(harness.scheduler().TakeEvents().empty());
}

TEST(SchedulerDrainEventsTest, PagesOfAGenerationThatIsGoneAreRemovedWithoutIt) {
  SchedulerHarness harness(kOptions);
  harness.scheduler().SetEventsEnabled(true);
  harness.OpenAndLoad(AdapterId(1));
  harness.Add(1, AdapterId(1), MakePrompt(9, 1), 1);
  harness.RunToEnd();
  ASSERT_FALSE(harness.scheduler().TakeEvents().empty());
  harness.scheduler().DrainAdapter(AdapterId(1));
  const std::vector<AdapterKVEvent> at_once = harness.scheduler().TakeEvents();
  ASSERT_EQ(at_once.size(), 1U);
  EXPECT_EQ(at_once[0].event.kind, KVEventKind::kRemoved);
  EXPECT_EQ(at_once[0].event.page_hashes.size(), 2U);
  EXPECT_EQ(at_once[0].adapter_id, std::optional(AdapterId(1)));

  harness.OpenAndLoad(AdapterId(2));
  harness.Add(2, AdapterId(2), MakePrompt(9, 1), 1);
  harness.RunToEnd();
  ASSERT_FALSE(harness.scheduler().TakeEvents().empty());
  harness.scheduler().DrainAdapter(AdapterId(2));
  harness.RunToEnd();
  for (const AdapterKVEvent& taken : harness.scheduler().TakeEvents()) {
    EXPECT_EQ(taken.event.kind, KVEventKind::kRemoved);
    EXPECT_EQ(taken.adapter_id, std::nullopt);
  }
}

TEST_P(SchedulerEventsTest, PagesThatNobodyUsesAreAvailable) {
  SchedulerHarness harness(kOptions, overlap());
  harness.OpenAndLoad(adapter());
  harness.Add(1, adapter(), LongRunningPrompt(9, 8, 1), 8);
  harness.Step();
  harness.Step();
  EXPECT_LE(harness.scheduler().Stats().num_available_pages, 16 - 3);
  harness.RunToEnd();
  const SchedulerStats stats = harness.scheduler().Stats();
  EXPECT_EQ(stats.num_available_pages, 16);
  EXPECT_LT(stats.num_free_pages, 16);
}

}  // namespace
}  // namespace lora_serve
