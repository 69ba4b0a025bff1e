#include "cache_scenario.h"

// What is written back to the host, when, and how much.

namespace lora_serve {
namespace {

class WriteBackTest : public CacheScenario {
 protected:
  void OpenWithHost(std::int32_t num_host_pages, WritePolicy write_policy) {
    KVPrefixCacheOptions options = OptionsWith(kPlenty);
    options.num_host_pages = num_host_pages;
    options.write_policy = write_policy;
    OpenWith(options);
  }
  /// The device pages of the first `num_pages` pages of a cached sequence.
  std::vector<PageId> DevicePagesOf(const Tokens& tokens) {
    return PagesOf(Acquire(tokens, NumTokensOf(tokens)));
  }
};

// --- Write through -------------------------------------------------------------------------------

using WriteThroughTest = WriteBackTest;
LS_RUN_FOR_EVERY_HOST_SETUP(WriteThroughTest);

TEST_P(WriteThroughTest, WhatIsPublishedIsCopiedOnce) {
  Open(kPlenty);
  Lease lease = Compute(Sequence(0, 10));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]), std::vector<PageId>({lease.pages()[0], lease.pages()[1]}));
  EXPECT_TRUE(PlanWriteBacks().empty()) << "a copy is under way";
  Complete(orders[0].id);
  Publish(lease, Sequence(0, 10));
  EXPECT_TRUE(PlanWriteBacks().empty()) << "the host has everything";
  End(lease);
  EXPECT_EQ(EvictDevice(), 2);
  EXPECT_EQ(ProbeHost(Sequence(0, 10)), 8);
}

TEST_P(WriteThroughTest, OnlyWhatTheHostLacksIsCopied) {
  Open(kPlenty);
  Lease lease = Compute(Sequence(0, 8));
  CopyToHost();
  Grow(lease, Sequence(0, 20));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]),
            std::vector<PageId>(lease.pages().begin() + 2, lease.pages().end()));
  EXPECT_EQ(orders[0].states.size(), HasState() ? 3u : 0u);
}

TEST_P(WriteThroughTest, APathThatGoesOnIsCopiedAtItsLongest) {
  Open(kPlenty);
  Lease lease = Compute(Sequence(0, 8));
  Cache(Sequence(100, 4));
  Grow(lease, Sequence(0, 16));
  Grow(lease, Sequence(0, 24));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 2u);
  EXPECT_EQ(orders[0].pages.size(), 1u) << "the longer note is the younger one";
  EXPECT_EQ(SourcesOf(orders[1]), PagesOf(lease));
}

TEST_P(WriteThroughTest, BranchesShareTheCopyOfTheirTrunk) {
  Open(kPlenty);
  const Lease left = Compute(Concatenate(Sequence(0, 8), Sequence(100, 4)));
  const Lease right = Compute(Concatenate(Sequence(0, 8), Sequence(200, 4)));
  std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u) << "the trunk is under way, so the second path waits";
  EXPECT_EQ(SourcesOf(orders[0]), PagesOf(left));
  Complete(orders[0].id);
  orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u) << "a blocked path was forgotten";
  EXPECT_EQ(SourcesOf(orders[0]), std::vector<PageId>{right.pages()[2]});
}

TEST_P(WriteThroughTest, ATwinThatTheTreeAlreadyHasIsNoReasonToCopy) {
  Open(kPlenty);
  Lease twin = Acquire(Sequence(0, 8), 0);
  Cache(Sequence(0, 8));
  CopyToHost();
  EvictHost();
  cache_->Publish(twin, Sequence(0, 8));
  EXPECT_TRUE(PlanWriteBacks().empty());
}

TEST_P(WriteThroughTest, AsManyLeadingPagesAsTheHostHasRoomForAreCopied) {
  OpenWithHost(3, WritePolicy::kWriteThrough);
  Lease lease = Compute(Sequence(0, 20));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]),
            std::vector<PageId>(lease.pages().begin(), lease.pages().begin() + 3));
  Complete(orders[0].id);
  EXPECT_FALSE(cache_->StartWriteBack(lease)) << "room is never made at its own expense";
  End(lease);
  EvictDevice();
  EXPECT_EQ(ProbeHost(Sequence(0, 20)), 12);
}

