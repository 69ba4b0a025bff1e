// The step's tokens grouped by adapter slot, against a stable sort, and the tiles of the groups.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "common/errors.h"
#include "scheduler/adapter_grouping.h"
#include "support/lora_tiles_check.h"

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

/// List `kind` of the plan's tiles, whose six lists have `num_entries` entries each.
Ints TilesOf(const PlanBlock& plan, std::size_t kind, std::size_t num_entries) {
  EXPECT_EQ(plan.lora_tiles.size(), 6 * num_entries * 3);
  return Copy(plan.lora_tiles.subspan(kind * num_entries * 3, num_entries * 3));
}
constexpr std::size_t k16 = 0;
constexpr std::size_t k16Or64 = 4;
constexpr std::size_t k16Or128 = 5;

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

TEST(PlanGroupingTest, TilesOfAdaptersComeBeforeThoseOfTheBase) {
  // Sorted: 18 of the base, 2 of slot 0, 20 of slot 3.
  PlanBlock plan = MakeBlock({{3, -1, 0, -1, 3}, {19, 17, 2, 1, 1}}, /*max_loras=*/2);
  AdapterGrouping().Write(plan);
  const Ints expected = {5,  3,  0,   // five tiles, three with an adapter
                         18, 2,  0,   // slot 0
                         20, 16, 3,   // slot 3
                         36, 4,  3,   //
                         0,  16, -1,  // the base
                         16, 2,  -1};
  EXPECT_EQ(TilesOf(plan, k16, /*num_entries=*/6), expected);
}

TEST(PlanGroupingTest, GroupThatFillsMoreThanHalfOfALargeTileHasLargeTiles) {
  // Groups of 32 and 33 tokens: at most, and more than, half of 64; 65 is more than half of 128.
  PlanBlock plan = MakeBlock({{5, 1, 2}, {65, 32, 33}}, /*max_loras=*/3);
  AdapterGrouping().Write(plan);
  const std::size_t num_entries = 1 + 130 / 16 + 4;
  Ints expected = {5, 5, 0, 0, 16, 1, 16, 16, 1, 32, 33, 2, 65, 64, 5, 129, 1, 5};
  expected.resize(num_entries * 3, 0);
  EXPECT_EQ(TilesOf(plan, k16Or64, num_entries), expected);
  expected = {6, 6, 0, 0, 16, 1, 16, 16, 1, 32, 16, 2, 48, 16, 2, 64, 1, 2, 65, 65, 5};
  expected.resize(num_entries * 3, 0);
  EXPECT_EQ(TilesOf(plan, k16Or128, num_entries), expected);
}

TEST(PlanGroupingTest, PaddedTokensAreInNoTileButMakeRoom) {
  PlanBlock plan = MakeBlock({{1, -1}, {1, 1}}, /*max_loras=*/2, /*num_padding=*/30);
  AdapterGrouping().Write(plan);
  const std::size_t num_entries = 1 + 32 / 16 + 3;
  Ints expected = {2, 1, 0, 1, 1, 1, 0, 1, -1};
  expected.resize(num_entries * 3, 0);
  for (std::size_t kind = 0; kind < 6; ++kind) {
    EXPECT_EQ(TilesOf(plan, kind, num_entries), expected) << kind;
  }
  EXPECT_EQ(plan.Padded().lora_tiles.size(), plan.lora_tiles.size());
}

TEST(PlanGroupingTest, StepWithoutAdaptersHasTilesOfTheBaseOnly) {
  PlanBlock plan = MakeBlock({{-1, -1}, {10, 7}}, /*max_loras=*/2);
  AdapterGrouping().Write(plan);
  EXPECT_EQ(TilesOf(plan, k16, /*num_entries=*/5),
            (Ints{2, 0, 0, 0, 16, -1, 16, 1, -1, 0, 0, 0, 0, 0, 0}));
}

TEST(PlanGroupingTest, StepWithoutRowsHasNoTile) {
  PlanBlock plan = MakeBlock({}, /*max_loras=*/2);
  AdapterGrouping().Write(plan);
  EXPECT_EQ(Copy(plan.lora_tiles), Ints(6 * 4 * 3, 0));
}

TEST(PlanGroupingTest, TilesBeyondThePaddedTokensAreAnInternalError) {
  PlanBlock plan;
  plan.LayOut({.num_groups = 2,
               .num_rows = 1,
               .num_padded_rows = 1,
               .num_tokens = 40,
               .num_padded_tokens = 40});
  plan.Writable(plan.adapter_slots)[0] = 0;
  plan.Writable(plan.num_scheduled_tokens)[0] = 400;
  EXPECT_THROW(AdapterGrouping().Write(plan), InternalError);
}

/// Groups of sizes around those of the tiles, in blocks full of garbage.
TEST(PlanGroupingTest, TilesCoverTheGroupsOfRandomSteps) {
  AdapterGrouping grouping;
  std::mt19937 random(11);
  const auto draw = [&random](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  constexpr std::array<int, 9> kNearTiles = {8, 16, 32, 48, 64, 96, 128, 160, 256};
  for (int step = 0; step < 500; ++step) {
    SCOPED_TRACE(::testing::Message() << "step " << step);
    const std::int32_t max_loras = draw(1, 12);
    Rows rows;
    for (int row = draw(0, 20); row > 0; --row) {
      rows.slots.push_back(draw(-1, max_loras - 1));
      const int near = kNearTiles[static_cast<std::size_t>(draw(0, 8))];
      rows.num_tokens.push_back(draw(0, 1) == 0 ? 1 : near + draw(-1, 1));
    }
    PlanBlock plan = MakeBlock(rows, max_loras, draw(0, 1) * draw(0, 70));
    grouping.Write(plan);
    testing::ExpectLoraTilesCoverGroups(plan);
  }
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
