#include "cache_scenario.h"

// A request whose prefix goes on in the host tier: what it gets, who waits for it, and what happens
// when the copy fails or nobody wants it any more.

namespace lora_serve {
namespace {

class LoadBackTest : public CacheScenario {
 protected:
  /// The sequence is on the host, and its first `num_device_pages` pages also on the device.
  void CacheOnHost(const Tokens& tokens, std::int32_t num_device_pages) {
    Cache(tokens);
    CopyToHost();
    const std::int64_t num_pages = NumTokensOf(tokens) / kPageSize;
    EXPECT_EQ(Evict(Tier::kDevice, num_pages - num_device_pages), num_pages - num_device_pages);
    EXPECT_EQ(Probe(tokens), num_device_pages * kPageSize);
  }
};
LS_RUN_FOR_EVERY_HOST_SETUP(LoadBackTest);

TEST_P(LoadBackTest, AProbeFindsWhatTheHostHasBehindTheDevice) {
  Open(16);
  CacheOnHost(Sequence(0, 24), 2);
  const ProbeResult probe = ProbeAll(id_, Sequence(0, 24));
  EXPECT_EQ(probe.num_device_tokens, 8);
  EXPECT_EQ(probe.num_host_tokens, 16);
  EXPECT_EQ(probe.num_resumable_tokens, 24);
  EXPECT_FALSE(probe.is_in_flight);
  EXPECT_EQ(ProbeHost(Sequence(0, 14)), 4);
  EXPECT_EQ(ProbeHost(Concatenate(Sequence(0, 12), Sequence(100, 12))), 4);
  EXPECT_EQ(ProbeHost(Sequence(0, 7)), 0);
}

TEST_P(LoadBackTest, ALeaseGetsTheDevicePagesThenTheLoadedOnesThenItsOwn) {
  Open(16);
  CacheOnHost(Sequence(0, 24), 2);
  const std::vector<PageId> device_pages = PagesOf(Acquire(Sequence(0, 8), 8));
  Lease lease = Acquire(Sequence(0, 30), 24);
  EXPECT_TRUE(lease.IsLoading());
  EXPECT_EQ(lease.num_cached_tokens(), 24);
  EXPECT_EQ(lease.num_host_cached_tokens(), 16);
  EXPECT_EQ(lease.num_published_pages(), 6);
  ASSERT_EQ(lease.pages().size(), 8u);
  EXPECT_TRUE(std::ranges::equal(lease.pages().first(2), device_pages));
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 6) << "pages under way are the tree's";
  EXPECT_EQ(StatsOf(id_).num_private_pages, 2);
  const TransferOrder order = TakeOrder();
  EXPECT_EQ(order.id, lease.load_back_id());
  EXPECT_EQ(order.kind, TransferKind::kLoadBack);
  EXPECT_EQ(order.namespace_id, id_);
  EXPECT_EQ(DestinationsOf(order),
            std::vector<PageId>(lease.pages().begin() + 2, lease.pages().begin() + 6));
  EXPECT_TRUE(order.states.empty()) << "the snapshot is still on the device";
  Complete(order.id);
  EXPECT_FALSE(lease.IsLoading());
  EXPECT_EQ(lease.load_back_id(), kNoTransfer);
  EXPECT_EQ(lease.num_cached_tokens(), 24);
  EXPECT_EQ(lease.num_host_cached_tokens(), 16);
  EXPECT_EQ(Probe(Sequence(0, 24)), 24);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 6) << "the host keeps its copy";
  Publish(lease, Sequence(0, 30));
  EXPECT_EQ(lease.num_published_pages(), 7);
}