TEST_P(WriteThroughTest, TheOldestNoteIsTriedFirstAndOneWithoutRoomIsForgotten) {
  OpenWithHost(2, WritePolicy::kWriteThrough);
  Cache(Sequence(0, 8));
  Cache(Sequence(100, 8));
  const std::vector<PageId> older = DevicePagesOf(Sequence(0, 8));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]), older);
  Complete(orders[0].id);  // from now on there would be room, at its expense
  EXPECT_TRUE(PlanWriteBacks().empty());
  EXPECT_EQ(cache_->Stats().num_evicted_host_pages, 0);
}

TEST_P(WriteThroughTest, RoomIsMadeByEvictingTheOldestOfTheHost) {
  OpenWithHost(4, WritePolicy::kWriteThrough);
  for (const TokenId first : {0, 100, 200}) {
    Cache(Sequence(first, 8));
    CopyToHost();
  }
  EXPECT_EQ(cache_->Stats().num_evicted_host_pages, 2);
  EvictDevice();
  EXPECT_EQ(ProbeHost(Sequence(0, 8)), 0);
  EXPECT_EQ(ProbeHost(Sequence(100, 8)), 8);
  EXPECT_EQ(ProbeHost(Sequence(200, 8)), 8);
}

TEST_P(WriteThroughTest, RoomIsNeverMadeAtTheExpenseOfThePathItself) {
  OpenWithHost(3, WritePolicy::kWriteThrough);
  Lease lease = Compute(Sequence(0, 8));
  CopyToHost();
  Cache(Sequence(100, 4));
  CopyToHost();  // younger than the path's first pages
  Grow(lease, Sequence(0, 12));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]), std::vector<PageId>{lease.pages()[2]});
  CompleteAllTransfers();
  End(lease);
  EvictDevice();
  EXPECT_EQ(ProbeHost(Sequence(0, 12)), 12);
  EXPECT_EQ(ProbeHost(Sequence(100, 4)), 0);
}

TEST_P(WriteThroughTest, ANoteIsForgottenWithAPageOfItsPath) {
  Open(kPlenty);
  Cache(Sequence(0, 12));
  Cache(Sequence(100, 12));
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);  // of the older one
  EXPECT_EQ(Probe(Sequence(0, 12)), 8);
  const std::vector<PageId> younger = DevicePagesOf(Sequence(100, 12));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]), younger);
}

TEST_P(WriteThroughTest, ABlockedNoteKeepsItsPlace) {
  OpenWithHost(4, WritePolicy::kWriteThrough);
  Lease lease = Compute(Sequence(0, 8));
  const TransferId first = PlanWriteBacks().at(0).id;
  Grow(lease, Sequence(0, 16));
  EXPECT_TRUE(PlanWriteBacks().empty()) << "the path is being copied";
  Cache(Sequence(100, 8));
  Complete(first);
  // Two pages are left on the host: the blocked note is the older one and gets them.
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]),
            std::vector<PageId>(lease.pages().begin() + 2, lease.pages().end()));
}

// --- Write back at a watermark -------------------------------------------------------------------

class WatermarkTest : public WriteBackTest {
 protected:
  void OpenWithWatermark(std::int32_t num_device_pages, std::int32_t num_watermark_pages,
                         std::int32_t num_host_pages = kPlenty) {
    KVPrefixCacheOptions options = OptionsWith(num_device_pages);
    options.num_host_pages = num_host_pages;
    options.write_policy = WritePolicy::kWriteBack;
    options.write_back_watermark_pages = num_watermark_pages;
    OpenWith(options);
  }
};
LS_RUN_FOR_EVERY_HOST_SETUP(WatermarkTest);

TEST_P(WatermarkTest, CopiesBeginWhenFewerPagesAreFreeThanTheWatermark) {
  OpenWithWatermark(8, 4);
  Cache(Sequence(0, 16));
  EXPECT_TRUE(PlanWriteBacks().empty()) << "4 pages are free";
  Cache(Sequence(100, 4));
  const std::vector<PageId> oldest = DevicePagesOf(Sequence(0, 16));
  Cache(Sequence(100, 4));  // so that it is the younger one again
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]), oldest);
  EXPECT_TRUE(PlanWriteBacks().empty()) << "3 are free and 4 being written";
  Complete(orders[0].id);
  EXPECT_TRUE(PlanWriteBacks().empty()) << "3 are free and 4 can go";
}

