#include "scheduler_sim/report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "common/errors.h"
#include "scheduler_sim/latency_histogram.h"
#include "scheduler_sim/random_stream.h"
#include "sim_scenario.h"

namespace lora_serve::sim {
namespace {

TEST(PercentilesTest, AreThoseOfTheNearestRank) {
  std::vector<float> values;
  for (int value = 100; value >= 1; --value) values.push_back(1000.0F * static_cast<float>(value));
  const Percentiles percentiles = ExactPercentiles(values);
  EXPECT_EQ(percentiles.p50, 50);
  EXPECT_EQ(percentiles.p90, 90);
  EXPECT_EQ(percentiles.p99, 99);
  EXPECT_EQ(percentiles.max, 100);
  std::vector<float> none;
  EXPECT_EQ(ExactPercentiles(none).p99, 0);
}

TEST(LatencyHistogramTest, PercentilesAreExactWithinHalfAPercent) {
  RandomStream random(1, 1);
  LatencyHistogram histogram;
  std::vector<std::int64_t> values;
  for (int draw = 0; draw < 100'000; ++draw) {
    values.push_back(std::llround(std::exp(8.0 + 3.0 * random.NextNormal())));
    histogram.Add(values.back());
  }
  std::ranges::sort(values);
  for (const double fraction : {0.001, 0.5, 0.9, 0.99, 0.999}) {
    const auto rank = static_cast<std::size_t>(std::ceil(fraction * 100'000)) - 1;
    const auto exact = static_cast<double>(values[rank]);
    EXPECT_NEAR(histogram.Percentile(fraction), exact, 0.004 * exact + 0.5) << fraction;
  }
  EXPECT_EQ(histogram.max(), values.back());
}

TEST(LatencyHistogramTest, TakesAnyTime) {
  LatencyHistogram histogram;
  histogram.Add(0);
  histogram.Add(INT64_MAX);
  EXPECT_EQ(histogram.Percentile(0.5), 0.0);
  EXPECT_NEAR(histogram.Percentile(1.0) / static_cast<double>(INT64_MAX), 1.0, 0.01);
}

TEST(RecorderTest, ATokenTooManyIsAnError) {
  Recorder recorder;
  recorder.OnArrival(testing::MakeRequest(0, 1, 0, 4, 2));
  recorder.OnRow(0, 5);
  EXPECT_FALSE(recorder.OnToken(0, 10));
  EXPECT_THROW(recorder.CheckAllEnded(), InternalError);
  EXPECT_TRUE(recorder.OnToken(0, 30));
  recorder.CheckAllEnded();
  EXPECT_THROW(recorder.OnToken(0, 40), InternalError);
}

TEST(ReportTest, FiguresAreThoseOfTheRequests) {
  // Alone on the simple device: a prompt step of 10 + 0.1 * 50 ms, then a step of 10 ms a token.
  std::vector<SimRequest> requests;
  requests.push_back(testing::MakeRequest(0, 0, 0, 50, 3));
  requests.push_back(testing::MakeRequest(1, 0, 100'000, 50, 3));
  const testing::ServedRun run({"--system=vllm_like", "--adapters=1"},
                               std::make_unique<testing::ListSource>(requests));
  const Report report = MakeReport(run.system(), 0.0);
  EXPECT_EQ(report.ttft.p50, 15);
  EXPECT_EQ(report.e2e.max, 35);
  EXPECT_NEAR(report.itl.p99, 10, 0.05);
  EXPECT_DOUBLE_EQ(report.duration_s, 0.135);
  EXPECT_DOUBLE_EQ(report.output_tokens_per_s, 6 / 0.135);
  EXPECT_EQ(report.num_steps, 6);
  EXPECT_DOUBLE_EQ(report.busy_share, 0.07 / 0.135);
  std::ostringstream csv;
  WriteCsv(csv, {{"system", "x"}}, report);
  const std::string text = csv.str();
  const std::size_t end = text.find('\n');
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2);
  EXPECT_EQ(std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(end), ','),
            std::count(text.begin() + static_cast<std::ptrdiff_t>(end), text.end(), ','));
}

}  // namespace
}  // namespace lora_serve::sim