TEST_P(LoadBackTest, NoMoreIsLoadedThanTheRequestMayTake) {
  Open(16);
  CacheOnHost(Sequence(0, 24), 2);
  EXPECT_FALSE(Acquire(Sequence(0, 24), 11).IsLoading()) << "the device has enough";
  Lease lease = Acquire(Sequence(0, 24), 19);
  EXPECT_EQ(lease.num_cached_tokens(), 16);
  EXPECT_EQ(TakeOrder().pages.size(), 2u);
  FinishLoading(lease);
  EXPECT_EQ(Probe(Sequence(0, 24)), 16);
  EXPECT_EQ(ProbeHost(Sequence(0, 24)), 8);
}

TEST_P(LoadBackTest, TheWholePrefixIsLoadedEvenIfLessCapacityIsAskedFor) {
  Open(16);
  CacheOnHost(Sequence(0, 24), 0);
  const Lease lease =
      AcquireIn(handle_, Sequence(0, 24), {.max_cached_tokens = 24, .num_capacity_tokens = 4});
  EXPECT_EQ(lease.pages().size(), 6u);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 0);
}

// --- Others in the meantime ----------------------------------------------------------------------

TEST_P(LoadBackTest, OthersWaitForPagesOnTheirWay) {
  Open(24);
  CacheOnHost(Sequence(0, 24), 2);
  Lease lease = Acquire(Sequence(0, 24), 20);
  const std::string before = cache_->Dump();
  EXPECT_EQ(TryAcquire(Sequence(0, 24), 24).outcome, AcquireOutcome::kInFlight);
  EXPECT_EQ(TryAcquire(Sequence(0, 24), 12).outcome, AcquireOutcome::kInFlight);
  EXPECT_TRUE(ProbeAll(id_, Sequence(0, 24)).is_in_flight);
  EXPECT_TRUE(ProbeAll(id_, Sequence(0, 12)).is_in_flight);
  EXPECT_FALSE(ProbeAll(id_, Sequence(0, 8)).is_in_flight);
  EXPECT_EQ(cache_->Dump(), before);
  EXPECT_EQ(Probe(Sequence(0, 24)), 8) << "pages under way are not there";
  EXPECT_EQ(Acquire(Sequence(0, 24), 11).num_cached_tokens(), 8) << "content with the device";
  FinishLoading(lease);
  EXPECT_FALSE(ProbeAll(id_, Sequence(0, 24)).is_in_flight);
  const Lease next = Acquire(Sequence(0, 24), 20);
  EXPECT_EQ(next.num_cached_tokens(), 20);
  EXPECT_EQ(next.num_host_cached_tokens(), 0);
  EXPECT_EQ(PagesOf(next).at(4), PagesOf(lease).at(4));
  EXPECT_TRUE(Acquire(Sequence(0, 24), 24).IsLoading())
      << "the last page is still on the host only";
}

TEST_P(LoadBackTest, PublishingStopsInFrontOfPagesOnTheirWay) {
  Open(24);
  CacheOnHost(Sequence(0, 16), 1);
  Lease cold = Acquire(Sequence(0, 24), 0);
  const std::vector<PageId> own_pages = PagesOf(cold);
  Lease loading = Acquire(Sequence(0, 16), 16);
  cache_->Publish(cold, Sequence(0, 24));
  cache_->CheckInvariants();
  EXPECT_EQ(cold.num_published_pages(), 1);
  FinishLoading(loading);
  cache_->Publish(cold, Sequence(0, 24));
  cache_->CheckInvariants();
  EXPECT_EQ(cold.num_published_pages(), 6);
  EXPECT_EQ(PagesOf(cold), own_pages);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 4) << "twins of what was loaded";
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 6);
}

TEST_P(LoadBackTest, APageThatTheHostAloneHasIsTakenFromWhoeverPublishesIt) {
  Open(24);
  CacheOnHost(Sequence(0, 16), 1);
  Lease cold = Acquire(Sequence(0, 16), 0);
  cache_->Publish(cold, Sequence(0, 16));
  EXPECT_EQ(cold.num_published_pages(), 4);
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 1);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 4);
  const Lease next = Acquire(Sequence(0, 16), 16);
  EXPECT_FALSE(next.IsLoading());
  EXPECT_EQ(PagesOf(next).at(3), PagesOf(cold).at(3));
  cache_->CheckInvariants();
}

