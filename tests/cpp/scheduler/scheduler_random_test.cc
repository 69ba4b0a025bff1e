// Random operations against the scheduler, with the oracle executor. After every step the harness
// checks the plan, the invariants, the page accounting and the adapters' memory; at the end every
// request has ended exactly once, with the tokens of a run alone, and nothing is left.
// LORA_SERVE_TEST_SEED and LORA_SERVE_TEST_STEPS override the first seed and the number of steps in
// total.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <string>

#include "support/random_scheduler_run.h"

namespace lora_serve {
namespace {

using testing::Overlap;
using testing::RandomCoverage;
using testing::RandomSchedulerRun;
using testing::RecordedPlan;
using testing::TrackedRequest;

constexpr std::int64_t kStepsPerRun = 500;

std::int64_t FromEnvironment(const char* name, std::int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::stoll(value);
}

/// Requests that finished in both runs.
std::int64_t ExpectSameTokens(const RandomSchedulerRun& one, const RandomSchedulerRun& other) {
  std::int64_t num_compared = 0;
  for (const auto& [id, request] : one.harness().requests()) {
    const auto it = other.harness().requests().find(id);
    if (it == other.harness().requests().end()) continue;
    const TrackedRequest& same = it->second;
    EXPECT_EQ(same.prompt, request.prompt);
    if (!request.is_finished || !same.is_finished) continue;
    EXPECT_EQ(same.output, request.output) << "request " << id;
    ++num_compared;
  }
  return num_compared;
}

TEST(SchedulerRandomTest, EveryRequestEndsOnceWithItsOwnTokensWithAndWithoutOverlap) {
  const auto first_seed = static_cast<std::uint64_t>(FromEnvironment("LORA_SERVE_TEST_SEED", 1));
  const std::int64_t num_steps = FromEnvironment("LORA_SERVE_TEST_STEPS", 100'000);
  RandomCoverage coverage;
  std::int64_t num_compared = 0;
  for (std::uint64_t seed = first_seed; coverage.num_steps < num_steps; ++seed) {
    SCOPED_TRACE(::testing::Message() << "LORA_SERVE_TEST_SEED=" << seed);
    RandomSchedulerRun alone(seed, Overlap::kOff, &coverage);
    RandomSchedulerRun overlapped(seed, Overlap::kOn, &coverage);
    try {
      alone.Run(kStepsPerRun);
      if (!HasFailure()) overlapped.Run(kStepsPerRun);
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
    if (!HasFailure()) num_compared += ExpectSameTokens(alone, overlapped);
    if (HasFailure()) {
      std::cerr << "failed with LORA_SERVE_TEST_SEED=" << seed << '\n';
      return;
    }
  }
  std::cout << "seeds from " << first_seed << ": " << coverage << ", " << num_compared
            << " requests finished in both\n";
  if (num_steps < 100'000) return;
  coverage.ExpectAllCasesWereMet();
  EXPECT_GT(num_compared, 2000);
}

TEST(SchedulerRandomTest, EqualSeedsMakeEqualPlans) {
  for (const Overlap overlap : {Overlap::kOff, Overlap::kOn}) {
    for (std::uint64_t seed = 100; seed < 104; ++seed) {
      std::string logs[2];
      for (std::string& log : logs) {
        RandomCoverage coverage;
        RandomSchedulerRun run(seed, overlap, &coverage);
        run.on_plan = [&log](const RecordedPlan& plan) { log += plan.ToText() + '\n'; };
        run.Run(200);
      }
      EXPECT_EQ(logs[0], logs[1]) << "seed " << seed;
      EXPECT_GT(logs[0].size(), 1000U);
    }
  }
}

}  // namespace
}  // namespace lora_serve
