#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "scheduler/scheduler_options.h"

namespace lora_serve {

/// Entries of PlanArrays::header.
enum class PlanHeader : std::uint8_t {
  kNumRows,
  kNumTokens,
  kNumPaddedRows,
  kNumPaddedTokens,
  kNumDeltas,
  kNumDeltaPages,
  /// Entries in use of the arrays by adapter; one of them is the group without adapter, if any row
  /// has none.
  kNumLoraGroups,
  /// Distinct adapters of the step; 0 = no row has one.
  kNumAdapters,
};
inline constexpr std::int32_t kNumPlanHeaderEntries = 8;

/// What the device needs of a plan: views into one block, in the order of the block.
///
/// Axis letters: B rows, T tokens, L max_loras, D page-table deltas. In the block the arrays of
/// rows and tokens are followed by those of padded rows, if there are any: [P] instead of [B] and
/// [T]. A padded row has no token, no length, no adapter, and a page-table row that no request has;
/// what the padded entries hold is said with each array. They are written in every plan.
struct PlanArrays {
  using View = std::span<const std::int32_t>;

  /// [8], by PlanHeader. A device kernel can read its bounds here.
  View header;

  // --- Tokens grouped by adapter slot: group i is token_indices_sorted_by_lora_ids
  //     [lora_token_start_loc[i] : lora_token_start_loc[i + 1]]. Padded tokens are in no group. ---
  /// [L + 1], the slot of each group, ascending; -1 = the group without adapter (always the first
  /// one, where it exists), and unused.
  View active_lora_ids;
  /// [L + 1], 0 where unused.
  View num_tokens_per_lora;
  /// [L + 2], T behind the groups in use.
  View lora_token_start_loc;

  // --- Rows [B] -------------------------------------------------------------------------------
  /// Row of the executor's page table, in [0, max_num_seqs). Padded: max_num_seqs. An executor that
  /// runs padded rows gives its tables one row more, so that reading and writing by this index is
  /// harmless.
  View page_table_rows;
  /// Tokens of this row in this step, at least 1. Padded: 0.
  View num_scheduled_tokens;
  /// Position of the row's first token: tokens whose KV is already in its pages. Padded: 0.
  View num_computed_tokens;
  /// num_computed_tokens + num_scheduled_tokens. Padded: 0, so nothing is read or written.
  View seq_lens;
  /// Index into the adapter tables; -1 = no adapter. Padded: -1.
  View adapter_slots;
  /// [B + 1]: row b's tokens are [query_start_loc[b], query_start_loc[b + 1]). Padded: T.
  View query_start_loc;

  // --- Tokens [T] -----------------------------------------------------------------------------
  /// Input tokens, row after row. -1 = the token that the newest earlier plan with a row of this
  /// request sampled for it: the executor keeps the last sampled token of each page-table row.
  /// Padded: 0, a valid token.
  View token_ids;
  /// Adapter slot of each token; -1 = no adapter. Padded: -1.
  View token_lora_mapping;
  /// Positions of the tokens in the step, stably sorted by adapter slot, those without adapter
  /// first. Padded: each its own position, behind all others.
  View token_indices_sorted_by_lora_ids;
  /// [6, 1 + N, 3] with N = P // 16 + L + 1 for P padded tokens: the tiles that the groups are cut
  /// into, one list for each of kLoraTileKinds, so that a program of a kernel finds its tokens with
  /// one entry. Group by group, ascending, but the group without adapter last, so that a kernel may
  /// leave its tiles out. Entry 0 of a list: (tiles, tiles of adapters, 0); the others: (first
  /// position in token_indices_sorted_by_lora_ids, tokens, adapter slot or -1), all 0 behind the
  /// last tile. Padded tokens are in no tile. As long with the padded entries as without.
  View lora_tiles;

