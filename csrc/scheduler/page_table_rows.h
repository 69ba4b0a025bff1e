#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "common/strong_id.h"

namespace lora_serve {

class PageTableRows;

/// The right to one row of the executor's page table. Move-only; the destructor gives the row back.
class OwnedRow {
 public:
  OwnedRow() = default;
  ~OwnedRow() { Reset(); }
  OwnedRow(OwnedRow&& other) noexcept
      : rows_backptr_(std::exchange(other.rows_backptr_, nullptr)), row_(other.row_) {}
  OwnedRow& operator=(OwnedRow&& other) noexcept;
  OwnedRow(const OwnedRow&) = delete;
  OwnedRow& operator=(const OwnedRow&) = delete;

  [[nodiscard]] explicit operator bool() const { return rows_backptr_ != nullptr; }
  /// Requires: not moved from.
  [[nodiscard]] PageTableRow row() const;

 private:
  friend class PageTableRows;
  OwnedRow(PageTableRows* rows, PageTableRow row) : rows_backptr_(rows), row_(row) {}
  void Reset() noexcept;

  PageTableRows* rows_backptr_ = nullptr;
  PageTableRow row_{-1};
};

/// Hands out the rows of the executor's page table, lowest free row first.
///
/// Owns: which row is free, taken, or retired. Does not know: requests, pages, what a plan holds.
///
///     free --Take--> taken --~OwnedRow--> retired (a plan is outstanding) --EndPlan--> free
///                                    \--> free    (none is)
///
/// A retired row waits for the newest plan that was outstanding when it came back: that plan may
/// still read it. Rows must be gone before this object is.
class PageTableRows {
 public:
  /// Requires: num_rows >= 1.
  explicit PageTableRows(std::int32_t num_rows);
  ~PageTableRows();
  PageTableRows(const PageTableRows&) = delete;
  PageTableRows& operator=(const PageTableRows&) = delete;

  [[nodiscard]] bool HasFree() const { return num_free_ > 0; }
  /// Requires: HasFree(). Complexity: O(number of rows), once per admission.
  [[nodiscard]] OwnedRow Take();

  /// From now on the plan may touch every row that is taken. Requires: plan ids only grow.
  void BeginPlan(PlanId plan_id);
  /// The plan has returned: rows retired at or before it are free. Requires: plans end in order.
  void EndPlan(PlanId plan_id);

  [[nodiscard]] std::int32_t num_rows() const { return static_cast<std::int32_t>(rows_.size()); }
  [[nodiscard]] std::int32_t num_free() const { return num_free_; }
  [[nodiscard]] std::int32_t num_retired() const { return num_retired_; }
  [[nodiscard]] std::int32_t num_taken() const { return num_rows() - num_free_ - num_retired_; }

  /// Throws: InternalError when a counter disagrees with the rows.
  void CheckInvariants() const;

 private:
  friend class OwnedRow;
  enum class RowState : std::uint8_t { kFree, kTaken, kRetired };
  struct Row {
    RowState state = RowState::kFree;
    PlanId retired_until{};  // meaningful while kRetired
  };

  void Return(PageTableRow row) noexcept;

  std::vector<Row> rows_;
  std::int32_t num_free_ = 0;
  std::int32_t num_retired_ = 0;
  PlanId newest_plan_{-1};   // begun
  PlanId newest_ended_{-1};  // <= newest_plan_; equal when nothing is outstanding
};

}  // namespace lora_serve
