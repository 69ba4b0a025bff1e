#include "scheduler/page_table_rows.h"

#include <algorithm>

#include "common/check.h"

namespace lora_serve {

OwnedRow& OwnedRow::operator=(OwnedRow&& other) noexcept {
  if (this != &other) {
    Reset();
    rows_backptr_ = std::exchange(other.rows_backptr_, nullptr);
    row_ = other.row_;
  }
  return *this;
}

PageTableRow OwnedRow::row() const {
  LS_CHECK(rows_backptr_ != nullptr, "a page-table row was used after it was moved away");
  return row_;
}

void OwnedRow::Reset() noexcept {
  if (rows_backptr_ != nullptr) std::exchange(rows_backptr_, nullptr)->Return(row_);
}

PageTableRows::PageTableRows(std::int32_t num_rows)
    : rows_(static_cast<std::size_t>(num_rows)), num_free_(num_rows) {}

PageTableRows::~PageTableRows() {
  LS_FATAL(num_taken() == 0, num_taken(), " page-table rows outlive their allocator");
}

OwnedRow PageTableRows::Take() {
  LS_CHECK(HasFree(), "no page-table row is free");
  const auto it = std::find_if(rows_.begin(), rows_.end(),
                               [](const Row& row) { return row.state == RowState::kFree; });
  LS_CHECK(it != rows_.end(), "num_free=", num_free_);
  it->state = RowState::kTaken;
  --num_free_;
  return OwnedRow(this, PageTableRow(static_cast<std::int32_t>(it - rows_.begin())));
}

void PageTableRows::Return(PageTableRow row) noexcept {
  Row& entry = rows_[static_cast<std::size_t>(row.value())];
  LS_FATAL(entry.state == RowState::kTaken, "row ", row, " was given back twice");
  if (newest_plan_ == newest_ended_) {
    entry.state = RowState::kFree;
    ++num_free_;
  } else {
    entry.state = RowState::kRetired;
    entry.retired_until = newest_plan_;
    ++num_retired_;
  }
}

void PageTableRows::BeginPlan(PlanId plan_id) {
  LS_CHECK(plan_id > newest_plan_, "plan ", plan_id, " after plan ", newest_plan_);
  newest_plan_ = plan_id;
}

void PageTableRows::EndPlan(PlanId plan_id) {
  LS_CHECK(plan_id > newest_ended_ && plan_id <= newest_plan_, "plan ", plan_id,
           " ended after plan ", newest_ended_, "; the newest begun is ", newest_plan_);
  newest_ended_ = plan_id;
  if (num_retired_ == 0) return;
  for (Row& row : rows_) {
    if (row.state == RowState::kRetired && row.retired_until <= plan_id) {
      row.state = RowState::kFree;
      ++num_free_;
      --num_retired_;
    }
  }
}

void PageTableRows::CheckInvariants() const {
  const auto count = [this](RowState state) {
    return std::count_if(rows_.begin(), rows_.end(),
                         [state](const Row& row) { return row.state == state; });
  };
  LS_CHECK(count(RowState::kFree) == num_free_, "num_free=", num_free_);
  LS_CHECK(count(RowState::kRetired) == num_retired_, "num_retired=", num_retired_);
  LS_CHECK(num_retired_ == 0 || newest_plan_ != newest_ended_,
           "rows are retired although no plan is outstanding");
}

}  // namespace lora_serve