  // --- Page-table deltas [D]: row `delta_rows[d]` gets, from entry `delta_starts[d]` on, the pages
  //     delta_pages[delta_offsets[d] : delta_offsets[d + 1]]. Entries before the start are
  //     unchanged. -------------------------------------------------------------------------------
  View delta_rows;
  View delta_starts;
  View delta_offsets;  // [D + 1]
  View delta_pages;
};

/// How long the arrays of one block are.
struct PlanSizes {
  std::int32_t num_groups = 0;  // L + 1
  std::int32_t num_rows = 0;
  std::int32_t num_padded_rows = 0;
  std::int32_t num_tokens = 0;
  std::int32_t num_padded_tokens = 0;
  std::int32_t num_deltas = 0;
  std::int32_t num_delta_pages = 0;
};

/// What the length of an array follows. That of the tiles follows the padded tokens and the groups,
/// never the unpadded tokens.
enum class PlanAxis : std::uint8_t {
  kHeader,
  kGroups,
  kRows,
  kTokens,
  kLoraTiles,
  kDeltas,
  kDeltaPages,
};

/// One array of the block.
struct PlanArrayInfo {
  const char* name;
  PlanArrays::View PlanArrays::* member;
  PlanAxis axis;
  /// Entries beyond the axis.
  std::int32_t num_extra;
};

/// All arrays, in the order of the block. Where an array of rows, tokens or tiles starts depends on
/// max_loras and the padded sizes only, so a graph captured for P rows finds its inputs always at
/// the same places; the deltas, which no graph of a model reads, come last.
inline constexpr std::array<PlanArrayInfo, 18> kPlanArrays = {{
    {"header", &PlanArrays::header, PlanAxis::kHeader, 0},
    {"active_lora_ids", &PlanArrays::active_lora_ids, PlanAxis::kGroups, 0},
    {"num_tokens_per_lora", &PlanArrays::num_tokens_per_lora, PlanAxis::kGroups, 0},
    {"lora_token_start_loc", &PlanArrays::lora_token_start_loc, PlanAxis::kGroups, 1},
    {"page_table_rows", &PlanArrays::page_table_rows, PlanAxis::kRows, 0},
    {"num_scheduled_tokens", &PlanArrays::num_scheduled_tokens, PlanAxis::kRows, 0},
    {"num_computed_tokens", &PlanArrays::num_computed_tokens, PlanAxis::kRows, 0},
    {"seq_lens", &PlanArrays::seq_lens, PlanAxis::kRows, 0},
    {"adapter_slots", &PlanArrays::adapter_slots, PlanAxis::kRows, 0},
    {"query_start_loc", &PlanArrays::query_start_loc, PlanAxis::kRows, 1},
    {"token_ids", &PlanArrays::token_ids, PlanAxis::kTokens, 0},
    {"token_lora_mapping", &PlanArrays::token_lora_mapping, PlanAxis::kTokens, 0},
    {"token_indices_sorted_by_lora_ids", &PlanArrays::token_indices_sorted_by_lora_ids,
     PlanAxis::kTokens, 0},
    {"lora_tiles", &PlanArrays::lora_tiles, PlanAxis::kLoraTiles, 0},
    {"delta_rows", &PlanArrays::delta_rows, PlanAxis::kDeltas, 0},
    {"delta_starts", &PlanArrays::delta_starts, PlanAxis::kDeltas, 0},
    {"delta_offsets", &PlanArrays::delta_offsets, PlanAxis::kDeltas, 1},
    {"delta_pages", &PlanArrays::delta_pages, PlanAxis::kDeltaPages, 0},
}};

/// Every array starts at a multiple of this many entries (16 bytes), counted from the block's
/// start: kernels may read four entries at once, and a compiled one fits every plan.
inline constexpr std::size_t kPlanArrayAlignment = 4;

/// The arrays of one plan in one contiguous block of int32, so that one copy brings them to the
/// device. The members of PlanArrays are views without the padded entries; Padded() has them.
///
/// Owns: the block's memory, unless the caller has given some. A copy always owns its block; a move
/// takes over both. Does not know: what the arrays hold.
///
/// Invariant: every view points into block(), in the order of kPlanArrays; what lies between two
/// arrays is 0.
struct PlanBlock : PlanArrays {
  PlanBlock() = default;
  ~PlanBlock() = default;
  PlanBlock(const PlanBlock& other);
  PlanBlock& operator=(const PlanBlock& other);
  PlanBlock(PlanBlock&& other) noexcept { Swap(other); }
  PlanBlock& operator=(PlanBlock&& other) noexcept;

  /// Where the block is to be written, such as pinned memory; the caller keeps it alive and
  /// unchanged as long as the plan is read. At least PlanBlockCapacity entries, starting at a
  /// multiple of 16 bytes. Empty: the plan has memory of its own.
  std::span<std::int32_t> memory;

  /// Rows and tokens of the padded arrays.
  std::int32_t num_padded_rows = 0;
  std::int32_t num_padded_tokens = 0;

  /// The used part of the memory, all arrays and nothing else.
  [[nodiscard]] std::span<const std::int32_t> block() const { return block_; }
  /// The same arrays with their padded entries.
  [[nodiscard]] PlanArrays Padded() const;
  [[nodiscard]] std::int32_t HeaderEntry(PlanHeader entry) const {
    return header.empty() ? 0 : header[static_cast<std::size_t>(entry)];
  }

  /// Gives every array its place. What they hold is not defined before it is written.
  /// Requires: the memory given, if any, is large enough; the padded sizes are not below the
  /// others.
  void LayOut(const PlanSizes& sizes);
  /// An array of this block, padded or not, to be written.
  [[nodiscard]] std::span<std::int32_t> Writable(View array) const {
    return array.empty() ? std::span<std::int32_t>()
                         : block_.subspan(static_cast<std::size_t>(array.data() - block_.data()),
                                          array.size());
  }
  /// Makes every array empty, and keeps the memory.
  void Clear();

 private:
  void Swap(PlanBlock& other) noexcept;

  PlanSizes sizes_;
  std::vector<std::int32_t> own_memory_;
  std::span<std::int32_t> block_;
};

/// Entries of a block with arrays of these sizes.
[[nodiscard]] std::size_t PlanBlockSize(const PlanSizes& sizes);

/// The next of `padded_batch_sizes` from `num_rows` on; `num_rows` itself above the last one.
[[nodiscard]] std::int32_t PaddedBatchSize(const SchedulerOptions& options, std::int32_t num_rows);

/// Entries that hold every plan of a scheduler with these options. The worst case is a step that
/// starts max_num_seqs requests whose prompts are all cached: every row gets all its pages. That
/// last part, max_num_seqs * ceil(max_model_len / page_size), mostly is by far the largest; what is
/// copied is block(), which holds only the deltas of its step.
[[nodiscard]] std::size_t PlanBlockCapacity(const SchedulerOptions& options);

}  // namespace lora_serve
