// The step's tokens grouped by adapter slot, against a stable sort.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "common/errors.h"
#include "scheduler/adapter_grouping.h"

namespace lora_serve {
namespace {

using Ints = std::vector<std::int32_t>;

Ints Copy(PlanArrays::View view) { return {view.begin(), view.end()}; }

struct Rows {
  Ints slots;
  Ints num_tokens;
};

/// A block with these rows, padded by `num_padding`, whose other entries are garbage.
PlanBlock MakeBlock(const Rows& rows, std::int32_t max_loras, std::int32_t num_padding = 0) {
  const auto num_rows = static_cast<std::int32_t>(rows.slots.size());
  const std::int32_t num_tokens = std::reduce(rows.num_tokens.begin(), rows.num_tokens.end());
  PlanBlock plan;
  plan.LayOut({.num_groups = max_loras + 1,
               .num_rows = num_rows,
               .num_padded_rows = num_rows + num_padding,
               .num_tokens = num_tokens,
               .num_padded_tokens = num_tokens + num_padding});
  const PlanArrays padded = plan.Padded();
  for (const PlanArrayInfo& array : kPlanArrays) {
    std::ranges::fill(plan.Writable(padded.*array.member), -77);
  }
  std::ranges::copy(rows.slots, plan.Writable(plan.adapter_slots).begin());
  std::ranges::copy(rows.num_tokens, plan.Writable(plan.num_scheduled_tokens).begin());
  return plan;
}

TEST(PlanGroupingTest, InterleavedRowsAreGroupedBySlotInStableOrder) {
  PlanBlock plan = MakeBlock({{3, -1, 0, 3, -1, 7}, {1, 1, 1, 1, 1, 1}}, /*max_loras=*/4);
  AdapterGrouping().Write(plan);
  EXPECT_EQ(Copy(plan.token_lora_mapping), (Ints{3, -1, 0, 3, -1, 7}));
  EXPECT_EQ(Copy(plan.token_indices_sorted_by_lora_ids), (Ints{1, 4, 2, 0, 3, 5}));
  EXPECT_EQ(Copy(plan.active_lora_ids), (Ints{-1, 0, 3, 7, -1}));
  EXPECT_EQ(Copy(plan.num_tokens_per_lora), (Ints{2, 1, 2, 1, 0}));
  EXPECT_EQ(Copy(plan.lora_token_start_loc), (Ints{0, 2, 3, 5, 6, 6}));
  EXPECT_EQ(plan.HeaderEntry(PlanHeader::kNumLoraGroups), 4);
  EXPECT_EQ(plan.HeaderEntry(PlanHeader::kNumAdapters), 3);
}

TEST(PlanGroupingTest, TokensOfAChunkStayTogether) {
  PlanBlock plan = MakeBlock({{2, -1, 2}, {1, 3, 2}}, /*max_loras=*/1);
  AdapterGrouping().Write(plan);
  EXPECT_EQ(Copy(plan.token_lora_mapping), (Ints{2, -1, -1, -1, 2, 2}));
  EXPECT_EQ(Copy(plan.token_indices_sorted_by_lora_ids), (Ints{1, 2, 3, 0, 4, 5}));
  EXPECT_EQ(Copy(plan.num_tokens_per_lora), (Ints{3, 3}));
}

TEST(PlanGroupingTest, PaddedTokensAreInNoGroup) {
  PlanBlock plan = MakeBlock({{1, -1}, {1, 1}}, /*max_loras=*/2, /*num_padding=*/2);
  AdapterGrouping().Write(plan);
  const PlanArrays padded = plan.Padded();
  EXPECT_EQ(Copy(padded.token_lora_mapping), (Ints{1, -1, -1, -1}));
  EXPECT_EQ(Copy(padded.token_indices_sorted_by_lora_ids), (Ints{1, 0, 2, 3}));
  EXPECT_EQ(Copy(plan.num_tokens_per_lora), (Ints{1, 1, 0}));
  EXPECT_EQ(Copy(plan.lora_token_start_loc), (Ints{0, 1, 2, 2}));
}

TEST(PlanGroupingTest, StepWithoutRowsHasNoGroup) {
  PlanBlock plan = MakeBlock({}, /*max_loras=*/2);
  AdapterGrouping().Write(plan);
  EXPECT_EQ(Copy(plan.active_lora_ids), (Ints{-1, -1, -1}));
  EXPECT_EQ(Copy(plan.num_tokens_per_lora), (Ints{0, 0, 0}));
  EXPECT_EQ(Copy(plan.lora_token_start_loc), (Ints{0, 0, 0, 0}));
  EXPECT_EQ(plan.HeaderEntry(PlanHeader::kNumLoraGroups), 0);
  EXPECT_EQ(plan.HeaderEntry(PlanHeader::kNumAdapters), 0);
}

TEST(PlanGroupingTest, BaseRowsTakeNoneOfTheAdaptersPlaces) {
  PlanBlock plan = MakeBlock({{2, 1, 0, -1}, {1, 1, 1, 1}}, /*max_loras=*/3);
  AdapterGrouping().Write(plan);
  EXPECT_EQ(Copy(plan.active_lora_ids), (Ints{-1, 0, 1, 2}));
  PlanBlock too_many = MakeBlock({{2, 1, 0}, {1, 1, 1}}, /*max_loras=*/2);
  EXPECT_THROW(AdapterGrouping().Write(too_many), InternalError);
}

/// One grouping for all steps: nothing of an earlier step may be left over.
TEST(PlanGroupingTest, EqualsAStableSortInRandomSteps) {
  AdapterGrouping grouping;
  std::mt19937 random(4);
  const auto draw = [&random](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (int step = 0; step < 500; ++step) {
    SCOPED_TRACE(::testing::Message() << "step " << step);
    const std::int32_t max_loras = draw(1, 8);
    Ints choices{-1};
    for (std::int32_t i = 0; i < max_loras; ++i) choices.push_back(draw(0, 300));
    Rows rows;
    for (int row = draw(0, 20); row > 0; --row) {
      rows.slots.push_back(choices[static_cast<std::size_t>(draw(0, max_loras))]);
      rows.num_tokens.push_back(draw(0, 3) == 0 ? draw(2, 30) : 1);
    }
    PlanBlock plan = MakeBlock(rows, max_loras, draw(0, 1) * draw(0, 5));
    grouping.Write(plan);

    Ints mapping;
    for (std::size_t row = 0; row < rows.slots.size(); ++row) {
      mapping.insert(mapping.end(), static_cast<std::size_t>(rows.num_tokens[row]),
                     rows.slots[row]);
    }
    Ints order(mapping.size());
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, {}, [&mapping](std::int32_t token) {
      return mapping[static_cast<std::size_t>(token)];
    });
    std::map<std::int32_t, std::int32_t> counts;
    for (const std::int32_t slot : mapping) ++counts[slot];
    Ints ids;
    Ints nums;
    for (const auto& [slot, count] : counts) {
      ids.push_back(slot);
      nums.push_back(count);
    }
    ids.resize(static_cast<std::size_t>(max_loras) + 1, -1);
    nums.resize(ids.size(), 0);
    Ints starts(ids.size() + 1, 0);
    std::partial_sum(nums.begin(), nums.end(), starts.begin() + 1);
    EXPECT_EQ(Copy(plan.token_lora_mapping), mapping);
    EXPECT_EQ(Copy(plan.token_indices_sorted_by_lora_ids), order);
    EXPECT_EQ(Copy(plan.active_lora_ids), ids);
    EXPECT_EQ(Copy(plan.num_tokens_per_lora), nums);
    EXPECT_EQ(Copy(plan.lora_token_start_loc), starts);
  }
}

}  // namespace
}  // namespace lora_serve
