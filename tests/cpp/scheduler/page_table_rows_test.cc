#include "scheduler/page_table_rows.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "common/errors.h"

namespace lora_serve {
namespace {

TEST(PageTableRowsTest, TakesTheLowestFreeRow) {
  PageTableRows rows(3);
  OwnedRow first = rows.Take();
  OwnedRow second = rows.Take();
  OwnedRow third = rows.Take();
  EXPECT_EQ(first.row(), PageTableRow(0));
  EXPECT_EQ(third.row(), PageTableRow(2));
  EXPECT_FALSE(rows.HasFree());
  third = OwnedRow();
  first = OwnedRow();
  EXPECT_EQ(rows.Take().row(), PageTableRow(0));
  EXPECT_EQ(second.row(), PageTableRow(1));
  rows.CheckInvariants();
}

TEST(PageTableRowsTest, RefusesToTakeWhenNoRowIsFree) {
  PageTableRows rows(1);
  const OwnedRow row = rows.Take();
  EXPECT_THROW(static_cast<void>(rows.Take()), InternalError);
}

TEST(PageTableRowsTest, ARowFreedDuringAPlanIsReusableOnlyAfterThatPlan) {
  PageTableRows rows(2);
  OwnedRow row = rows.Take();
  rows.BeginPlan(PlanId(0));
  row = OwnedRow();
  rows.CheckInvariants();
  EXPECT_EQ(rows.num_retired(), 1);
  EXPECT_EQ(rows.Take().row(), PageTableRow(1));
  rows.EndPlan(PlanId(0));
  rows.CheckInvariants();
  EXPECT_EQ(rows.num_free(), 2);
  EXPECT_EQ(rows.Take().row(), PageTableRow(0));
}

TEST(PageTableRowsTest, WaitsForTheNewestPlanThatWasOutstanding) {
  PageTableRows rows(1);
  OwnedRow row = rows.Take();
  rows.BeginPlan(PlanId(4));
  rows.BeginPlan(PlanId(5));
  row = OwnedRow();
  rows.EndPlan(PlanId(4));
  EXPECT_FALSE(rows.HasFree());
  rows.EndPlan(PlanId(5));
  EXPECT_TRUE(rows.HasFree());
}

TEST(PageTableRowsTest, MovingARowMovesTheRight) {
  PageTableRows rows(2);
  OwnedRow row = rows.Take();
  OwnedRow moved = std::move(row);
  EXPECT_FALSE(static_cast<bool>(row));  // NOLINT(bugprone-use-after-move): the point of the test
  EXPECT_THROW(static_cast<void>(row.row()), InternalError);
  OwnedRow other = rows.Take();
  other = std::move(moved);  // gives row 1 back
  EXPECT_EQ(other.row(), PageTableRow(0));
  EXPECT_EQ(rows.num_taken(), 1);
}

TEST(PageTableRowsTest, RefusesPlansOutOfOrder) {
  PageTableRows rows(1);
  EXPECT_THROW(rows.EndPlan(PlanId(0)), InternalError);
  rows.BeginPlan(PlanId(3));
  EXPECT_THROW(rows.BeginPlan(PlanId(3)), InternalError);
  EXPECT_THROW(rows.EndPlan(PlanId(4)), InternalError);
  rows.EndPlan(PlanId(3));
  EXPECT_THROW(rows.EndPlan(PlanId(3)), InternalError);
}

}  // namespace
}  // namespace lora_serve