// --- Room ----------------------------------------------------------------------------------------

TEST_P(LoadBackTest, WithoutRoomForTheLoadedPagesNothingHappens) {
  Open(8);
  CacheOnHost(Sequence(0, 24), 2);
  const Lease running = Acquire(Sequence(100, 12), 0);
  const std::string before = cache_->Dump();
  EXPECT_EQ(TryAcquire(Sequence(0, 24), 24).outcome, AcquireOutcome::kNoRoom);
  EXPECT_EQ(cache_->Dump(), before);
  EXPECT_TRUE(TakeOrders().empty());
  EXPECT_EQ(Acquire(Sequence(0, 20), 20).num_host_cached_tokens(), 12);  // 3 pages are free
}

TEST_P(LoadBackTest, RoomIsMadeAtTheExpenseOfOthersOnly) {
  Open(6);
  CacheOnHost(Sequence(0, 24), 1);
  Cache(Sequence(100, 20));
  EXPECT_EQ(cache_->Stats().num_free_pages, 0);
  const Lease lease = Acquire(Sequence(0, 24), 24);
  EXPECT_EQ(lease.num_host_cached_tokens(), 20);
  EXPECT_EQ(Probe(Sequence(100, 20)), 0);
}

TEST_P(LoadBackTest, TheSourceIsPinnedUntilTheCopyEnds) {
  Open(16);
  CacheOnHost(Sequence(0, 24), 2);
  Lease lease = Acquire(Sequence(0, 24), 16);
  End(lease);
  EXPECT_EQ(EvictHost(), 2) << "what lies behind the copied range";
  EXPECT_EQ(EvictDevice(), 0);
  CompleteAllTransfers();
  EXPECT_EQ(EvictHost(), 4);
  EXPECT_EQ(EvictDevice(), 4);
}

// --- The lease ends first ------------------------------------------------------------------------

TEST_P(LoadBackTest, ACopyWhoseLeaseHasEndedIsOfUseToOthers) {
  Open(16);
  CacheOnHost(Sequence(0, 24), 2);
  Lease lease = Acquire(Sequence(0, 32), 24);
  const std::vector<PageId> pages = PagesOf(lease);
  End(lease);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 0);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 6);
  EXPECT_EQ(TryAcquire(Sequence(0, 24), 24).outcome, AcquireOutcome::kInFlight);
  const TransferOrder order = TakeOrder();
  EXPECT_EQ(DestinationsOf(order), std::vector<PageId>(pages.begin() + 2, pages.begin() + 6));
  Complete(order.id);
  EXPECT_EQ(PagesOf(Acquire(Sequence(0, 24), 24)),
            std::vector<PageId>(pages.begin(), pages.begin() + 6));
}

TEST_P(LoadBackTest, AFailedCopyWhoseLeaseHasEndedFreesItsPages) {
  Open(16);
  CacheOnHost(Sequence(0, 24), 2);
  Lease lease = Acquire(Sequence(0, 32), 24);
  End(lease);
  Fail(TakeOrder().id);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 2);
  EXPECT_EQ(Probe(Sequence(0, 24)), 8);
  EXPECT_EQ(ProbeHost(Sequence(0, 24)), 0);
}

// --- Failure -------------------------------------------------------------------------------------

