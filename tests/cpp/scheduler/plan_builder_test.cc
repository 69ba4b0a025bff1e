// The rows of a scheduler's plans as arrays: padding, metadata, the caller's memory.
#include "scheduler/plan_builder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "scheduler/scheduler.h"

namespace lora_serve {
namespace {

using Ints = std::vector<std::int32_t>;

Ints Copy(PlanArrays::View view) { return {view.begin(), view.end()}; }

SchedulerOptions Options(std::vector<std::int32_t> padded_batch_sizes = {}) {
  return {.page_size = 4,
          .num_device_pages = 64,
          .max_num_seqs = 6,
          .max_num_batched_tokens = 32,
          .max_model_len = 32,
          .max_loras = 2,
          .scheduling_policy = SchedulingPolicy::kFcfs,
          .padded_batch_sizes = std::move(padded_batch_sizes)};
}

/// A scheduler whose plans are answered with made-up tokens.
class PlanBuilderTest : public ::testing::TestWithParam<std::int64_t> {
 protected:
  void Start(const SchedulerOptions& options) {
    scheduler_ = std::make_unique<Scheduler>(options);
    if (adapter() == kBaseAdapter) return;
    scheduler_->OpenAdapter(adapter(), {});
    Step();
  }
  AdapterId adapter() const { return AdapterId(GetParam()); }
  std::int32_t slot() const { return adapter() == kBaseAdapter ? -1 : 0; }
  void Add(std::int64_t id, Ints prompt, AdapterId of_adapter) {
    scheduler_->AddRequest({.request_id = RequestId(id),
                            .adapter_id = of_adapter,
                            .prompt_token_ids = std::move(prompt),
                            .max_tokens = 8});
  }
  void Add(std::int64_t id, Ints prompt) { Add(id, std::move(prompt), adapter()); }
  ExecutionEvent EventFor(const ExecutionPlan& plan) const {
    ExecutionEvent event;
    event.plan_id = plan.plan_id;
    event.loaded_adapter_ids = plan.load_adapter_ids;
    for (const std::uint8_t samples : plan.samples_token) {
      event.sampled_token_ids.push_back(samples == 1 ? 500 : -1);
      event.is_finished.push_back(0);
    }
    return event;
  }
  /// One step into `plan_`.
  void Step() {
    scheduler_->NextPlan(++now_us_, plan_);
    scheduler_->Advance(EventFor(plan_));
  }

