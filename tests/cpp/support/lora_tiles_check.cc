#include "support/lora_tiles_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace lora_serve::testing {
namespace {

/// As written in the documents; the code under test has its own.
struct Sizes {
  std::int32_t few;
  std::int32_t many;
};
constexpr std::array<Sizes, 6> kSizes = {
    {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {16, 64}, {16, 128}}};

struct Group {
  std::int32_t slot = 0;
  std::int32_t start = 0;
  std::int32_t num_tokens = 0;
};

/// The groups in the order of their tiles.
std::vector<Group> GroupsOf(const PlanBlock& plan) {
  std::map<std::int32_t, Group> groups;
  std::int32_t position = 0;
  for (const std::int32_t token : plan.token_indices_sorted_by_lora_ids) {
    const std::int32_t slot = plan.token_lora_mapping[static_cast<std::size_t>(token)];
    Group& group = groups.try_emplace(slot, Group{slot, position, 0}).first->second;
    EXPECT_EQ(position, group.start + group.num_tokens) << "the group of slot " << slot;
    ++group.num_tokens;
    ++position;
  }
  std::vector<Group> in_order;
  for (const auto& [slot, group] : groups) {
    if (slot >= 0) in_order.push_back(group);
  }
  if (groups.contains(-1)) in_order.push_back(groups.at(-1));
  return in_order;
}

/// One list without entry 0, as far as the tiles of `groups` go; returns the tiles of adapters.
std::int32_t AppendTiles(const std::vector<Group>& groups, const Sizes& sizes,
                         std::vector<std::int32_t>& list) {
  std::int32_t num_adapter_tiles = 0;
  for (const Group& group : groups) {
    const std::int32_t size = 2 * group.num_tokens > sizes.many ? sizes.many : sizes.few;
    for (std::int32_t done = 0; done < group.num_tokens; done += size) {
      list.insert(list.end(),
                  {group.start + done, std::min(size, group.num_tokens - done), group.slot});
      num_adapter_tiles += group.slot >= 0 ? 1 : 0;
    }
  }
  return num_adapter_tiles;
}

}  // namespace

void ExpectLoraTilesCoverGroups(const PlanBlock& plan) {
  if (plan.block().empty()) return;
  const std::size_t num_entries =
      1 + static_cast<std::size_t>(plan.num_padded_tokens) / 16 + plan.active_lora_ids.size();
  ASSERT_EQ(plan.lora_tiles.size(), kSizes.size() * num_entries * 3);
  ASSERT_EQ(plan.Padded().lora_tiles.size(), plan.lora_tiles.size());
  const std::vector<Group> groups = GroupsOf(plan);
  for (std::size_t kind = 0; kind < kSizes.size(); ++kind) {
    std::vector<std::int32_t> expected = {0, 0, 0};
    expected[1] = AppendTiles(groups, kSizes[kind], expected);
    expected[0] = static_cast<std::int32_t>(expected.size()) / 3 - 1;
    ASSERT_LE(expected.size(), num_entries * 3) << "there is too little room for the tiles";
    expected.resize(num_entries * 3, 0);
    const auto list = plan.lora_tiles.subspan(kind * num_entries * 3, num_entries * 3);
    EXPECT_EQ(std::vector<std::int32_t>(list.begin(), list.end()), expected) << "kind " << kind;
  }
}

}  // namespace lora_serve::testing
