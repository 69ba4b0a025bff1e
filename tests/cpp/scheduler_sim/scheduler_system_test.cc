#include "scheduler_sim/scheduler_system.h"

#include <gtest/gtest.h>

#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "common/errors.h"
#include "scheduler_sim/report.h"
#include "sim_scenario.h"

// The real scheduler on the simple device: 10 ms a step, 0.1 ms a prompt token, 20 ms a copy, 100
// ms a read.

namespace lora_serve::sim {
namespace {

using testing::ListSource;
using testing::MakeRequest;
using testing::ServedRun;

ServedRun Serve(const std::vector<SimRequest>& requests, const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {"--system=lora_serve", "--adapters=10", "--places=4",
                                        "--host-us=0", "--steps-between-checks=1"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return ServedRun(arguments, std::make_unique<ListSource>(requests));
}

TEST(SchedulerSystemTest, AnIdleDeviceStartsARequestAtOnce) {
  // The first adapters are copied when the run starts.
  const ServedRun run = Serve({MakeRequest(0, 1, 500'000, 50, 3)}, {});
  EXPECT_EQ(run.FirstTokenMs(0), 15);
  EXPECT_EQ(run.request(0).last_token_us, 535'000);
  const ServedRun with_host_time = Serve({MakeRequest(0, 1, 500'000, 50, 3)}, {"--host-us=400"});
  EXPECT_EQ(with_host_time.FirstTokenMs(0), 15.4);
  // With overlap the device does not wait for the plans after the first.
  EXPECT_EQ(with_host_time.request(0).last_token_us, 535'400);
}

TEST(SchedulerSystemTest, WithoutOverlapEachStepWaitsForItsPlan) {
  const ServedRun run =
      Serve({MakeRequest(0, 1, 500'000, 50, 3)}, {"--host-us=400", "--overlap=0"});
  EXPECT_EQ(run.request(0).last_token_us, 536'200);
}

TEST(SchedulerSystemTest, APlanIsMadeWhenTheOneBeforeItStarts) {
  const std::vector<SimRequest> requests = {MakeRequest(0, 1, 500'000, 50, 10),
                                            MakeRequest(1, 2, 516'000, 10, 1)};
  // It arrives in the step from 515 to 525 ms. The one from there to 535 ms is planned.
  EXPECT_EQ(Serve(requests, {}).request(1).first_token_us, 546'000);
  EXPECT_EQ(Serve(requests, {"--overlap=0"}).request(1).first_token_us, 536'000);
  EXPECT_EQ(Serve(requests, {"--plan-lead-us=1000"}).request(1).first_token_us, 536'000);
}

TEST(SchedulerSystemTest, ALoadStopsNobody) {
  const ServedRun run =
      Serve({MakeRequest(0, 1, 500'000, 50, 40), MakeRequest(1, 9, 516'000, 10, 1)},
            {"--host-adapters=4"});
  EXPECT_EQ(run.recorder().itl().max(), 11'000);
  // A read and a copy, and at most the steps around them.
  EXPECT_GE(run.FirstTokenMs(1), 120 + 11);
  EXPECT_LE(run.FirstTokenMs(1), 120 + 11 + 4 * 10);
  EXPECT_EQ(run.counts().num_disk_loads, 1);
}

TEST(SchedulerSystemTest, WhoIsReadAheadTakesNobodysRoomMeanwhile) {
  // Room for one. The second adapter is read from 516 ms on, and arrives at 616 ms.
  const std::vector<SimRequest> requests = {MakeRequest(0, 1, 500'000, 50, 80),
                                            MakeRequest(1, 9, 516'000, 10, 1)};
  const std::vector<std::string> one_place = {"--places=1", "--host-adapters=4",
                                              "--adapter-time-slice-steps=1"};
  std::vector<std::string> reads_ahead = one_place;
  reads_ahead.emplace_back("--loads-staged-only=1");
  const ServedRun with_room_kept = Serve(requests, one_place);
  const ServedRun run = Serve(requests, reads_ahead);
  EXPECT_GE(with_room_kept.recorder().itl().max(), 100'000) << "paused for the read as well";
  EXPECT_LE(run.recorder().itl().max(), 100'000);
  EXPECT_LE(run.FirstTokenMs(1), with_room_kept.FirstTokenMs(1) + 20);
  EXPECT_EQ(run.counts().num_disk_loads, 1);
}

TEST(SchedulerSystemTest, StepsAreSlowerWhileAnAdapterIsRead) {
  const std::vector<SimRequest> requests = {MakeRequest(0, 1, 500'000, 50, 40),
                                            MakeRequest(1, 9, 516'000, 10, 1)};
  const ServedRun run({"--system=lora_serve", "--adapters=10", "--places=4", "--host-adapters=4"},
                      std::make_unique<ListSource>(requests),
                      testing::kSimpleDevice + "loads.disk_warm_to_host.step_slowdown=0.5\n");
  EXPECT_EQ(run.recorder().itl().max(), 15'000);
}

TEST(SchedulerSystemTest, ALoadThatEndsWhileNothingRunsIsReportedThen) {
  const ServedRun run = Serve({MakeRequest(0, 9, 500'000, 10, 1)}, {"--host-adapters=4"});
  EXPECT_EQ(run.FirstTokenMs(0), 120 + 11);
}

std::vector<std::string> RandomArguments(const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {"--system=lora_serve",
                                        "--adapters=30",
                                        "--popularity=zipf",
                                        "--places=4",
                                        "--host-adapters=8",
                                        "--requests=300",
                                        "--rate=20",
                                        "--base-share=0.2",
                                        "--prompt-tokens=lognormal:60:1",
                                        "--lora-ranks=8,16,64",
                                        "--output-tokens=20",
                                        "--early-stop-share=0.3",
                                        "--shared-tokens=32",
                                        "--kv-tokens=6000",
                                        "--max-model-len=400",
                                        "--burst-factor=3",
                                        "--host-kv-tokens=2000"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

std::string CsvOf(const std::vector<std::string>& more) {
  const ServedRun run(RandomArguments(more));
  std::ostringstream csv;
  WriteCsv(csv, {}, MakeReport(run.system(), 0.0));
  return csv.str();
}

TEST(SchedulerSystemTest, RunsOfEqualSeedsAreEqual) {
  for (const std::string system : {"lora_serve", "vllm_like", "sglang_like"}) {
    const std::string first = CsvOf({"--system=" + system});
    EXPECT_EQ(CsvOf({"--system=" + system}), first) << system;
    EXPECT_NE(CsvOf({"--system=" + system, "--seed=2"}), first) << system;
  }
}

TEST(SchedulerSystemTest, EveryRequestEndsWithItsTokensWhateverTheOptions) {
  for (const std::string overlap : {"--overlap=0", "--overlap=1"}) {
    for (const std::string option :
         {"--seed=3", "--clients=40", "--scheduling-policy=fcfs", "--scheduling-policy=lpm",
          "--max-num-batched-tokens=130", "--plan-lead-us=1000", "--prefix-caching=0",
          "--loads-staged-only=1"}) {
      // It checks that each has ended with its tokens and that nothing is left.
      const ServedRun run(RandomArguments({overlap, option, "--steps-between-checks=50"}));
      EXPECT_EQ(run.recorder().num_ended(), 300) << overlap << ' ' << option;
    }
  }
}

TEST(SchedulerSystemTest, RefusedAndExpiredRequestsGetNothing) {
  const ServedRun refused(RandomArguments({"--max-queued-requests=2", "--rate=200"}));
  EXPECT_GT(refused.recorder().num_refused(), 0);
  EXPECT_EQ(refused.recorder().num_ended() + refused.recorder().num_refused(), 300);
  const ServedRun expired(RandomArguments({"--deadline-ms=200", "--rate=200"}));
  EXPECT_GT(expired.recorder().num_refused(), 0);
  EXPECT_EQ(expired.recorder().num_ended() + expired.recorder().num_refused(), 300);
}

TEST(SchedulerSystemTest, WaitedStepsAreThoseUpToTheFirstToken) {
  const ServedRun run = Serve(
      {MakeRequest(0, 1, 500'000, 50, 3), MakeRequest(1, 2, 516'000, 10, 1)}, {"--overlap=0"});
  EXPECT_EQ(run.request(0).num_waited_steps, 1);
  EXPECT_EQ(run.request(1).num_waited_steps, 1);
}

TEST(SimOptionsTest, WrongOptionsAreRefusedByName) {
  for (const std::vector<std::string>& arguments : std::vector<std::vector<std::string>>{
           {"--speed=1"}, {"--places"}, {"--places=many"}, {"--popularity=odd"}}) {
    EXPECT_THROW((void)ParseSimOptions(arguments), InvalidArgumentError) << arguments[0];
  }
  EXPECT_THROW(ServedRun({"--system=other"}), InvalidArgumentError);
  EXPECT_THROW((void)ParseRanks("8,,16"), InvalidArgumentError);
  EXPECT_EQ(ParseRanks("8,16"), (std::vector<std::int64_t>{8, 16}));
  EXPECT_NE(SimOptionsHelp().find("--drain-threshold-s"), std::string::npos);
}

}  // namespace
}  // namespace lora_serve::sim