  std::unique_ptr<Scheduler> scheduler_;
  ExecutionPlan plan_;
  std::int64_t now_us_ = 0;
};

TEST_P(PlanBuilderTest, RowsOfAMixedStepHaveTheirLengthsAndStarts) {
  Start(Options({8}));
  Add(1, {10, 11, 12, 13, 14});
  Step();
  Add(2, {20, 21, 22}, kBaseAdapter);
  Step();
  EXPECT_EQ(Copy(plan_.num_scheduled_tokens), (Ints{1, 3}));
  EXPECT_EQ(Copy(plan_.num_computed_tokens), (Ints{5, 0}));
  EXPECT_EQ(Copy(plan_.seq_lens), (Ints{6, 3}));
  EXPECT_EQ(Copy(plan_.query_start_loc), (Ints{0, 1, 4}));
  EXPECT_EQ(Copy(plan_.token_ids), (Ints{500, 20, 21, 22}));
  EXPECT_EQ(Copy(plan_.adapter_slots), (Ints{slot(), -1}));
  EXPECT_EQ(Copy(plan_.token_lora_mapping), (Ints{slot(), -1, -1, -1}));
  EXPECT_EQ(plan_.HeaderEntry(PlanHeader::kNumRows), 2);
  EXPECT_EQ(plan_.HeaderEntry(PlanHeader::kNumTokens), 4);
  EXPECT_EQ(plan_.HeaderEntry(PlanHeader::kNumAdapters), slot() + 1);
  EXPECT_EQ(plan_.num_padded_rows, 2) << "a plan with a prefill runs in no decode graph";
  EXPECT_EQ(plan_.num_padded_tokens, 4);
}

TEST_P(PlanBuilderTest, DecodesArePaddedWithRowsThatDoNothing) {
  Start(Options({1, 5, 8}));
  Add(1, {10, 11, 12});
  Add(2, {20, 21, 22, 23}, kBaseAdapter);
  Step();
  Step();
  EXPECT_EQ(plan_.num_padded_rows, 5);
  EXPECT_EQ(plan_.num_padded_tokens, 5);
  const PlanArrays padded = plan_.Padded();
  EXPECT_EQ(Copy(padded.page_table_rows), (Ints{0, 1, 6, 6, 6}));
  EXPECT_EQ(Copy(padded.num_scheduled_tokens), (Ints{1, 1, 0, 0, 0}));
  EXPECT_EQ(Copy(padded.num_computed_tokens), (Ints{3, 4, 0, 0, 0}));
  EXPECT_EQ(Copy(padded.seq_lens), (Ints{4, 5, 0, 0, 0}));
  EXPECT_EQ(Copy(padded.adapter_slots), (Ints{slot(), -1, -1, -1, -1}));
  EXPECT_EQ(Copy(padded.query_start_loc), (Ints{0, 1, 2, 2, 2, 2}));
  EXPECT_EQ(Copy(padded.token_ids), (Ints{500, 500, 0, 0, 0}));
  EXPECT_EQ(Copy(padded.token_lora_mapping), (Ints{slot(), -1, -1, -1, -1}));
  const Ints order = slot() == 0 ? Ints{1, 0, 2, 3, 4} : Ints{0, 1, 2, 3, 4};
  EXPECT_EQ(Copy(padded.token_indices_sorted_by_lora_ids), order);
  EXPECT_EQ(plan_.HeaderEntry(PlanHeader::kNumRows), 2);
  EXPECT_EQ(plan_.HeaderEntry(PlanHeader::kNumPaddedRows), 5);
  EXPECT_EQ(plan_.HeaderEntry(PlanHeader::kNumPaddedTokens), 5);
  EXPECT_EQ(plan_.request_ids.size(), 2U);
  EXPECT_EQ(plan_.seq_lens.size(), 2U) << "the members show no padding";
}

TEST_P(PlanBuilderTest, ATokenThatOnlyTheExecutorKnowsIsMinusOne) {
  Start(Options({4}));
  Add(1, {10, 11, 12});
  ExecutionPlan first;
  scheduler_->NextPlan(++now_us_, first);
  ExecutionPlan second;
  scheduler_->NextPlan(++now_us_, second);  // while the first, which samples, is outstanding
  EXPECT_EQ(Copy(second.token_ids), Ints{-1});
  EXPECT_EQ(Copy(second.num_computed_tokens), Ints{3});
  EXPECT_EQ(Copy(second.seq_lens), Ints{4});
  EXPECT_EQ(Copy(second.Padded().token_ids), (Ints{-1, 0, 0, 0})) << "padding is a valid token";
  scheduler_->Advance(EventFor(first));
  scheduler_->Advance(EventFor(second));
  Step();
  EXPECT_EQ(Copy(plan_.token_ids), Ints{500}) << "known again";
}

TEST_P(PlanBuilderTest, PlansAboveTheLargestGraphAndWithoutRowsAreNotPadded) {
  Start(Options({1, 2}));
  EXPECT_EQ(scheduler_->NextPlan(++now_us_).num_padded_rows, 0) << "nothing runs";
  for (std::int64_t id = 1; id <= 3; ++id) Add(id, {1, 2, 3});
  Step();
  Step();
  EXPECT_EQ(plan_.num_padded_rows, 3);
}

TEST_P(PlanBuilderTest, DeltasNameOnlyPagesThatAreNew) {
  Start(Options());
  Add(1, {1, 2, 3, 4, 5, 6});
  Step();
  EXPECT_EQ(Copy(plan_.delta_rows), (Ints{0}));
  EXPECT_EQ(Copy(plan_.delta_starts), (Ints{0}));
  EXPECT_EQ(Copy(plan_.delta_offsets), (Ints{0, 2}));
  EXPECT_EQ(plan_.HeaderEntry(PlanHeader::kNumDeltas), 1);
  EXPECT_EQ(plan_.HeaderEntry(PlanHeader::kNumDeltaPages), 2);
  Step();  // the 7th and 8th token lie in the second page
  Step();
  EXPECT_TRUE(plan_.delta_rows.empty());
  EXPECT_EQ(Copy(plan_.delta_offsets), (Ints{0}));
  Step();
  EXPECT_EQ(Copy(plan_.delta_starts), (Ints{2}));
  EXPECT_EQ(Copy(plan_.delta_offsets), (Ints{0, 1}));
}

TEST_P(PlanBuilderTest, CallersMemoryHoldsTheSameBlock) {
  Start(Options({8}));
  const auto expected_scheduler = std::move(scheduler_);
  now_us_ = 0;
  Start(Options({8}));
  std::vector<std::int32_t> memory(PlanBlockCapacity(Options({8})), -7);
  ExecutionPlan plan;
  plan.memory = memory;
  const std::int64_t now_us = now_us_;
  for (Scheduler* scheduler : {expected_scheduler.get(), scheduler_.get()}) {
    scheduler->AddRequest({.request_id = RequestId(1),
                           .adapter_id = adapter(),
                           .prompt_token_ids = {1, 2, 3, 4, 5},
                           .max_tokens = 4});
  }
  for (int step = 1; step <= 4; ++step) {
    const ExecutionPlan& expected = expected_scheduler->NextPlan(now_us + step);
    scheduler_->NextPlan(now_us + step, plan);
    EXPECT_EQ(plan.block().data(), memory.data());
    EXPECT_EQ(Copy(plan.block()), Copy(expected.block())) << "step " << step;
    expected_scheduler->Advance(EventFor(expected));
    scheduler_->Advance(EventFor(plan));
  }
}

TEST_P(PlanBuilderTest, MemoryThatNeedNotHoldThePlanIsRefusedBeforeAnythingChanges) {
  Start(Options());
  Add(1, {1, 2, 3});
  const std::size_t capacity = PlanBlockCapacity(Options());
  std::vector<std::int32_t> memory(capacity + 1);
  ExecutionPlan plan;
  plan.memory = std::span(memory).first(capacity - 1);
  try {
    scheduler_->NextPlan(++now_us_, plan);
    FAIL() << "a plan was written into memory that is too small";
  } catch (const InvalidArgumentError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(std::to_string(capacity - 1) + " int32"), std::string::npos) << message;
    EXPECT_NE(message.find("at least " + std::to_string(capacity)), std::string::npos) << message;
  }
  plan.memory = std::span(memory).subspan(1);
  EXPECT_THROW(scheduler_->NextPlan(now_us_, plan), InvalidArgumentError) << "not aligned";
  EXPECT_EQ(scheduler_->Stats().num_waiting_requests, 1);
  scheduler_->CheckInvariants();
  plan.memory = std::span(memory).first(capacity);
  scheduler_->NextPlan(now_us_, plan);
  EXPECT_EQ(Copy(plan.token_ids), (Ints{1, 2, 3}));
}

TEST_P(PlanBuilderTest, LargestPlanFitsTheCapacityExactly) {
  // All prompts share their pages, so that every row's delta has all but the newest one at once.
  SchedulerOptions options = Options();
  options.max_num_batched_tokens = 7;
  Start(options);
  Ints prompt(31);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<std::int32_t>(i);
  const auto add = [&](std::int64_t id) {
    scheduler_->AddRequest({.request_id = RequestId(id),
                            .adapter_id = adapter(),
                            .prompt_token_ids = prompt,
                            .max_tokens = 1});
  };
  add(1);
  while (scheduler_->HasWork()) Step();
  std::vector<std::int32_t> memory(PlanBlockCapacity(options));
  plan_.memory = memory;
  for (std::int64_t id = 2; id <= 3; ++id) add(id);
  Step();
  EXPECT_EQ(Copy(plan_.delta_offsets), (Ints{0, 8, 16}));
  EXPECT_LE(plan_.block().size(), memory.size());
}

INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, PlanBuilderTest, ::testing::Values(0, 3));

}  // namespace
}  // namespace lora_serve
