#include "scheduler_sim/starvation_bound.h"

#include <gtest/gtest.h>

#include <vector>

namespace lora_serve::sim {
namespace {

TEST(StarvationBoundTest, IsTheFormulaOfTheScheduler) {
  BoundInputs inputs{.num_adapters = 64,
                     .num_fitting = 8,
                     .max_num_seqs = 128,
                     .num_request_steps = 65,
                     .num_load_steps = 3,
                     .num_patience_steps = 2};
  EXPECT_EQ(BoundSteps(inputs, 1), 8 * (2 * 65 + 3) + 65 + 2);
  EXPECT_EQ(BoundSteps(inputs, 16), BoundSteps(inputs, 1));
  EXPECT_EQ(BoundSteps(inputs, 17), 2 * 8 * (2 * 65 + 3) + 65 + 2);
  inputs.num_slice_steps = 4;
  const std::int64_t longest = 65 * (4 * 27 * 4 + 3 + 2);
  EXPECT_EQ(BoundSteps(inputs, 1), 8 * (2 * longest + 3) + longest + 2);
}

TEST(StarvationBoundTest, TheLongestWaitIsComparedWithItsOwnBound) {
  const BoundInputs inputs{.num_request_steps = 10};  // 30 steps for the first in its queue
  std::vector<RequestRecord> requests(2);
  requests[0] = {.num_prompt_tokens = 100, .num_waited_steps = 31, .queue_position = 2};
  requests[1] = {.num_prompt_tokens = 100, .num_waited_steps = 62, .queue_position = 1};
  EXPECT_DOUBLE_EQ(MaxBoundShare(requests, inputs, 100), 62.0 / 31);
  requests[1].was_refused = true;
  EXPECT_DOUBLE_EQ(MaxBoundShare(requests, inputs, 50), 31.0 / 52);
}

}  // namespace
}  // namespace lora_serve::sim
