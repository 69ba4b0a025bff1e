#include "kv_prefix_cache/page_pool.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "common/errors.h"

namespace lora_serve {
namespace {

std::vector<std::int32_t> Values(const OwnedPages& pages) {
  std::vector<std::int32_t> values;
  for (const PageId page : pages.ids()) values.push_back(page.value());
  return values;
}

using Ids = std::vector<std::int32_t>;

TEST(PagePoolTest, HandsOutAscendingPagesAtFirst) {
  PagePool pool(4);
  const OwnedPages first = pool.Allocate(2);
  const OwnedPages second = pool.Allocate(2);
  EXPECT_EQ(Values(first), (Ids{0, 1}));
  EXPECT_EQ(Values(second), (Ids{2, 3}));
  EXPECT_EQ(pool.num_free_pages(), 0);
  pool.CheckInvariants();
}

TEST(PagePoolTest, ReusesTheLastReturnedPagesFirst) {
  PagePool pool(6);
  OwnedPages first = pool.Allocate(2);
  OwnedPages second = pool.Allocate(2);
  first = {};
  second = {};
  EXPECT_EQ(Values(pool.Allocate(3)), (Ids{2, 3, 0}));
  pool.CheckInvariants();
}

TEST(PagePoolTest, KnowsWhichPagesAreFree) {
  PagePool pool(3);
  const OwnedPages pages = pool.Allocate(1);
  EXPECT_FALSE(pool.IsFree(PageId{0}));
  EXPECT_TRUE(pool.IsFree(PageId{1}));
  EXPECT_THROW((void)pool.IsFree(PageId{3}), InternalError);
  EXPECT_THROW((void)pool.IsFree(PageId{-1}), InternalError);
}

TEST(PagePoolTest, RefusesMoreThanIsFreeAndChangesNothing) {
  PagePool pool(3);
  const OwnedPages pages = pool.Allocate(2);
  EXPECT_THROW((void)pool.Allocate(2), InternalError);
  EXPECT_THROW((void)pool.Allocate(-1), InternalError);
  EXPECT_EQ(pool.num_free_pages(), 1);
  EXPECT_EQ(pool.Allocate(0).size(), 0);
  EXPECT_THROW(PagePool(0), InternalError);
}

TEST(PagePoolDeathTest, DiesWhenPagesOutliveIt) {
  EXPECT_DEATH(
      {
        OwnedPages pages;
        PagePool pool(3);
        pages = pool.Allocate(2);
      },
      "2 of its 3 pages were still out");
}

TEST(OwnedPagesTest, ReturnsItsPagesWhenItDies) {
  PagePool pool(3);
  {
    const OwnedPages pages = pool.Allocate(3);
    EXPECT_EQ(pool.num_free_pages(), 0);
  }
  EXPECT_EQ(pool.num_free_pages(), 3);
}

TEST(OwnedPagesTest, MoveAssignmentReleasesThePagesHeldBefore) {
  PagePool pool(4);
  OwnedPages target = pool.Allocate(1);
  OwnedPages source = pool.Allocate(2);
  target = std::move(source);
  EXPECT_EQ(Values(target), (Ids{1, 2}));
  EXPECT_TRUE(pool.IsFree(PageId{0}));
  EXPECT_EQ(pool.num_free_pages(), 2);
}

TEST(OwnedPagesTest, SelfMoveAssignmentKeepsThePages) {
  PagePool pool(2);
  OwnedPages pages = pool.Allocate(2);
  OwnedPages& alias = pages;
  pages = std::move(alias);
  EXPECT_EQ(Values(pages), (Ids{0, 1}));
}

TEST(OwnedPagesTest, MovedFromOwnersAreEmptyAndUsable) {
  PagePool pool(2);
  OwnedPages source = pool.Allocate(1);
  OwnedPages target(std::move(source));
  EXPECT_TRUE(source.IsEmpty());  // NOLINT(bugprone-use-after-move): this is the point
  source.Append(pool.Allocate(1));
  EXPECT_EQ(Values(source), (Ids{1}));
  EXPECT_EQ(Values(target), (Ids{0}));
}

TEST(OwnedPagesTest, TakeFrontDividesInOrder) {
  PagePool pool(5);
  OwnedPages pages = pool.Allocate(5);
  const OwnedPages front = pages.TakeFront(2);
  EXPECT_EQ(Values(front), (Ids{0, 1}));
  EXPECT_EQ(Values(pages), (Ids{2, 3, 4}));
  const OwnedPages all = pages.TakeFront(3);
  EXPECT_EQ(Values(all), (Ids{2, 3, 4}));
  EXPECT_TRUE(pages.IsEmpty());
  EXPECT_TRUE(pages.TakeFront(0).IsEmpty());
  EXPECT_THROW((void)pages.TakeFront(1), InternalError);
}

TEST(OwnedPagesTest, AppendKeepsTheOrder) {
  PagePool pool(4);
  OwnedPages head = pool.Allocate(2);
  OwnedPages tail = pool.Allocate(2);
  head.Append(std::move(tail));
  EXPECT_EQ(Values(head), (Ids{0, 1, 2, 3}));
  EXPECT_EQ(pool.num_free_pages(), 0);
  head.Append({});
  EXPECT_EQ(head.size(), 4);
}

TEST(OwnedPagesTest, AppendRefusesPagesOfAnotherPool) {
  PagePool pool(1);
  PagePool other_pool(1);
  OwnedPages pages = pool.Allocate(1);
  EXPECT_THROW(pages.Append(other_pool.Allocate(1)), InternalError);
  EXPECT_EQ(other_pool.num_free_pages(), 1);
}

TEST(OwnedPagesTest, ReleaseBackReturnsTheLastPages) {
  PagePool pool(4);
  OwnedPages pages = pool.Allocate(4);
  pages.ReleaseBack(3);
  EXPECT_EQ(Values(pages), (Ids{0}));
  EXPECT_EQ(pool.num_free_pages(), 3);
}

TEST(OwnedPagesDeathTest, ReleasingMoreThanItHasIsFatal) {
  PagePool pool(2);
  OwnedPages pages = pool.Allocate(1);
  EXPECT_DEATH(pages.ReleaseBack(2), "cannot release 2 of 1 pages");
}

}  // namespace
}  // namespace lora_serve
