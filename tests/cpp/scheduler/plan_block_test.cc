// The one block that holds a plan's arrays: its layout, whose memory it is, copies and moves.
#include "scheduler/plan_block.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "scheduler/execution_plan.h"

namespace lora_serve {
namespace {

constexpr PlanSizes kSizes = {.num_groups = 4,
                              .num_rows = 3,
                              .num_padded_rows = 4,
                              .num_tokens = 3,
                              .num_padded_tokens = 4,
                              .num_deltas = 2,
                              .num_delta_pages = 5};

/// Where each array starts in the block.
std::map<std::string, std::ptrdiff_t> OffsetsOf(const PlanBlock& plan) {
  std::map<std::string, std::ptrdiff_t> offsets;
  const PlanArrays padded = plan.Padded();
  for (const PlanArrayInfo& array : kPlanArrays) {
    offsets[array.name] = (padded.*array.member).data() - plan.block().data();
  }
  return offsets;
}

/// Gives every padded entry of every array a value of its own, from `first` on.
void FillArrays(PlanBlock& plan, std::int32_t first = 100) {
  const PlanArrays padded = plan.Padded();
  for (const PlanArrayInfo& array : kPlanArrays) {
    const auto entries = plan.Writable(padded.*array.member);
    std::iota(entries.begin(), entries.end(), first);
    first += static_cast<std::int32_t>(entries.size());
  }
}

std::vector<std::int32_t> BytesOf(const PlanBlock& plan) {
  return {plan.block().begin(), plan.block().end()};
}

/// Every view, padded or not, lies in the block of `plan`.
void ExpectViewsInside(const PlanBlock& plan) {
  const PlanArrays padded = plan.Padded();
  const auto* const begin = plan.block().data();
  const auto* const end = begin + plan.block().size();
  for (const PlanArrayInfo& array : kPlanArrays) {
    const PlanArrays::View view = plan.*array.member;
    const PlanArrays::View padded_view = padded.*array.member;
    EXPECT_TRUE(begin <= view.data() && view.data() + view.size() <= end) << array.name;
    EXPECT_EQ(view.data(), padded_view.data()) << array.name;
    EXPECT_LE(view.size(), padded_view.size()) << array.name;
    EXPECT_LE(padded_view.data() + padded_view.size(), end) << array.name;
  }
}

TEST(PlanBlockTest, ArraysFollowEachOtherAtMultiplesOf16Bytes) {
  PlanBlock plan;
  std::vector<std::int32_t> memory(PlanBlockSize(kSizes), -7);
  plan.memory = memory;
  plan.LayOut(kSizes);
  FillArrays(plan);

  const PlanArrays padded = plan.Padded();
  std::size_t end = 0;
  for (const PlanArrayInfo& array : kPlanArrays) {
    const PlanArrays::View view = padded.*array.member;
    const auto offset = static_cast<std::size_t>(view.data() - plan.block().data());
    EXPECT_EQ(offset % kPlanArrayAlignment, 0U) << array.name;
    EXPECT_TRUE(offset >= end && offset < end + kPlanArrayAlignment) << array.name;
    for (std::size_t gap = end; gap < offset; ++gap) EXPECT_EQ(plan.block()[gap], 0) << gap;
    end = offset + view.size();
  }
  EXPECT_EQ(plan.block().size(), PlanBlockSize(kSizes));
  EXPECT_LT(plan.block().size() - end, kPlanArrayAlignment);
  EXPECT_EQ(plan.block().data(), memory.data());
}

TEST(PlanBlockTest, MembersAreTheUnpaddedPartOfEachArray) {
  PlanBlock plan;
  plan.LayOut(kSizes);
  ExpectViewsInside(plan);
  const PlanArrays padded = plan.Padded();
  EXPECT_EQ(plan.header.size(), 8U);
  EXPECT_EQ(plan.active_lora_ids.size(), 4U);
  EXPECT_EQ(plan.lora_token_start_loc.size(), 5U);
  EXPECT_EQ(plan.seq_lens.size(), 3U);
  EXPECT_EQ(padded.seq_lens.size(), 4U);
  EXPECT_EQ(plan.query_start_loc.size(), 4U);
  EXPECT_EQ(padded.query_start_loc.size(), 5U);
  EXPECT_EQ(plan.token_ids.size(), 3U);
  EXPECT_EQ(padded.token_ids.size(), 4U);
  EXPECT_EQ(plan.lora_tiles.size(), 6U * 5 * 3);
  EXPECT_EQ(padded.lora_tiles.size(), plan.lora_tiles.size());
  EXPECT_EQ(plan.delta_rows.size(), 2U);
  EXPECT_EQ(plan.delta_offsets.size(), 3U);
  EXPECT_EQ(plan.delta_pages.size(), 5U);
  EXPECT_EQ(plan.num_padded_rows, 4);
  EXPECT_EQ(plan.num_padded_tokens, 4);
}

TEST(PlanBlockTest, ArraysOfOneGraphSizeAreAlwaysAtTheSamePlaces) {
  PlanBlock full;
  full.LayOut({.num_groups = 9,
               .num_rows = 16,
               .num_padded_rows = 16,
               .num_tokens = 16,
               .num_padded_tokens = 16});
  PlanBlock padded;
  padded.LayOut({.num_groups = 9,
                 .num_rows = 11,
                 .num_padded_rows = 16,
                 .num_tokens = 11,
                 .num_padded_tokens = 16,
                 .num_deltas = 7,
                 .num_delta_pages = 1000});
  auto expected = OffsetsOf(full);
  auto found = OffsetsOf(padded);
  for (const char* name : {"delta_starts", "delta_offsets", "delta_pages"}) {
    expected.erase(name);  // these depend on the deltas before them
    found.erase(name);
  }
  EXPECT_EQ(found, expected);
}

TEST(PlanBlockTest, CopyOwnsABlockOfItsOwn) {
  std::optional<ExecutionPlan> original(std::in_place);
  original->LayOut(kSizes);
  original->request_ids = {5, 6, 7};
  FillArrays(*original);
  const std::vector<std::int32_t> bytes = BytesOf(*original);

  const ExecutionPlan copy = *original;
  ExecutionPlan assigned;
  assigned.LayOut({.num_groups = 1});
  assigned = *original;
  FillArrays(*original, 9000);
  original.reset();

  for (const ExecutionPlan* plan : std::vector<const ExecutionPlan*>{&copy, &assigned}) {
    ExpectViewsInside(*plan);
    EXPECT_EQ(BytesOf(*plan), bytes);
    EXPECT_EQ(plan->num_padded_rows, 4);
    EXPECT_EQ(plan->seq_lens.size(), 3U);
    EXPECT_EQ(plan->request_ids, (std::vector<std::int64_t>{5, 6, 7}));
  }
}

TEST(PlanBlockTest, CopyLeavesTheCallersMemoryAlone) {
  std::vector<std::int32_t> memory(PlanBlockSize(kSizes));
  std::vector<std::int32_t> other_memory(PlanBlockSize(kSizes), -1);
  ExecutionPlan plan;
  plan.memory = memory;
  plan.LayOut(kSizes);
  FillArrays(plan);
  const std::vector<std::int32_t> bytes = BytesOf(plan);

  ExecutionPlan copy;
  copy.memory = other_memory;
  copy = plan;
  std::ranges::fill(memory, 0);

  EXPECT_EQ(BytesOf(copy), bytes);
  EXPECT_TRUE(copy.memory.empty());
  EXPECT_EQ(other_memory, std::vector<std::int32_t>(other_memory.size(), -1));
}

TEST(PlanBlockTest, MoveTakesTheBlockOver) {
  ExecutionPlan plan;
  plan.LayOut(kSizes);
  FillArrays(plan);
  const std::vector<std::int32_t> bytes = BytesOf(plan);
  const std::int32_t* const address = plan.block().data();

  ExecutionPlan moved = std::move(plan);
  EXPECT_EQ(moved.block().data(), address);
  ExecutionPlan assigned;
  assigned.LayOut({.num_groups = 1});
  assigned = std::move(moved);

  EXPECT_EQ(assigned.block().data(), address);
  EXPECT_EQ(BytesOf(assigned), bytes);
  EXPECT_EQ(assigned.num_padded_rows, 4);
  ExpectViewsInside(assigned);
  for (const ExecutionPlan* left : {&plan, &moved}) {  // NOLINT(bugprone-use-after-move)
    EXPECT_TRUE(left->block().empty());
    EXPECT_TRUE(left->seq_lens.empty());
    EXPECT_EQ(left->num_padded_rows, 0);
  }
}

TEST(PlanBlockTest, PlanAssignedToItselfStaysTheSame) {
  ExecutionPlan plan;
  plan.LayOut(kSizes);
  FillArrays(plan);
  const std::vector<std::int32_t> bytes = BytesOf(plan);
  const ExecutionPlan& same = plan;
  plan = same;
  ExpectViewsInside(plan);
  EXPECT_EQ(BytesOf(plan), bytes);
}

TEST(PlanBlockTest, ClearedPlanHasNoEntryAndTakesTheNextLayout) {
  ExecutionPlan plan;
  plan.LayOut(kSizes);
  plan.Clear();
  EXPECT_TRUE(plan.block().empty());
  for (const PlanArrayInfo& array : kPlanArrays) EXPECT_TRUE((plan.*array.member).empty());
  EXPECT_EQ(plan.HeaderEntry(PlanHeader::kNumAdapters), 0);
  const ExecutionPlan copy = plan;
  EXPECT_TRUE(copy.block().empty());
  plan.LayOut(kSizes);
  ExpectViewsInside(plan);
}

TEST(PlanBlockTest, BlockBeyondTheCallersMemoryIsAnInternalError) {
  std::vector<std::int32_t> memory(PlanBlockSize(kSizes) - 1);
  PlanBlock plan;
  plan.memory = memory;
  EXPECT_THROW(plan.LayOut(kSizes), InternalError);
}

TEST(PlanBlockTest, BatchSizesArePaddedToTheNextOne) {
  SchedulerOptions options;
  EXPECT_EQ(PaddedBatchSize(options, 5), 5) << "nothing is padded by default";
  options.padded_batch_sizes = {1, 4, 16};
  EXPECT_EQ(PaddedBatchSize(options, 1), 1);
  EXPECT_EQ(PaddedBatchSize(options, 2), 4);
  EXPECT_EQ(PaddedBatchSize(options, 4), 4);
  EXPECT_EQ(PaddedBatchSize(options, 5), 16);
  EXPECT_EQ(PaddedBatchSize(options, 16), 16);
  EXPECT_EQ(PaddedBatchSize(options, 17), 17) << "above the last size";
}

TEST(PlanBlockTest, CapacityIsThatOfTheLargestPlan) {
  SchedulerOptions options{.page_size = 16,
                           .max_num_seqs = 10,
                           .max_num_batched_tokens = 100,
                           .max_model_len = 1000,
                           .max_loras = 3};
  const PlanSizes largest = {.num_groups = 4,
                             .num_rows = 10,
                             .num_padded_rows = 10,
                             .num_tokens = 100,
                             .num_padded_tokens = 100,
                             .num_deltas = 10,
                             .num_delta_pages = 10 * 63};
  EXPECT_EQ(PlanBlockCapacity(options), PlanBlockSize(largest));
  options.padded_batch_sizes = {8, 200};  // a graph may be larger than every batch
  PlanSizes padded = largest;
  padded.num_padded_rows = 200;
  padded.num_padded_tokens = 200;
  EXPECT_EQ(PlanBlockCapacity(options), PlanBlockSize(padded));
}

}  // namespace
}  // namespace lora_serve
