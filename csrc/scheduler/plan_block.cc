#include "scheduler/plan_block.h"

#include <algorithm>
#include <utility>

#include "common/check.h"
#include "scheduler/lora_tiles.h"

namespace lora_serve {
namespace {

std::size_t RoundUp(std::size_t num_entries) {
  return (num_entries + kPlanArrayAlignment - 1) / kPlanArrayAlignment * kPlanArrayAlignment;
}

/// In 64 bits: there are more int32 of tiles than tokens.
std::int64_t LengthOf(PlanAxis axis, const PlanSizes& sizes) {
  switch (axis) {
    case PlanAxis::kHeader:
      return kNumPlanHeaderEntries;
    case PlanAxis::kGroups:
      return sizes.num_groups;
    case PlanAxis::kRows:
      return sizes.num_rows;
    case PlanAxis::kTokens:
      return sizes.num_tokens;
    case PlanAxis::kLoraTiles:
      return LoraTilesLength(sizes.num_padded_tokens, sizes.num_groups);
    case PlanAxis::kDeltas:
      return sizes.num_deltas;
    case PlanAxis::kDeltaPages:
      return sizes.num_delta_pages;
  }
  LS_CHECK(false, "plan axis ", static_cast<int>(axis));
  return 0;
}

std::size_t LengthOf(const PlanArrayInfo& array, const PlanSizes& sizes) {
  return static_cast<std::size_t>(LengthOf(array.axis, sizes) + array.num_extra);
}

/// The sizes with the padded ones in the place of the others.
PlanSizes PaddedSizes(PlanSizes sizes) {
  sizes.num_rows = sizes.num_padded_rows;
  sizes.num_tokens = sizes.num_padded_tokens;
  return sizes;
}

/// Calls `visit(array, offset, padded length)` for all arrays in order; returns where they end.
template <typename Visit>
std::size_t ForEachArray(const PlanSizes& sizes, const Visit& visit) {
  const PlanSizes padded = PaddedSizes(sizes);
  std::size_t offset = 0;
  for (const PlanArrayInfo& array : kPlanArrays) {
    const std::size_t length = LengthOf(array, padded);
    visit(array, offset, length);
    offset += RoundUp(length);
  }
  return offset;
}

}  // namespace

PlanBlock::PlanBlock(const PlanBlock& other)
    : own_memory_(other.block_.begin(), other.block_.end()) {
  if (!other.block_.empty()) LayOut(other.sizes_);
}

PlanBlock& PlanBlock::operator=(const PlanBlock& other) {
  if (this != &other) *this = PlanBlock(other);
  return *this;
}

PlanBlock& PlanBlock::operator=(PlanBlock&& other) noexcept {
  PlanBlock taken(std::move(other));
  Swap(taken);
  return *this;
}

void PlanBlock::Swap(PlanBlock& other) noexcept {
  std::swap(static_cast<PlanArrays&>(*this), static_cast<PlanArrays&>(other));
  std::swap(memory, other.memory);
  std::swap(num_padded_rows, other.num_padded_rows);
  std::swap(num_padded_tokens, other.num_padded_tokens);
  std::swap(sizes_, other.sizes_);
  std::swap(own_memory_, other.own_memory_);
  std::swap(block_, other.block_);
}

void PlanBlock::Clear() {
  static_cast<PlanArrays&>(*this) = {};
  sizes_ = {};
  block_ = {};
  num_padded_rows = 0;
  num_padded_tokens = 0;
}

void PlanBlock::LayOut(const PlanSizes& sizes) {
  const std::size_t num_entries = PlanBlockSize(sizes);
  if (memory.empty()) {
    if (own_memory_.size() < num_entries) own_memory_.resize(num_entries);
    block_ = std::span(own_memory_).first(num_entries);
  } else {
    LS_CHECK(memory.size() >= num_entries, "a plan of ", num_entries, " entries in a block of ",
             memory.size());
    block_ = memory.first(num_entries);
  }
  sizes_ = sizes;
  num_padded_rows = sizes.num_padded_rows;
  num_padded_tokens = sizes.num_padded_tokens;
  ForEachArray(sizes, [&](const PlanArrayInfo& array, std::size_t offset, std::size_t length) {
    this->*array.member = block_.subspan(offset, LengthOf(array, sizes));
    std::ranges::fill(block_.subspan(offset + length, RoundUp(length) - length), 0);
  });
}

PlanArrays PlanBlock::Padded() const {
  PlanArrays arrays;
  if (block_.empty()) return arrays;
  ForEachArray(sizes_, [&](const PlanArrayInfo& array, std::size_t offset, std::size_t length) {
    arrays.*array.member = block_.subspan(offset, length);
  });
  return arrays;
}

std::size_t PlanBlockSize(const PlanSizes& sizes) {
  return ForEachArray(sizes, [](const PlanArrayInfo&, std::size_t, std::size_t) {});
}

std::int32_t PaddedBatchSize(const SchedulerOptions& options, std::int32_t num_rows) {
  const auto next = std::ranges::lower_bound(options.padded_batch_sizes, num_rows);
  return next == options.padded_batch_sizes.end() ? num_rows : *next;
}

std::size_t PlanBlockCapacity(const SchedulerOptions& options) {
  const std::int32_t num_rows = PaddedBatchSize(options, options.max_num_seqs);
  const std::size_t num_pages_per_row = (static_cast<std::size_t>(options.max_model_len) +
                                         static_cast<std::size_t>(options.page_size) - 1) /
                                        static_cast<std::size_t>(options.page_size);
  // The pages are added in 64 bits: their largest number need not fit a plan's int32 lengths.
  return PlanBlockSize({.num_groups = options.max_loras + 1,
                        .num_padded_rows = num_rows,
                        .num_padded_tokens = std::max(options.max_num_batched_tokens, num_rows),
                        .num_deltas = options.max_num_seqs}) +
         RoundUp(static_cast<std::size_t>(options.max_num_seqs) * num_pages_per_row);
}

}  // namespace lora_serve
