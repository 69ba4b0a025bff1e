#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/plan_block.h"

namespace lora_serve {

/// Groups the tokens of a step by adapter slot, as segmented LoRA kernels read them: a counting
/// sort over the rows, whose tokens have one adapter each. Cuts the groups into the kernels' tiles.
///
/// Owns: the memory that the sort needs, kept from step to step. Does not know: adapters, requests.
///
/// Source: names and shapes of the arrays follow the metadata of Punica-style kernels (Chen et al.,
/// 2023); python/lora_serve/kernels/lora_metadata.py computes the same from a tensor, lora_tiles.py
/// beside it the tiles.
class AdapterGrouping {
 public:
  /// Writes the three arrays of groups, token_lora_mapping, token_indices_sorted_by_lora_ids and
  /// lora_tiles, padded entries included, and the two counts of the header.
  /// Requires: adapter_slots and num_scheduled_tokens are written; at most max_loras distinct
  /// adapters. Complexity: O(tokens + max_loras + G log G) for G adapters in the step.
  void Write(PlanBlock& plan);

 private:
  /// Distinct slots of the step to `slots_`, ascending, and their order to `group_of_slot_`.
  void FindGroups(PlanArrays::View adapter_slots);
  /// Requires: the three arrays of groups are written. Complexity: that of the array's length,
  /// O(padded tokens / 16 + max_loras) for each kind of tiles.
  void WriteTiles(PlanBlock& plan) const;
  [[nodiscard]] std::int32_t& GroupOf(std::int32_t slot) {
    return group_of_slot_[static_cast<std::size_t>(slot + 1)];
  }

  static constexpr std::int32_t kNoGroup = -1;
  std::vector<std::int32_t> slots_;
  /// By slot + 1; kNoGroup everywhere between two steps. As long as the largest slot seen.
  std::vector<std::int32_t> group_of_slot_;
  /// Of each group, where its next token goes.
  std::vector<std::int32_t> next_;
};

}  // namespace lora_serve
