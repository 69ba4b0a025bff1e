// Steady traffic on the adapters that hold all places delays the others by a stated bound only.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "support/scheduler_harness.h"

namespace lora_serve {
namespace {

using testing::MakeLongRunningPrompt;
using testing::MakePrompt;
using testing::SchedulerHarness;

using Ids = std::vector<std::int64_t>;

constexpr std::int32_t kMaxTimesOvertaken = 16;
constexpr std::int32_t kBusyMaxTokens = 6;
constexpr AdapterId kBusy{1};

SchedulerOptions OptionsWithMaxLoras(std::int32_t max_loras) {
  return {.page_size = 4,
          .num_device_pages = 64,
          .max_num_seqs = 8,
          .max_num_batched_tokens = 32,
          .max_model_len = 64,
          .max_loras = max_loras};
}

/// Adapters 1 to `max_loras` are busy: each always has two requests, of different age. Ids of busy
/// requests are 1000 and higher.
class BusyScheduler : public SchedulerHarness {
 public:
  explicit BusyScheduler(const SchedulerOptions& options, std::int64_t num_adapters = 6)
      : SchedulerHarness(options) {
    for (std::int64_t id = 1; id <= num_adapters; ++id) OpenAndLoad(AdapterId(id));
    KeepBusy();
    Step();
    for (int step = 0; step < kBusyMaxTokens / 2; ++step) Step();
    for (std::int64_t id = 1; id <= options.max_loras; ++id) AddBusy(AdapterId(id));
    BusyStep();
  }

  /// One step, with new requests for those that ended.
  ExecutionPlan BusyStep() {
    KeepBusy();
    return Step();
  }

  /// Steps until the request is over its `kMaxTimesOvertaken`.
  void OvertakeAsOftenAsMayBe(std::int64_t id) {
    while (request(id).num_times_overtaken < kMaxTimesOvertaken) BusyStep();
    EXPECT_EQ(request(id).num_steps, 0);
  }

  void AddBusy(AdapterId adapter) {
    Add(next_id_, adapter,
        MakeLongRunningPrompt(adapter, 3, kBusyMaxTokens, static_cast<TokenId>(next_id_)),
        kBusyMaxTokens);
    ++next_id_;
  }

  [[nodiscard]] bool HasStarted(std::int64_t id) const { return request(id).num_steps > 0; }

 private:
  void KeepBusy() {
    for (std::int64_t id = 1; id <= scheduler().options().max_loras; ++id) {
      const AdapterStats stats = StatsOf(AdapterId(id));
      const auto num_requests = stats.num_waiting_requests + stats.num_running_requests;
      if (num_requests < (is_set_up_ ? 2 : 1)) AddBusy(AdapterId(id));
    }
    is_set_up_ = true;
  }

