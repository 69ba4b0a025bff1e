#include "scheduler_sim/device_model.h"

#include <gtest/gtest.h>

#include <string>

#include "common/errors.h"
#include "sim_scenario.h"

namespace lora_serve::sim {
namespace {

using testing::MakeDevice;

const std::string kLoads =
    "loads.host_to_device.gb_per_s=50\nloads.host_to_device.fixed_ms=0.5\n"
    "loads.disk_warm_to_host.gb_per_s=5\nloads.disk_cold_to_host.gb_per_s=1\n";

/// Two decode rows (one with an adapter) and a chunk with another.
StepShape MixedShape() {
  StepShape shape;
  shape.AddRow(1, 99, false);
  shape.AddRow(1, 199, true);
  shape.AddRow(64, 32, true);
  shape.num_adapters = 2;
  shape.sum_ranks = 24;
  return shape;
}

TEST(DeviceModelTest, RowsAreDecodesOrPrefillChunks) {
  const StepShape shape = MixedShape();
  EXPECT_EQ(shape.num_decode_rows, 2);
  EXPECT_EQ(shape.num_context_tokens, 300);
  EXPECT_EQ(shape.num_prefill_tokens, 64);
  EXPECT_DOUBLE_EQ(shape.num_prefill_pairs, 64.0 * (32 + 32));
  EXPECT_EQ(shape.num_lora_decode_rows, 1);
  EXPECT_EQ(shape.num_lora_prefill_tokens, 64);
}

struct StepCase {
  std::string coefficient;
  /// Of the mixed step, beyond the base's 7 ms, in microseconds.
  TimeUs expected_us;
};

class StepCoefficientTest : public ::testing::TestWithParam<StepCase> {};

TEST_P(StepCoefficientTest, AddsWhatItStandsFor) {
  const DeviceModel device =
      MakeDevice(kLoads + "step.base_ms=7\nstep." + GetParam().coefficient + '\n');
  const DeviceModel::EngineOptions engine{.num_places = 8, .max_lora_rank = 64};
  EXPECT_EQ(device.StepUs(MixedShape(), engine), 7000 + GetParam().expected_us);
  StepShape base_only;
  base_only.AddRow(1, 10, false);
  const bool is_lora = GetParam().coefficient.starts_with("lora_") &&
                       !GetParam().coefficient.starts_with("lora_enabled");
  if (is_lora) {
    EXPECT_EQ(device.StepUs(base_only, engine), 7000);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, StepCoefficientTest,
    ::testing::Values(StepCase{"per_row_us=10", 20}, StepCase{"per_context_ns=1000", 300},
                      StepCase{"per_prefill_token_us=3", 192},
                      StepCase{"per_prefill_pair_ns=1000", 4096},
                      StepCase{"prefill_step_ms=2", 2000}, StepCase{"lora_enabled_ms=0.25", 250},
                      StepCase{"lora_base_ms=1", 1000}, StepCase{"lora_per_adapter_us=100", 200},
                      StepCase{"lora_per_adapter_rank_us=5", 120},
                      StepCase{"lora_per_adapter_rank_us=5\nstep.pads_to_max_rank=true", 640},
                      StepCase{"lora_per_place_us=10", 80}, StepCase{"lora_per_row_us=9", 9},
                      StepCase{"lora_per_prefill_token_us=2", 128},
                      StepCase{"lora_per_prefill_token_place_ns=1000", 512}));

TEST(DeviceModelTest, AStepWithoutRowsTakesNoTime) { EXPECT_EQ(MakeDevice().StepUs({}, {}), 0); }

TEST(DeviceModelTest, ALoadHasAFixedPartAndOneForItsBytes) {
  const DeviceModel device =
      MakeDevice(kLoads + "step.base_ms=7\nadapter_bytes_per_rank=1000000\n");
  EXPECT_EQ(device.AdapterBytes(16), 16'000'000);
  EXPECT_EQ(device.host_to_device().LoadUs(100'000'000), 2500);
  EXPECT_EQ(device.disk_to_host(false).LoadUs(100'000'000), 20'000);
  EXPECT_EQ(device.disk_to_host(true).LoadUs(100'000'000), 100'000);
}

TEST(DeviceModelTest, LinesOfAnotherFormAreRefused) {
  EXPECT_THROW(MakeDevice(kLoads + "step.base_ms=7\nnonsense\n"), InvalidArgumentError);
  EXPECT_THROW(MakeDevice(kLoads + "step.base_ms=fast\n"), InvalidArgumentError);
  EXPECT_THROW(MakeDevice(kLoads), InvalidArgumentError);
  EXPECT_THROW(MakeDevice("step.base_ms=7\n"), InvalidArgumentError);
}

}  // namespace
}  // namespace lora_serve::sim