TEST_P(WatermarkTest, NoMoreIsCopiedThanTheWatermarkAsksFor) {
  OpenWithWatermark(8, 4);
  for (const TokenId first : {0, 100, 200}) Cache(Sequence(first, 8));  // 2 are free
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(orders[0].pages.size(), 2u);
  EXPECT_EQ(SourcesOf(orders[0]), DevicePagesOf(Sequence(0, 8)));
}

TEST_P(WatermarkTest, TheOldestAreCopiedFirst) {
  OpenWithWatermark(8, 6);
  for (const TokenId first : {0, 100, 200}) Cache(Sequence(first, 8));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 2u);
  EXPECT_EQ(SourcesOf(orders[0]), DevicePagesOf(Sequence(0, 8)));
  EXPECT_EQ(SourcesOf(orders[1]), DevicePagesOf(Sequence(100, 8)));
}

TEST_P(WatermarkTest, WhatLeasesHoldIsNotCopied) {
  OpenWithWatermark(8, 8);
  const Lease running = Compute(Sequence(0, 16));
  EXPECT_TRUE(PlanWriteBacks().empty());
  Cache(Sequence(100, 8));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]), DevicePagesOf(Sequence(100, 8)));
}

TEST_P(WatermarkTest, ABackedRunCountsOnlyToTheNextBranch) {
  OpenWithWatermark(8, 6);
  Lease left = Compute(Concatenate(Sequence(0, 8), Sequence(100, 4)));
  ASSERT_TRUE(cache_->StartWriteBack(left));
  CompleteAllTransfers();
  End(left);
  Cache(Concatenate(Sequence(0, 8), Sequence(200, 4)));
  // 4 pages are free. The left leaf is on the host and can go; its trunk could not, because of the
  // right leaf. So that one is needed, too.
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(orders[0].pages.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]).at(0),
            DevicePagesOf(Concatenate(Sequence(0, 8), Sequence(200, 4))).at(2));
}

TEST_P(WatermarkTest, ABackedRunCountsOnlyToTheNextLease) {
  OpenWithWatermark(8, 5);
  Lease lease = Compute(Sequence(0, 12));
  ASSERT_TRUE(cache_->StartWriteBack(lease));
  CompleteAllTransfers();
  End(lease);
  Cache(Sequence(100, 8));                           // 3 are free
  const Lease running = Acquire(Sequence(0, 8), 8);  // of the backed run, one page can go
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]), DevicePagesOf(Sequence(100, 8)));
}

TEST_P(WatermarkTest, APathThatIsBeingCopiedIsPassedOver) {
  OpenWithWatermark(8, 6);
  Lease lease = Compute(Sequence(0, 8));
  ASSERT_TRUE(cache_->StartWriteBack(lease));
  const TransferId first = TakeOrder().id;
  Grow(lease, Sequence(0, 16));
  End(lease);
  Cache(Sequence(100, 8));  // 2 are free, 2 being written
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(SourcesOf(orders[0]), DevicePagesOf(Sequence(100, 8)));
  Complete(first);
}

TEST_P(WatermarkTest, AWatermarkAboveWhatTheHostHoldsComesToRestWithTheOldestOnTheHost) {
  OpenWithWatermark(8, 8, /*num_host_pages=*/5);
  for (const TokenId first : {0, 100, 200, 300}) Cache(Sequence(first, 8));
  for (std::int32_t step = 0; !PlanWriteBacks().empty(); ++step) {
    ASSERT_LT(step, 5) << "pages are copied for ever";
    CompleteAllTransfers();
  }
  EXPECT_EQ(cache_->Stats().num_evicted_host_pages, 0);
  EvictDevice();
  EXPECT_EQ(ProbeHost(Sequence(0, 8)), 8);
  EXPECT_EQ(ProbeHost(Sequence(100, 8)), 8);
  EXPECT_EQ(ProbeHost(Sequence(200, 8)), 4);
}

