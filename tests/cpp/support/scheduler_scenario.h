#pragma once

#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "support/scheduler_harness.h"

namespace lora_serve::testing {

/// The base model or an adapter, with or without overlap.
using Scenario = std::tuple<std::int64_t, Overlap>;

/// Every scenario runs for the base model and for an adapter, with and without overlap.
class SchedulerScenarioTest : public ::testing::TestWithParam<Scenario> {
 protected:
  [[nodiscard]] static AdapterId adapter() { return AdapterId(std::get<0>(GetParam())); }
  [[nodiscard]] static bool IsBase() { return adapter() == kBaseAdapter; }
  [[nodiscard]] static Overlap overlap() { return std::get<1>(GetParam()); }
  [[nodiscard]] static bool IsOverlapped() { return overlap() == Overlap::kOn; }
  [[nodiscard]] static std::vector<TokenId> LongRunningPrompt(std::int32_t num_prompt_tokens,
                                                              std::int32_t num_output_tokens,
                                                              TokenId seed) {
    return MakeLongRunningPrompt(adapter(), num_prompt_tokens, num_output_tokens, seed);
  }
};

/// Without and with overlap, for tests whose adapters are their subject.
inline auto BothWays() { return ::testing::Values(Overlap::kOff, Overlap::kOn); }

inline std::string WayName(const ::testing::TestParamInfo<Overlap>& info) {
  return info.param == Overlap::kOn ? "Overlapped" : "Alone";
}

inline auto AllScenarios() {
  return ::testing::Combine(::testing::Values<std::int64_t>(0, 1),
                            ::testing::Values(Overlap::kOff, Overlap::kOn));
}

inline std::string ScenarioName(const ::testing::TestParamInfo<Scenario>& info) {
  return std::string(std::get<0>(info.param) == 0 ? "Base" : "Adapter") +
         (std::get<1>(info.param) == Overlap::kOn ? "Overlapped" : "");
}

}  // namespace lora_serve::testing
