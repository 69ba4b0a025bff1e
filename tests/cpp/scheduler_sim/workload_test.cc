#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "common/errors.h"
#include "scheduler_sim/adapter_popularity.h"
#include "scheduler_sim/arrival_process.h"
#include "scheduler_sim/length_distribution.h"
#include "scheduler_sim/request_source.h"
#include "sim_scenario.h"

namespace lora_serve::sim {
namespace {

constexpr int kNumDraws = 200'000;

/// Requests of each adapter.
std::map<std::int64_t, double> CountChoices(const PopularityOptions& options, TimeUs now_us = 0) {
  AdapterPopularity popularity(options, 1);
  std::map<std::int64_t, double> counts;
  for (int draw = 0; draw < kNumDraws; ++draw) ++counts[popularity.Choose(now_us).adapter_id];
  return counts;
}

/// The counts, largest first.
std::vector<double> SortedCounts(const PopularityOptions& options) {
  std::vector<double> counts;
  for (const auto& [adapter, count] : CountChoices(options)) counts.push_back(count);
  std::ranges::sort(counts, std::greater());
  return counts;
}

std::int64_t MostPopular(const PopularityOptions& options, TimeUs now_us) {
  const auto counts = CountChoices(options, now_us);
  return std::ranges::max_element(counts, {}, [](const auto& item) { return item.second; })->first;
}

TEST(AdapterPopularityTest, UniformGivesEachAdapterTheSameShare) {
  const auto counts = SortedCounts({.kind = PopularityKind::kUniform, .num_adapters = 20});
  ASSERT_EQ(counts.size(), 20U);
  EXPECT_LT(counts.front(), 1.05 * counts.back());
}

TEST(AdapterPopularityTest, ZipfGivesRankKAShareOfOneOverK) {
  const auto counts = SortedCounts({.kind = PopularityKind::kZipf, .num_adapters = 64});
  ASSERT_EQ(counts.size(), 64U);
  EXPECT_NEAR(counts[0] / counts[1], 2.0, 0.1);
  EXPECT_NEAR(counts[0] / counts[9], 10.0, 0.7);
}

TEST(AdapterPopularityTest, SkewedGivesAFewAdaptersMostRequests) {
  const auto counts = SortedCounts({.kind = PopularityKind::kSkewed,
                                    .num_adapters = 50,
                                    .skew_fraction = 0.1,
                                    .skew_share = 0.9});
  double hot = 0;
  for (std::size_t rank = 0; rank < 5; ++rank) hot += counts[rank];
  EXPECT_NEAR(hot / kNumDraws, 0.9, 0.005);
  EXPECT_LT(counts[0], 1.1 * counts[4]);
}

TEST(AdapterPopularityTest, DriftingMovesTheRankingOnWithTime) {
  const PopularityOptions options{.kind = PopularityKind::kDrifting,
                                  .num_adapters = 16,
                                  .drift_period_us = 1000,
                                  .drift_step = 1};
  const std::int64_t first = MostPopular(options, 0);
  EXPECT_EQ(MostPopular(options, 999), first);
  EXPECT_NE(MostPopular(options, 1000), first);
  EXPECT_EQ(MostPopular(options, 16'000), first);
}

TEST(AdapterPopularityTest, TheRarestTenthAreTheLastRanks) {
  const PopularityOptions options{.kind = PopularityKind::kZipf, .num_adapters = 20};
  const auto counts = CountChoices(options);
  AdapterPopularity popularity(options, 1);
  std::map<std::int64_t, bool> is_rare;
  for (int draw = 0; draw < kNumDraws; ++draw) {
    const auto choice = popularity.Choose(0);
    is_rare[choice.adapter_id] = choice.is_rare;
  }
  for (const auto& [adapter, rare] : is_rare) {
    EXPECT_EQ(rare, counts.at(adapter) < counts.at(MostPopular(options, 0)) / 18.5) << adapter;
  }
}

TEST(AdapterPopularityTest, AShareOfBaseRequestsLeavesTheOthersAsTheyAre) {
  AdapterPopularity without({.num_adapters = 8}, 3);
  AdapterPopularity with({.num_adapters = 8, .base_share = 0.25}, 3);
  int num_base = 0;
  for (int draw = 0; draw < kNumDraws; ++draw) {
    const auto expected = without.Choose(0).adapter_id;
    const auto chosen = with.Choose(0).adapter_id;
    num_base += chosen == 0;
    ASSERT_TRUE(chosen == 0 || chosen == expected);
  }
  EXPECT_NEAR(num_base / static_cast<double>(kNumDraws), 0.25, 0.01);
}

/// Mean and coefficient of variation of the gaps, in seconds.
std::pair<double, double> GapsOf(const ArrivalOptions& options) {
  ArrivalProcess arrivals(options, 1);
  double sum = 0;
  double sum_of_squares = 0;
  TimeUs last_us = 0;
  for (int draw = 0; draw < kNumDraws; ++draw) {
    const TimeUs arrival_us = arrivals.Next();
    EXPECT_GE(arrival_us, last_us);
    const double gap = static_cast<double>(arrival_us - last_us) / 1e6;
    last_us = arrival_us;
    sum += gap;
    sum_of_squares += gap * gap;
  }
  const double mean = sum / kNumDraws;
  return {mean, std::sqrt(sum_of_squares / kNumDraws - mean * mean) / mean};
}

TEST(ArrivalProcessTest, PoissonGapsAreExponential) {
  const auto [mean, variation] = GapsOf({.requests_per_s = 12});
  EXPECT_NEAR(mean, 1.0 / 12, 0.001);
  EXPECT_NEAR(variation, 1.0, 0.02);
}

TEST(ArrivalProcessTest, BurstsKeepTheMeanRateAndVaryMore) {
  const auto [mean, variation] =
      GapsOf({.requests_per_s = 50, .burst_factor = 4.0, .burst_share = 0.2, .burst_s = 0.5});
  EXPECT_NEAR(mean, 1.0 / 50, 0.001);
  EXPECT_GT(variation, 1.3);
}

TEST(ArrivalProcessTest, BurstsThatExceedTheMeanRateAreRefused) {
  EXPECT_THROW(ArrivalProcess({.burst_factor = 6.0, .burst_share = 0.2}, 1), InvalidArgumentError);
}

TEST(LengthDistributionTest, ANumberIsAlwaysThatLong) {
  RandomStream random(1, 1);
  EXPECT_EQ(LengthDistribution::Parse("128").Draw(random, 4096), 128);
  EXPECT_EQ(LengthDistribution::Parse("128").Draw(random, 100), 100);
}

TEST(LengthDistributionTest, LognormalHasTheMeanAndTheSpreadAskedFor) {
  const LengthDistribution lengths = LengthDistribution::Parse("lognormal:500:0.8");
  RandomStream random(1, 1);
  double sum = 0;
  double sum_of_squares = 0;
  for (int draw = 0; draw < kNumDraws; ++draw) {
    const double length = lengths.Draw(random, 1'000'000);
    sum += length;
    sum_of_squares += length * length;
  }
  const double mean = sum / kNumDraws;
  EXPECT_NEAR(mean, 500, 5);
  EXPECT_NEAR(std::sqrt(sum_of_squares / kNumDraws - mean * mean) / mean, 0.8, 0.03);
}

TEST(LengthDistributionTest, OtherTextsAreRefused) {
  for (const std::string text : {"", "0", "12x", "lognormal:5", "normal:5:1", "lognormal:5:-1"}) {
    EXPECT_THROW((void)LengthDistribution::Parse(text), InvalidArgumentError) << text;
  }
}

std::vector<SimRequest> TakeAll(RequestSource& source) {
  std::vector<SimRequest> requests;
  while (source.NextArrivalUs() != kNever) requests.push_back(source.Take());
  return requests;
}

TEST(RequestSourceTest, EqualSeedsGiveEqualRequests) {
  WorkloadOptions options;
  options.num_requests = 50;
  options.popularity.num_adapters = 5;
  options.prompt_length = "lognormal:100:1";
  const auto first = TakeAll(*MakeRequestSource(options));
  const auto again = TakeAll(*MakeRequestSource(options));
  options.seed = 2;
  const auto other = TakeAll(*MakeRequestSource(options));
  ASSERT_EQ(first.size(), 50U);
  for (std::size_t index = 0; index < first.size(); ++index) {
    EXPECT_EQ(first[index].prompt_token_ids, again[index].prompt_token_ids);
    EXPECT_EQ(first[index].arrival_us, again[index].arrival_us);
    EXPECT_EQ(first[index].adapter_id, again[index].adapter_id);
    EXPECT_NE(first[index].prompt_token_ids, other[index].prompt_token_ids);
  }
}

TEST(RequestSourceTest, RequestsOfOneAdapterShareTheirFirstTokens) {
  WorkloadOptions options;
  options.num_requests = 40;
  options.popularity.num_adapters = 2;
  options.num_shared_tokens = 48;
  const auto requests = TakeAll(*MakeRequestSource(options));
  std::map<std::int64_t, std::vector<TokenId>> shared;
  for (const SimRequest& request : requests) {
    const std::vector<TokenId> head(request.prompt_token_ids.begin(),
                                    request.prompt_token_ids.begin() + 48);
    const auto [known, is_new] = shared.try_emplace(request.adapter_id, head);
    EXPECT_EQ(known->second, head);
  }
  ASSERT_EQ(shared.size(), 2U);
  EXPECT_NE(shared[1], shared[2]);
}

TEST(RequestSourceTest, SomeRequestsStopBeforeTheirLimit) {
  WorkloadOptions options;
  options.num_requests = 2000;
  options.early_stop_share = 0.5;
  int num_early = 0;
  for (const SimRequest& request : TakeAll(*MakeRequestSource(options))) {
    EXPECT_GE(request.num_output_tokens, 1);
    EXPECT_LE(request.num_output_tokens, request.max_tokens);
    num_early += request.num_output_tokens < request.max_tokens;
  }
  EXPECT_NEAR(num_early, 1000, 100);
}

TEST(RequestSourceTest, AClosedLoopWaitsForEachClientsAnswer) {
  WorkloadOptions options;
  options.num_requests = 5;
  options.num_clients = 2;
  options.think_us = 1000;
  options.arrivals.requests_per_s = 1000;
  const auto source = MakeRequestSource(options);
  (void)source->Take();
  (void)source->Take();
  EXPECT_EQ(source->NextArrivalUs(), kNever);
  source->OnRequestEnd(50'000);
  EXPECT_EQ(source->NextArrivalUs(), 51'000);
  EXPECT_EQ(source->Take().id, 2);
  EXPECT_EQ(source->NextArrivalUs(), kNever);
}

}  // namespace
}  // namespace lora_serve::sim