TEST_P(WatermarkTest, RoomIsMadeOfWhatOnlyTheHostHas) {
  OpenWithWatermark(4, 4, /*num_host_pages=*/4);
  Cache(Sequence(0, 16));
  CopyToHost();
  Evict(Tier::kDevice, 2);
  Cache(Sequence(100, 8));
  CopyToHost();
  EXPECT_EQ(cache_->Stats().num_evicted_host_pages, 2);
  EvictDevice();
  EXPECT_EQ(ProbeHost(Sequence(0, 16)), 8);
  EXPECT_EQ(ProbeHost(Sequence(100, 8)), 8);
}

TEST_P(WatermarkTest, RoomIsMadeOfWhatALeaseKeepsOnTheDevice) {
  OpenWithWatermark(4, 4, /*num_host_pages=*/2);
  Lease running = Compute(Sequence(0, 8));
  ASSERT_TRUE(cache_->StartWriteBack(running));
  CompleteAllTransfers();
  Cache(Sequence(100, 8));
  CopyToHost();
  EXPECT_EQ(cache_->Stats().num_evicted_host_pages, 2) << "it cannot go from the device";
  End(running);
  EvictDevice();
  EXPECT_EQ(ProbeHost(Sequence(100, 8)), 8);
}

// --- By request ----------------------------------------------------------------------------------

using StartWriteBackTest = WriteBackTest;
LS_RUN_FOR_EVERY_HOST_SETUP(StartWriteBackTest);

TEST_P(StartWriteBackTest, WorksUnderEveryPolicy) {
  for (const WritePolicy policy :
       {WritePolicy::kOff, WritePolicy::kWriteBack, WritePolicy::kWriteThrough}) {
    OpenWithHost(8, policy);
    Lease lease = Compute(Sequence(0, 14));
    ASSERT_TRUE(cache_->StartWriteBack(lease));
    const TransferOrder order = TakeOrder();
    EXPECT_EQ(SourcesOf(order),
              std::vector<PageId>(lease.pages().begin(), lease.pages().begin() + 3));
    EXPECT_EQ(order.states.size(), HasState() ? 3u : 0u);
    End(lease);  // preempted
    Complete(order.id);
    EvictDevice();
    EXPECT_EQ(ProbeHost(Sequence(0, 14)), 12);
    handle_ = {};
  }
}

TEST_P(StartWriteBackTest, WithPolicyOffNothingIsCopiedByItself) {
  OpenWithHost(8, WritePolicy::kOff);
  Cache(Sequence(0, 240));
  EXPECT_TRUE(PlanWriteBacks().empty());
  EXPECT_EQ(StatsOf(id_).num_host_pages, 0);
}

TEST_P(StartWriteBackTest, SaysNoWhenThereIsNothingToDoOrToDoItWith) {
  OpenWithHost(2, WritePolicy::kOff);
  Lease lease = Acquire(Sequence(0, 8), 0);
  EXPECT_FALSE(cache_->StartWriteBack(lease)) << "nothing is published";
  Publish(lease, Sequence(0, 8));
  EXPECT_TRUE(cache_->StartWriteBack(lease));
  EXPECT_FALSE(cache_->StartWriteBack(lease)) << "a copy on this path is under way";
  Lease other = Compute(Sequence(100, 8));
  EXPECT_FALSE(cache_->StartWriteBack(other)) << "the host is full of pages under way";
  CompleteAllTransfers();
  EXPECT_FALSE(cache_->StartWriteBack(lease)) << "the host has everything";
  EXPECT_TRUE(cache_->StartWriteBack(other)) << "the host's older pages can go";
}

TEST_P(StartWriteBackTest, SaysNoWhileTheLeaseIsLoading) {
  Open(kPlenty);
  Cache(Sequence(0, 8));
  CopyToHost();
  EvictDevice();
  Lease loading = Acquire(Sequence(0, 12), 8);
  ASSERT_TRUE(loading.IsLoading());
  EXPECT_FALSE(cache_->StartWriteBack(loading));
  FinishLoading(loading);
  EXPECT_FALSE(cache_->StartWriteBack(loading)) << "the host has everything";
  Publish(loading, Sequence(0, 12));
  EXPECT_TRUE(cache_->StartWriteBack(loading));
  EXPECT_EQ(SourcesOf(TakeOrder()), std::vector<PageId>{loading.pages()[2]});
}

}  // namespace
}  // namespace lora_serve
