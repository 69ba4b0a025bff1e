// Smaller requests pass one that lacks pages, but not for ever, however many keep coming. The
// harness counts in every step of every test who was passed how often.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "support/scheduler_scenario.h"

namespace lora_serve {
namespace {

using testing::AllScenarios;
using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::Overlap;
using testing::RecordedPlan;
using testing::ScenarioName;
using testing::SchedulerHarness;

constexpr std::int32_t kMaxTimesOvertaken = 16;
constexpr std::int32_t kSmallTokens = 6;
constexpr std::int64_t kBig = 1;
constexpr AdapterId kBusy{11};
constexpr AdapterId kOther{12};

/// Some adapters, or the base model, always have small requests. Ids of these are 1000 and higher.
class BusyHarness : public SchedulerHarness {
 public:
  using SchedulerHarness::SchedulerHarness;

  /// One step, before which each of `adapters` gets small requests until `num_requests` live.
  RecordedPlan BusyStep(const std::vector<AdapterId>& adapters, std::int64_t num_requests = 3) {
    for (const AdapterId adapter : adapters) {
      const AdapterStats stats = StatsOf(adapter);
      for (auto live = stats.num_waiting_requests + stats.num_running_requests; live < num_requests;
           ++live) {
        AddSmall(adapter);
      }
    }
    return Step();
  }
  void AddSmall(AdapterId adapter) {
    Add(next_id_, adapter,
        MakeLongRunningPrompt(adapter, 3, kSmallTokens, static_cast<TokenId>(next_id_)),
        kSmallTokens);
    ++next_id_;
  }
  /// 15 pages.
  void AddBig(AdapterId adapter) { Add(kBig, adapter, MakePrompt(58), 2); }
  [[nodiscard]] bool HasStarted(std::int64_t id) const { return request(id).num_steps > 0; }
  /// Small requests that have started.
  [[nodiscard]] std::int64_t NumStarted() const {
    return std::ranges::count_if(requests(), [](const auto& entry) {
      return entry.first >= 1000 && entry.second.num_steps > 0;
    });
  }

