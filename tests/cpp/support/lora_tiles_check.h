#pragma once

#include "scheduler/plan_block.h"

namespace lora_serve::testing {

/// Each list of the plan's `lora_tiles` covers the tokens of each group exactly, group by group,
/// adapters first, in tiles of the kind's sizes, and is 0 behind them. Reads the groups from
/// token_lora_mapping and token_indices_sorted_by_lora_ids. A plan without a block passes.
void ExpectLoraTilesCoverGroups(const PlanBlock& plan);

}  // namespace lora_serve::testing
