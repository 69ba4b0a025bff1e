#include "scheduler/transfer_table.h"

#include <gtest/gtest.h>

#include <vector>

#include "common/errors.h"

namespace lora_serve {
namespace {

class TransferTableTest : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (GetParam()) namespace_ = cache_.OpenNamespace({});
  }
  /// Starts a write-back of `num_pages` pages of their own, and lets the table know.
  TransferId StartWriteBack(std::int32_t num_pages, NamespaceId id) {
    std::vector<TokenId> tokens(static_cast<std::size_t>(2 * num_pages), next_token_++);
    const NamespaceHandle handle = cache_.RetainNamespace(id);
    AcquireResult acquired = cache_.Acquire(handle, tokens, {.num_capacity_tokens = 2 * num_pages});
    cache_.Publish(acquired.lease, tokens);
    EXPECT_TRUE(cache_.StartWriteBack(acquired.lease));
    table_.Collect();
    return table_.Newest();
  }

  KVPrefixCache cache_{{.page_size = 2,
                        .num_device_pages = 16,
                        .num_host_pages = 16,
                        .write_policy = WritePolicy::kOff}};
  TransferTable table_{&cache_};
  NamespaceId namespace_ = kBaseNamespace;
  TokenId next_token_ = 1;
};
INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, TransferTableTest, ::testing::Bool());

TEST_P(TransferTableTest, KnowsACopyFromItsStartToItsReportAndGivesItsOrderOutOnce) {
  const TransferId first = StartWriteBack(2, namespace_);
  const TransferId second = StartWriteBack(1, namespace_);
  EXPECT_TRUE(table_.IsUnderWay(first));
  const std::vector<TransferOrder> orders = table_.TakeOrders();
  ASSERT_EQ(orders.size(), 2U);
  EXPECT_EQ(orders[0].id, first);
  EXPECT_EQ(orders[1].id, second);
  EXPECT_TRUE(table_.TakeOrders().empty());
  EXPECT_EQ(table_.size(), 2);
  table_.CheckInvariants();
  cache_.CompleteTransfer(first);
  EXPECT_THROW(table_.CheckInvariants(), InternalError);
  table_.Remove(first);
  table_.CheckInvariants();
  EXPECT_FALSE(table_.IsUnderWay(first));
  EXPECT_THROW(table_.Remove(first), InternalError);
  cache_.FailTransfer(second);
  table_.Remove(second);
  EXPECT_TRUE(table_.IsEmpty());
  EXPECT_EQ(table_.Newest(), kNoTransfer);
}

TEST_P(TransferTableTest, CountsThePagesThatCopiesHoldBackUntilTheyAreReported) {
  EXPECT_EQ(table_.NumPagesHeld(), 0);
  const TransferId first = StartWriteBack(2, namespace_);
  const TransferId second = StartWriteBack(3, namespace_);
  EXPECT_EQ(table_.NumPagesHeld(), 0) << "for all it knows, requests use the pages";
  table_.NotePagesHeld(first, 2);
  table_.NotePagesHeld(second, 6);
  table_.NotePagesHeld(second, 1);
  EXPECT_EQ(table_.NumPagesHeld(), 8);
  table_.Remove(first);
  EXPECT_EQ(table_.NumPagesHeld(), 6);
  EXPECT_THROW(table_.NotePagesHeld(first, 1), InternalError);
}

TEST_P(TransferTableTest, NotesWhatIsNotAvailableWhenALeaseEnds) {
  const NamespaceHandle handle = cache_.RetainNamespace(namespace_);
  const std::vector<TokenId> tokens(8, 100);
  AcquireResult acquired = cache_.Acquire(handle, tokens, {.num_capacity_tokens = 12});
  cache_.Publish(acquired.lease, tokens);
  table_.EndLease(namespace_, 0, [] {});
  ASSERT_TRUE(cache_.StartWriteBack(acquired.lease));
  table_.Collect();
  table_.EndLease(namespace_, 6, [&] { acquired.lease = Lease(); });
  EXPECT_EQ(table_.NumPagesHeld(), 4) << "two private pages are free";
  acquired = cache_.Acquire(handle, std::vector<TokenId>(4, 7), {.num_capacity_tokens = 4});
  table_.Remove(table_.Newest());
  table_.EndLease(namespace_, 2, [&] { acquired.lease = Lease(); });
  EXPECT_EQ(table_.NumPagesHeld(), 0) << "there is no copy that could hold pages";
}

TEST_P(TransferTableTest, FindsTheNewestCopyOfANamespace) {
  const NamespaceId other = cache_.OpenNamespace({});
  EXPECT_EQ(table_.NewestOf(namespace_), kNoTransfer);
  StartWriteBack(1, namespace_);
  const TransferId mine = StartWriteBack(1, namespace_);
  EXPECT_EQ(table_.NewestOf(other), kNoTransfer);
  const TransferId others = StartWriteBack(1, other);
  EXPECT_EQ(table_.NewestOf(namespace_), mine);
  EXPECT_EQ(table_.NewestOf(other), others);
  EXPECT_EQ(table_.Newest(), others);
}

}  // namespace
}  // namespace lora_serve