 private:
  std::int64_t next_id_ = 1000;
};

class SchedulerOvertakingTest : public testing::SchedulerScenarioTest {
 protected:
  static SchedulerOptions Options(SchedulingPolicy policy = SchedulingPolicy::kFair) {
    return {.page_size = 4,
            .num_device_pages = 16,
            .max_num_seqs = 8,
            .max_num_batched_tokens = 64,
            .max_model_len = 64,
            .enable_prefix_caching = false,
            .scheduling_policy = policy};
  }
};
INSTANTIATE_TEST_SUITE_P(All, SchedulerOvertakingTest, AllScenarios(), ScenarioName);

TEST_P(SchedulerOvertakingTest, ARequestThatLacksPagesLets16OfItsOwnQueuePass) {
  for (const SchedulingPolicy policy : {SchedulingPolicy::kFair, SchedulingPolicy::kFcfs}) {
    BusyHarness harness(Options(policy), overlap());
    harness.OpenAndLoad(adapter());
    for (int count = 1; count <= 3; ++count) {  // so that they do not all end at once
      harness.BusyStep({adapter()}, count);
      harness.Step();
    }
    harness.AddBig(adapter());
    for (int step = 0; !harness.HasStarted(kBig); ++step) {
      ASSERT_LT(step, 100) << "it starves";
      harness.BusyStep({adapter()}, 4);
    }
    EXPECT_EQ(harness.request(kBig).num_times_overtaken, kMaxTimesOvertaken);
    harness.RunToEndAndCheck();
  }
}

TEST_P(SchedulerOvertakingTest, ARequestThatLacksPagesLets16OfOtherAdaptersPass) {
  BusyHarness harness(Options(), overlap());
  for (const AdapterId id : {adapter(), kBusy, kOther}) harness.OpenAndLoad(id);
  const std::vector<AdapterId> busy = {kBusy, kOther};
  harness.BusyStep(busy);
  harness.BusyStep(busy);
  harness.AddBig(adapter());
  const std::int64_t num_started = harness.NumStarted();
  for (int step = 0; !harness.HasStarted(kBig); ++step) {
    ASSERT_LT(step, 100) << "it starves";
    harness.BusyStep(busy);
  }
  EXPECT_LE(harness.NumStarted() - num_started, kMaxTimesOvertaken);
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerOvertakingTest, WhoLacksAPlaceAndPagesIsNotPassedForEver) {
  SchedulerOptions options = Options();
  options.max_loras = 1;
  BusyHarness harness(options, overlap());
  for (const AdapterId id : {kBusy, kOther, AdapterId(13)}) harness.OpenAndLoad(id);
  std::vector<AdapterId> busy = {kBusy, AdapterId(13)};
  if (IsBase()) busy.push_back(kBaseAdapter);
  harness.BusyStep(busy);
  harness.AddBig(kOther);
  for (int step = 0; !harness.HasStarted(kBig); ++step) {
    ASSERT_LT(step, 300) << "it starves";
    harness.BusyStep(busy);
  }
  harness.RunToEndAndCheck();
}

TEST_P(SchedulerOvertakingTest, AnAbortOfTheOneThatNobodyPassesLetsTheOthersGoOn) {
  BusyHarness harness(Options(), overlap());
  harness.OpenAndLoad(adapter());
  harness.BusyStep({adapter()});
  harness.AddBig(adapter());
  for (int step = 0; harness.request(kBig).num_times_overtaken < kMaxTimesOvertaken; ++step) {
    ASSERT_LT(step, 100);
    harness.BusyStep({adapter()}, 6);
  }
  harness.AddSmall(adapter());
  const std::int64_t num_started = harness.NumStarted();
  harness.Step();
  EXPECT_EQ(harness.NumStarted(), num_started) << "nobody passes it any more";
  harness.AdvanceAll();
  harness.Abort(kBig);
  harness.Step();
  EXPECT_GT(harness.NumStarted(), num_started);
  harness.RunToEndAndCheck();
}

TEST(SchedulerOvertakingRandomTest, EveryRequestIsServedThoughArrivalsNeverStop) {
  std::int64_t num_passed_often = 0;
  std::int64_t num_preemptions = 0;
  std::int64_t num_pauses = 0;
  for (std::uint64_t seed = 1; seed <= 120; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const auto below = [&](std::int32_t limit) {
      return static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(limit));
    };
    constexpr std::int32_t kNumAdapters = 6;
    BusyHarness harness(
        {.page_size = 4,
         .num_device_pages = 16 + below(32),
         .max_num_seqs = 3 + below(6),
         .max_num_batched_tokens = 32,
         .max_model_len = 64,
         .max_loras = 1 + below(3),
         .enable_prefix_caching = below(2) == 0,
         .adapter_memory_bytes = below(2) * (2 + below(3)),
         .adapter_time_slice_steps = below(2) * (1 + below(6)),
         .adapter_pause_us = below(20),
         .scheduling_policy = below(2) == 0 ? SchedulingPolicy::kFair : SchedulingPolicy::kFcfs},
        below(2) == 0 ? Overlap::kOff : Overlap::kOn);
    for (std::int64_t id = 1; id <= kNumAdapters; ++id) {
      harness.OpenAdapter(AdapterId(id), {.size_bytes = 1});
    }
    const std::vector<AdapterId> busy = {AdapterId(1), AdapterId(2)};
    std::int64_t num_rare = 0;
    for (int step = 0; step < 150; ++step) {
      if (below(100) < 10) {  // any adapter, also a busy one or the base model
        harness.Add(num_rare++, AdapterId(below(kNumAdapters + 1)),
                    MakePrompt(1 + below(50), below(5000)), 1 + below(14));
      }
      harness.BusyStep(busy, 2 + below(4));
    }
    for (std::int64_t id = 0; id < num_rare; ++id) {
      for (int step = 0; !harness.request(id).HasEnded(); ++step) {
        ASSERT_LT(step, 1500) << "request " << id << " starves";
        harness.BusyStep(busy, 2 + below(4));
      }
    }
    num_passed_often += harness.max_times_overtaken() >= kMaxTimesOvertaken / 2;
    num_preemptions += harness.scheduler().Counters().total_preemptions;
    num_pauses += harness.scheduler().Counters().total_adapter_pauses;
    harness.RunToEndAndCheck();
    if (HasFailure()) return;
  }
  EXPECT_GT(num_passed_often, 2);
  EXPECT_GT(num_preemptions, 40);
  EXPECT_GT(num_pauses, 100);
}

}  // namespace
}  // namespace lora_serve