  std::int64_t next_id_ = 1000;
  bool is_set_up_ = false;
};

class SchedulerOvertakingTest : public ::testing::TestWithParam<std::int32_t> {
 protected:
  std::int32_t max_loras() const { return GetParam(); }
  AdapterId other(std::int32_t index) const { return AdapterId(max_loras() + 1 + index); }
};
INSTANTIATE_TEST_SUITE_P(MaxLoras, SchedulerOvertakingTest, ::testing::Values(1, 2));

TEST_P(SchedulerOvertakingTest, ARequestThatLacksAPlaceIsOvertakenABoundedNumberOfTimes) {
  BusyScheduler scheduler(OptionsWithMaxLoras(max_loras()));
  scheduler.Add(1, other(0), MakePrompt(3), 2);
  for (std::int32_t step = 0; scheduler.request(1).num_times_overtaken < kMaxTimesOvertaken;
       ++step) {
    ASSERT_LT(step, kMaxTimesOvertaken * kBusyMaxTokens);
    scheduler.BusyStep();
    ASSERT_FALSE(scheduler.HasStarted(1)) << "nobody would overtake it";
  }
  for (std::int32_t step = 0; !scheduler.HasStarted(1); ++step) {
    ASSERT_LT(step, kBusyMaxTokens) << "every place is taken longer than its requests run";
    scheduler.BusyStep();
  }
  EXPECT_EQ(scheduler.request(1).num_times_overtaken, kMaxTimesOvertaken);
  scheduler.RunToEnd();
  scheduler.ExpectRightOutputs();
}

TEST_P(SchedulerOvertakingTest, SeveralWaitingAdaptersEachGetIn) {
  BusyScheduler scheduler(OptionsWithMaxLoras(max_loras()));
  for (std::int32_t index = 0; index < 4; ++index) {
    scheduler.Add(1 + index, other(index), MakePrompt(3, index), 2);
  }
  for (std::int32_t step = 0; !scheduler.HasStarted(4); ++step) {
    ASSERT_LT(step, 4 * (kMaxTimesOvertaken + 2) * kBusyMaxTokens) << "an adapter starves";
    scheduler.BusyStep();
    for (std::int64_t id = 2; id <= 4; ++id) {
      EXPECT_LE(scheduler.HasStarted(id), scheduler.HasStarted(id - 1)) << "not in order";
    }
  }
  scheduler.RunToEnd();
  scheduler.ExpectRightOutputs();
}

TEST_P(SchedulerOvertakingTest, RequestsOfTheBaseModelStillPass) {
  BusyScheduler scheduler(OptionsWithMaxLoras(max_loras()));
  for (std::int64_t id = 1; id <= max_loras(); ++id) {  // a place that does not drain soon
    scheduler.Add(id, AdapterId(id), MakeLongRunningPrompt(AdapterId(id), 3, 60, 1), 60);
  }
  scheduler.Add(10, other(0), MakePrompt(3), 2);
  while (!scheduler.HasStarted(max_loras())) scheduler.BusyStep();
  for (int count = 0; count < 20 && !scheduler.HasStarted(10); ++count) {
    scheduler.Add(20 + count, kBaseAdapter, MakePrompt(3, count), 1);
    scheduler.Step();
    EXPECT_TRUE(scheduler.HasStarted(20 + count));
  }
  EXPECT_EQ(scheduler.request(10).num_times_overtaken, 0) << "the base model takes no place";
  scheduler.OvertakeAsOftenAsMayBe(10);
  scheduler.AddBusy(kBusy);
  scheduler.Add(50, kBaseAdapter, MakePrompt(3), 1);
  const ExecutionPlan plan = scheduler.Step();
  EXPECT_FALSE(scheduler.HasStarted(10));
  EXPECT_TRUE(scheduler.HasStarted(50));
  EXPECT_EQ(scheduler.request(10).num_times_overtaken, kMaxTimesOvertaken);
  scheduler.RunToEnd();
  scheduler.ExpectRightOutputs();
}

TEST_P(SchedulerOvertakingTest, AnAbortOfTheWaitingRequestLetsTheOthersGoOn) {
  BusyScheduler scheduler(OptionsWithMaxLoras(max_loras()));
  scheduler.Add(1, other(0), MakePrompt(3), 2);
  scheduler.OvertakeAsOftenAsMayBe(1);
  scheduler.Add(2, kBusy, MakePrompt(3), 2);
  scheduler.Step();
  EXPECT_FALSE(scheduler.HasStarted(2));
  EXPECT_FALSE(scheduler.HasStarted(1));
  scheduler.Abort(1);
  scheduler.Step();
  EXPECT_TRUE(scheduler.HasStarted(2));
  scheduler.RunToEnd();
  scheduler.ExpectRightOutputs();
}

TEST_P(SchedulerOvertakingTest, ARequestOfAnAdapterThatIsNotResidentHoldsUpNobody) {
  BusyScheduler scheduler(OptionsWithMaxLoras(max_loras()));
  scheduler.load_fails = [](AdapterId id) { return id == AdapterId(100); };
  scheduler.scheduler().OpenAdapter(AdapterId(100), {});
  scheduler.Add(1, AdapterId(100), MakePrompt(3), 2);
  for (int step = 0; step < 20 * kBusyMaxTokens; ++step) scheduler.BusyStep();
  scheduler.Add(2, kBusy, MakePrompt(3), 2);
  scheduler.Step();
  EXPECT_TRUE(scheduler.HasStarted(2));
  scheduler.Abort(1);
  scheduler.RunToEnd();
  scheduler.ExpectRightOutputs();
}

TEST(SchedulerOvertakingPagesTest, APlaceThatDrainedIsNotTakenWhileItsRequestLacksPages) {
  SchedulerOptions options = OptionsWithMaxLoras(1);
  options.num_device_pages = 26;
  options.enable_prefix_caching = false;
  BusyScheduler scheduler(options);
  scheduler.Add(1, AdapterId(2), MakePrompt(60), 2);  // 15 pages
  scheduler.OvertakeAsOftenAsMayBe(1);
  scheduler.Add(2, kBaseAdapter, MakeLongRunningPrompt(kBaseAdapter, 44, 10, 1), 10);
  scheduler.Add(3, AdapterId(3), MakePrompt(3), 2);
  while (scheduler.StatsOf(kBusy).num_running_requests > 0) scheduler.Step();
  EXPECT_FALSE(scheduler.request(2).HasEnded());
  for (; !scheduler.HasStarted(1); scheduler.Step()) {
    EXPECT_FALSE(scheduler.HasStarted(3)) << "adapter 3 took the place that drained for adapter 2";
  }
  EXPECT_TRUE(scheduler.request(2).HasEnded());
  scheduler.RunToEnd();
  scheduler.ExpectRightOutputs();
}

TEST(SchedulerOvertakingPagesTest, NorWhileAPreemptedRequestIsFirstInLineForPages) {
  SchedulerOptions options = OptionsWithMaxLoras(1);
  options.num_device_pages = 26;
  options.enable_prefix_caching = false;
  BusyScheduler scheduler(options);
  scheduler.Add(1, AdapterId(2), MakePrompt(60), 2);  // 15 pages
  scheduler.OvertakeAsOftenAsMayBe(1);
  scheduler.Add(2, kBaseAdapter, MakeLongRunningPrompt(kBaseAdapter, 42, 20, 1), 20);
  scheduler.Add(3, kBaseAdapter, MakeLongRunningPrompt(kBaseAdapter, 36, 20, 2), 20);
  scheduler.Add(4, AdapterId(3), MakePrompt(3), 2);
  for (; !scheduler.HasStarted(1); scheduler.Step()) {
    EXPECT_FALSE(scheduler.HasStarted(4)) << "adapter 3 took the place that drained for adapter 2";
  }
  EXPECT_EQ(scheduler.scheduler().Stats().total_preemptions, 1);
  scheduler.RunToEnd();
  scheduler.ExpectRightOutputs();
}

TEST(SchedulerOvertakingPagesTest, PreemptedRequestsStillPass) {
  SchedulerOptions options = OptionsWithMaxLoras(1);
  options.num_device_pages = 20;
  options.max_num_seqs = 4;
  options.enable_prefix_caching = false;
  BusyScheduler scheduler(options, 2);
  scheduler.Add(1, AdapterId(2), MakePrompt(3), 2);
  while (scheduler.request(1).num_times_overtaken < kMaxTimesOvertaken - 2) scheduler.BusyStep();
  for (std::int64_t id = 2; id <= 3; ++id) {  // 16 pages each at the end, 20 are there
    scheduler.Add(id, kBusy, MakeLongRunningPrompt(kBusy, 4, 58, static_cast<TokenId>(id)), 58);
  }
  while (!scheduler.HasStarted(3)) scheduler.Step();
  ASSERT_EQ(scheduler.request(1).num_times_overtaken, kMaxTimesOvertaken);
  while (scheduler.scheduler().Stats().total_preemptions == 0) scheduler.Step();
  ASSERT_FALSE(scheduler.request(3).HasEnded());
  scheduler.Add(4, kBusy, MakePrompt(3), 2);
  while (!scheduler.HasStarted(1)) {
    EXPECT_FALSE(scheduler.Step().IsEmpty());
    EXPECT_EQ(scheduler.HasStarted(4), false);
  }
  EXPECT_TRUE(scheduler.request(3).HasEnded()) << "it was preempted and kept its place";
  scheduler.RunToEnd();
  scheduler.ExpectRightOutputs();
}

// The harness counts the overtakings in every step; here arrivals never stop before all are served.
TEST(SchedulerOvertakingRandomTest, EveryAdapterIsServedThoughArrivalsOnTheBusyOnesNeverStop) {
  std::int64_t num_full_overtakings = 0;
  std::int64_t num_preemptions = 0;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const auto below = [&](int limit) {
      return static_cast<int>(random() % static_cast<std::uint64_t>(limit));
    };
    SchedulerOptions options = OptionsWithMaxLoras(1 + below(3));
    options.max_num_seqs = 3 + below(6);
    options.num_device_pages = 16 + below(48);
    BusyScheduler scheduler(options);
    std::int64_t num_rare = 0;
    for (int step = 0; step < 200; ++step) {
      if (below(100) < 60) scheduler.AddBusy(AdapterId(1 + below(options.max_loras)));
      if (below(100) < 10) {  // any adapter, also a busy one or the base model
        scheduler.Add(num_rare, AdapterId(below(7)), MakePrompt(1 + below(30), below(5000)),
                      1 + below(30));
        ++num_rare;
      }
      scheduler.Step();
    }
    for (std::int64_t id = 0; id < num_rare; ++id) {
      for (int step = 0; !scheduler.request(id).HasEnded(); ++step) {
        ASSERT_LT(step, 2000) << "request " << id << " starves";
        scheduler.BusyStep();
      }
    }
    num_full_overtakings += scheduler.max_times_overtaken() == kMaxTimesOvertaken;
    num_preemptions += scheduler.scheduler().Stats().total_preemptions;
    scheduler.RunToEnd();
    scheduler.ExpectRightOutputs();
    scheduler.ExpectNothingLeft();
    if (HasFailure()) return;
  }
  EXPECT_GT(num_full_overtakings, 10);
  EXPECT_GT(num_preemptions, 50);
}

}  // namespace
}  // namespace lora_serve
