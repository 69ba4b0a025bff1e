#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "scheduler_sim/waiting_line.h"
#include "sim_scenario.h"

// The baselines, on the simple device: 10 ms a step, 0.1 ms a prompt token, 20 ms a copy, 100 ms a
// read. Slots are filled with the adapters of the lowest ids when a run starts.

namespace lora_serve::sim {
namespace {

using testing::ListSource;
using testing::MakeRequest;
using testing::ServedRun;

ServedRun Serve(const std::string& system, const std::vector<SimRequest>& requests,
                const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments = {"--system=" + system, "--adapters=10"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return ServedRun(arguments, std::make_unique<ListSource>(requests));
}

TEST(WaitingLineTest, RequestsLeaveInTheOrderOfArrivalOfWhoMay) {
  WaitingLine line;
  std::int64_t order = 0;
  for (const std::int64_t adapter : {3, 1, 2, 1, 3}) {
    auto request = std::make_unique<BaselineRequest>();
    request->request.adapter_id = adapter;
    request->order = order++;
    line.Push(std::move(request));
  }
  EXPECT_EQ(line.First()->order, 0);
  EXPECT_EQ(line.FirstOf({1, 2})->order, 1);
  EXPECT_EQ(line.FirstOf({4}), nullptr);
  EXPECT_EQ(line.Pop(1)->order, 1);
  EXPECT_EQ(line.FirstOf({1, 2})->order, 2);
  EXPECT_EQ(line.Pop(3)->order, 0);
  EXPECT_EQ(line.First()->order, 2);
  for (const std::int64_t adapter : {2, 1, 3}) static_cast<void>(line.Pop(adapter));
  EXPECT_TRUE(line.empty());
  EXPECT_EQ(line.First(), nullptr);
}

TEST(VllmLikeSystemTest, DecodesAndPromptsShareAStep) {
  const ServedRun run =
      Serve("vllm_like", {MakeRequest(0, 0, 0, 10, 10), MakeRequest(1, 0, 500, 20, 1)});
  EXPECT_EQ(run.FirstTokenMs(0), 11);
  // It arrives in the step that ends at 11 ms; the next takes 10 + 2 ms.
  EXPECT_EQ(run.FirstTokenMs(1), 23 - 0.5);
  EXPECT_EQ(run.recorder().steps().num_steps, 10);
}

TEST(VllmLikeSystemTest, ARequestOverTheCapIsPassedByOthers) {
  const ServedRun run =
      Serve("vllm_like",
            {MakeRequest(0, 1, 0, 10, 20), MakeRequest(1, 2, 0, 10, 20),
             MakeRequest(2, 3, 0, 10, 5), MakeRequest(3, 2, 1, 10, 5), MakeRequest(4, 0, 2, 10, 5)},
            {"--places=2"});
  EXPECT_LT(run.FirstTokenMs(3), 30);
  EXPECT_LT(run.FirstTokenMs(4), 30);
  EXPECT_GT(run.FirstTokenMs(2), 200);  // until one of the two adapters has ended
  EXPECT_EQ(run.counts().num_evictions, 1);
}

TEST(VllmLikeSystemTest, ALoadStopsEverybody) {
  const ServedRun run =
      Serve("vllm_like", {MakeRequest(0, 1, 0, 10, 10), MakeRequest(1, 3, 1000, 10, 1)},
            {"--places=2", "--host-adapters=2"});
  // The step at 11 ms waits for a read and a copy.
  EXPECT_EQ(run.FirstTokenMs(1), 11 + 120 + 11 - 1);
  EXPECT_EQ(run.recorder().itl().max(), 131'000);
  EXPECT_EQ(run.recorder().steps().stall_us, 120'000);
  EXPECT_EQ(run.counts().num_disk_loads, 1);
}

TEST(VllmLikeSystemTest, LongPromptsAreChunked) {
  const ServedRun run = Serve("vllm_like", {MakeRequest(0, 0, 0, 250, 1)},
                              {"--max-num-batched-tokens=100", "--max-num-seqs=8"});
  EXPECT_EQ(run.recorder().steps().num_steps, 3);
  EXPECT_EQ(run.FirstTokenMs(0), 30 + 25);
}

TEST(SglangLikeSystemTest, PromptsGoBeforeDecodes) {
  const ServedRun run =
      Serve("sglang_like", {MakeRequest(0, 1, 0, 10, 3), MakeRequest(1, 1, 5000, 20, 1)});
  // 11 ms, then a step for the new prompt alone, then the two decodes.
  EXPECT_EQ(run.FirstTokenMs(1), 23 - 5);
  EXPECT_EQ(run.request(0).last_token_us, 43'000);
}

/// Adapter 1 is always busy; adapter 2 wants the only place.
std::vector<SimRequest> BusyAndRare() {
  std::vector<SimRequest> requests = {MakeRequest(0, 1, 0, 10, 40), MakeRequest(1, 2, 1000, 10, 4)};
  for (std::int64_t id = 2; id < 20; ++id)
    requests.push_back(MakeRequest(id, 1, 100'000 * id, 10, 40));
  return requests;
}

TEST(SglangLikeSystemTest, AnAdapterDrainsForOneThatHasWaitedTooLong) {
  const ServedRun patient =
      Serve("sglang_like", BusyAndRare(), {"--places=1", "--drain-threshold-s=100"});
  const ServedRun drains =
      Serve("sglang_like", BusyAndRare(), {"--places=1", "--drain-threshold-s=0.5"});
  EXPECT_GT(patient.FirstTokenMs(1), 1800);  // after all others
  EXPECT_GT(drains.FirstTokenMs(1), 500);
  EXPECT_LT(drains.FirstTokenMs(1), 1100);
}

TEST(SglangLikeSystemTest, TheBaseModelTakesAPlace) {
  const ServedRun run = Serve(
      "sglang_like", {MakeRequest(0, 1, 0, 10, 20), MakeRequest(1, 0, 1, 10, 1)}, {"--places=1"});
  EXPECT_GT(run.FirstTokenMs(1), 200);
}

TEST(SglangLikeSystemTest, AnArrivingAdapterIsReadBetweenTwoSteps) {
  const ServedRun run =
      Serve("sglang_like", {MakeRequest(0, 1, 0, 10, 10), MakeRequest(1, 5, 1000, 10, 1)},
            {"--places=2", "--host-adapters=3"});
  EXPECT_EQ(run.FirstTokenMs(1), 11 + 120 + 11 - 1);
  EXPECT_EQ(run.counts().num_disk_loads, 1);
}

TEST(BaselineSystemTest, PrefixesAreReusedWithinAnAdapterOnly) {
  std::vector<SimRequest> requests;
  for (std::int64_t id = 0; id < 3; ++id) {
    requests.push_back(MakeRequest(0, id == 2 ? 2 : 1, 500'000 + 100'000 * id, 64, 2));
    requests.back().id = id;
  }
  for (const std::string system : {"vllm_like", "sglang_like", "lora_serve"}) {
    const ServedRun run = Serve(system, requests);
    EXPECT_EQ(run.counts().num_queried_tokens, 192) << system;
    EXPECT_EQ(run.counts().num_hit_tokens, 48) << system;
  }
}

}  // namespace
}  // namespace lora_serve::sim
