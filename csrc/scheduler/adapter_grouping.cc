#include "scheduler/adapter_grouping.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <span>

#include "common/check.h"
#include "scheduler/lora_tiles.h"

namespace lora_serve {

void AdapterGrouping::FindGroups(PlanArrays::View adapter_slots) {
  slots_.clear();
  for (const std::int32_t slot : adapter_slots) {
    const auto index = static_cast<std::size_t>(slot + 1);
    if (index >= group_of_slot_.size()) group_of_slot_.resize(index + 1, kNoGroup);
    if (group_of_slot_[index] != kNoGroup) continue;
    group_of_slot_[index] = 0;
    slots_.push_back(slot);
  }
  std::ranges::sort(slots_);
  for (std::size_t group = 0; group < slots_.size(); ++group) {
    GroupOf(slots_[group]) = static_cast<std::int32_t>(group);
  }
}

void AdapterGrouping::WriteTiles(PlanBlock& plan) const {
  // With at most max_loras adapters, which Write has checked, so many tokens fit the lists.
  LS_CHECK(plan.lora_token_start_loc.back() <= plan.num_padded_tokens, "tiles for ",
           plan.num_padded_tokens, " tokens, but the groups have ",
           plan.lora_token_start_loc.back());
  const std::size_t first_adapter = !slots_.empty() && slots_.front() < 0 ? 1 : 0;
  const auto lists = plan.Writable(plan.lora_tiles);
  const std::size_t length = lists.size() / kLoraTileKinds.size();
  for (std::size_t index = 0; index < kLoraTileKinds.size(); ++index) {
    const auto entries = lists.subspan(index * length, length);
    auto next = entries.begin() + kLoraTileFields;
    const auto num_tiles = [&entries, &next] {
      return static_cast<std::int32_t>((next - entries.begin()) / kLoraTileFields) - 1;
    };
    const auto cut = [&](std::size_t group) {
      const std::int32_t end = plan.lora_token_start_loc[group + 1];
      const std::int32_t size = kLoraTileKinds[index].TileSize(plan.num_tokens_per_lora[group]);
      for (std::int32_t start = plan.lora_token_start_loc[group]; start < end; start += size) {
        *next++ = start;
        *next++ = std::min(size, end - start);
        *next++ = slots_[group];
      }
    };
    for (std::size_t group = first_adapter; group < slots_.size(); ++group) cut(group);
    entries[1] = num_tiles();
    if (first_adapter > 0) cut(0);
    entries[0] = num_tiles();
    entries[2] = 0;
    std::fill(next, entries.end(), 0);
  }
}

void AdapterGrouping::Write(PlanBlock& plan) {
  FindGroups(plan.adapter_slots);
  const bool has_base_group = !slots_.empty() && slots_.front() < 0;
  const std::size_t num_adapters = slots_.size() - (has_base_group ? 1 : 0);
  LS_CHECK(num_adapters < plan.active_lora_ids.size(), "a step of ", num_adapters,
           " adapters, but max_loras is ", plan.active_lora_ids.size() - 1);
  const auto header = plan.Writable(plan.header);
  header[static_cast<std::size_t>(PlanHeader::kNumLoraGroups)] =
      static_cast<std::int32_t>(slots_.size());
  header[static_cast<std::size_t>(PlanHeader::kNumAdapters)] =
      static_cast<std::int32_t>(num_adapters);

  const auto ids = plan.Writable(plan.active_lora_ids);
  const auto counts = plan.Writable(plan.num_tokens_per_lora);
  const auto starts = plan.Writable(plan.lora_token_start_loc);
  std::ranges::fill(std::ranges::copy(slots_, ids.begin()).out, ids.end(), -1);
  std::ranges::fill(counts, 0);
  for (std::size_t row = 0; row < plan.adapter_slots.size(); ++row) {
    counts[static_cast<std::size_t>(GroupOf(plan.adapter_slots[row]))] +=
        plan.num_scheduled_tokens[row];
  }
  starts[0] = 0;
  std::partial_sum(counts.begin(), counts.end(), starts.begin() + 1);
  WriteTiles(plan);

  const PlanArrays padded = plan.Padded();
  const auto mapping = plan.Writable(padded.token_lora_mapping);
  const auto order = plan.Writable(padded.token_indices_sorted_by_lora_ids);
  next_.assign(starts.begin(), starts.end());
  std::int32_t token = 0;
  for (std::size_t row = 0; row < plan.adapter_slots.size(); ++row) {
    const std::int32_t slot = plan.adapter_slots[row];
    std::int32_t& next = next_[static_cast<std::size_t>(GroupOf(slot))];
    for (const std::int32_t end = token + plan.num_scheduled_tokens[row]; token < end; ++token) {
      mapping[static_cast<std::size_t>(token)] = slot;
      order[static_cast<std::size_t>(next++)] = token;
    }
  }
  for (; token < static_cast<std::int32_t>(mapping.size()); ++token) {
    mapping[static_cast<std::size_t>(token)] = -1;
    order[static_cast<std::size_t>(token)] = token;
  }
  for (const std::int32_t slot : slots_) GroupOf(slot) = kNoGroup;
}

}  // namespace lora_serve