TEST_P(LoadBackTest, AFailedLoadBackCutsTheLeaseBackToWhatTheDeviceHad) {
  Open(16);
  CacheOnHost(Sequence(0, 24), 2);
  Lease lease = Acquire(Sequence(0, 32), 24);
  const std::vector<PageId> pages = PagesOf(lease);
  FailLoading(lease);
  EXPECT_TRUE(lease);
  const std::int32_t num_kept = HasState() ? 0 : 2;  // without its state nothing can be resumed
  EXPECT_EQ(lease.num_cached_tokens(), num_kept * kPageSize);
  EXPECT_EQ(lease.num_host_cached_tokens(), 0);
  EXPECT_EQ(lease.num_published_pages(), num_kept);
  EXPECT_EQ(PagesOf(lease), std::vector<PageId>(pages.begin(), pages.begin() + num_kept));
  EXPECT_EQ(lease.resumed_snapshot(), kNoStateSlot);
  EXPECT_EQ(lease.state_slot() != kNoStateSlot, HasState());
  EXPECT_EQ(StatsOf(id_).num_private_pages, 0);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 2) << "what could not be read is gone";
  EXPECT_EQ(Probe(Sequence(0, 24)), 8);
  // It goes on as if it had found no more.
  Grow(lease, Sequence(0, 32));
  EXPECT_EQ(lease.num_published_pages(), 8);
  EXPECT_EQ(Probe(Sequence(0, 32)), 32);
}

TEST_P(LoadBackTest, AFailedLoadBackDropsAllHostPagesThatContinueTheUnreadableOnes) {
  Open(kPlenty);
  const Tokens above = Concatenate(Sequence(0, 8), Sequence(100, 4));
  const Tokens below = Concatenate(Sequence(0, 16), Sequence(200, 4));
  for (const Tokens& tokens : {Sequence(0, 24), above, below}) {
    Cache(tokens);
    CopyToHost();
  }
  EXPECT_EQ(StatsOf(id_).num_host_pages, 8);
  EXPECT_EQ(EvictDevice(), 8);
  {
    const Lease lease = Acquire(Sequence(0, 8), 8);
    CompleteAllTransfers();
  }
  Lease lease = Acquire(Sequence(0, 12), 12);  // loads the third page
  FailLoading(lease);
  EXPECT_EQ(ProbeHost(Sequence(0, 24)), 0);
  EXPECT_EQ(ProbeHost(below), 0);
  EXPECT_EQ(ProbeHost(above), 4) << "it branches off above";
  EXPECT_EQ(StatsOf(id_).num_host_pages, 3);
  EXPECT_EQ(cache_->Stats().num_evicted_host_pages, 0) << "lost is not evicted";
}

TEST_P(LoadBackTest, AfterAFailureTheNextRequestComputesWhatIsMissing) {
  Open(kPlenty);
  CacheOnHost(Sequence(0, 16), 0);
  Lease lease = Acquire(Sequence(0, 16), 16);
  FailLoading(lease);
  EXPECT_EQ(lease.num_cached_tokens(), 0);
  EXPECT_EQ(cache_->Stats().num_free_pages, kPlenty);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 0);
  const Lease next = Compute(Sequence(0, 16));
  EXPECT_EQ(next.num_cached_tokens(), 0);
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
}

// --- Age -----------------------------------------------------------------------------------------

TEST_P(LoadBackTest, WhatWasLoadedIsYoungOnTheDevice) {
  Open(kPlenty);
  CacheOnHost(Sequence(0, 8), 0);
  CacheOnHost(Sequence(100, 8), 0);
  Lease older = Acquire(Sequence(0, 8), 8);
  Lease younger = Acquire(Sequence(100, 8), 8);
  const TransferId older_id = older.load_back_id();
  const TransferId younger_id = younger.load_back_id();
  (void)TakeOrders();
  End(older);
  End(younger);
  Complete(younger_id);
  Complete(older_id);  // the last to arrive
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  EXPECT_EQ(Probe(Sequence(100, 8)), 0);
  EXPECT_EQ(Evict(Tier::kHost, 2), 2) << "on the host the order is that of the leases' ends";
  EXPECT_EQ(ProbeHost(Sequence(100, 8)), 8);
}

}  // namespace
}  // namespace lora_serve
