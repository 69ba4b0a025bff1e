#include "common/strong_id.h"

#include <gtest/gtest.h>

#include <map>
#include <sstream>
#include <type_traits>
#include <unordered_set>

namespace lora_serve {
namespace {

static_assert(!std::is_convertible_v<PageId, AdapterSlot>);
static_assert(!std::is_constructible_v<PageId, AdapterSlot>);
static_assert(!std::is_convertible_v<std::int32_t, PageId>);
static_assert(sizeof(PageId) == sizeof(std::int32_t));

TEST(StrongIdTest, DefaultIsZero) { EXPECT_EQ(PageId{}.value(), 0); }

TEST(StrongIdTest, ComparesByValue) {
  EXPECT_EQ(PageId{3}, PageId{3});
  EXPECT_NE(PageId{3}, PageId{4});
  EXPECT_LT(PageId{3}, PageId{4});
  EXPECT_LT(kNoAdapterSlot, AdapterSlot{0});
}

TEST(StrongIdTest, PrintsItsValue) {
  std::ostringstream os;
  os << NamespaceId{42} << ' ' << kNoAdapterSlot;
  EXPECT_EQ(os.str(), "42 -1");
}

TEST(StrongIdTest, KeysHashAndOrderedContainers) {
  const std::unordered_set<RequestId> hashed{RequestId{1}, RequestId{2}, RequestId{1}};
  EXPECT_EQ(hashed.size(), 2u);
  EXPECT_TRUE(hashed.contains(RequestId{2}));
  const std::map<RequestId, int> ordered{{RequestId{2}, 0}, {RequestId{1}, 0}};
  EXPECT_EQ(ordered.begin()->first, RequestId{1});
}

}  // namespace
}  // namespace lora_serve
