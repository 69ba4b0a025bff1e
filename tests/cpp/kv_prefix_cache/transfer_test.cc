#include "cache_scenario.h"
#include "common/errors.h"

// Copies between the tiers as such: orders, ids, failures, drains; and the host's eviction. What is
// written back and when is in write_back_test.cc, what is loaded back in load_back_test.cc.

namespace lora_serve {
namespace {

class TransferTest : public CacheScenario {
 protected:
  /// Publishes and copies to the host, so that the path is on both tiers.
  void CacheOnBothTiers(const Tokens& tokens) {
    Cache(tokens);
    CopyToHost();
  }
  std::int32_t ProbeBoth(const Tokens& tokens) const { return Probe(tokens) + ProbeHost(tokens); }
};
LS_RUN_FOR_EVERY_HOST_SETUP(TransferTest);

// --- Orders and ids ------------------------------------------------------------------------------

TEST_P(TransferTest, OrdersAreGivenOutOnceWithGrowingIds) {
  Open(kPlenty);
  std::vector<Lease> leases;
  for (const TokenId first : {0, 100, 200}) leases.push_back(Compute(Sequence(first, 8)));
  EXPECT_TRUE(TakeOrders().empty());
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 3u);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(orders[i].id, TransferId{orders[0].id.value() + static_cast<std::int64_t>(i)});
    EXPECT_EQ(orders[i].kind, TransferKind::kWriteBack);
    EXPECT_EQ(orders[i].namespace_id, id_);
    EXPECT_EQ(SourcesOf(orders[i]), PagesOf(leases[i]));
    EXPECT_EQ(orders[i].states.size(), HasState() ? 2u : 0u);
  }
  EXPECT_TRUE(TakeOrders().empty()) << "an order was given out twice";
  EXPECT_EQ(cache_->Stats().num_transfers, 3);
  EXPECT_EQ(StatsOf(id_).num_transfers, 3);
  CompleteAllTransfers();
  leases.clear();
  EvictDevice();
  const Lease lease = Acquire(Sequence(0, 8), 8);
  const TransferOrder load_back = TakeOrder();
  EXPECT_EQ(load_back.id, TransferId{orders[2].id.value() + 1});
  EXPECT_EQ(load_back.kind, TransferKind::kLoadBack);
  EXPECT_EQ(lease.load_back_id(), load_back.id);
}

TEST_P(TransferTest, CopiesMayEndInAnyOrder) {
  Open(kPlenty);
  for (const TokenId first : {0, 100, 200}) Cache(Sequence(first, 8));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 3u);
  Complete(orders[2].id);
  Fail(orders[0].id);
  Complete(orders[1].id);
  EXPECT_EQ(EvictDevice(), 6);
  EXPECT_EQ(ProbeHost(Sequence(0, 8)), 0);
  EXPECT_EQ(ProbeHost(Sequence(100, 8)), 8);
  EXPECT_EQ(ProbeHost(Sequence(200, 8)), 8);
}

TEST_P(TransferTest, UnknownAndEndedIdsAreRefusedWithoutATrace) {
  Open(kPlenty);
  Cache(Sequence(0, 8));
  Cache(Sequence(100, 8));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 2u);
  Complete(orders[0].id);
  const std::string before = cache_->Dump();
  for (const TransferId id : {orders[0].id, TransferId{orders[1].id.value() + 1}, kNoTransfer}) {
    EXPECT_THROW(cache_->CompleteTransfer(id), NotFoundError) << "id " << id;
    EXPECT_THROW(cache_->FailTransfer(id), NotFoundError) << "id " << id;
  }
  EXPECT_EQ(cache_->Dump(), before);
  Fail(orders[1].id);
  EXPECT_THROW(cache_->CompleteTransfer(orders[1].id), NotFoundError);
}

TEST_P(TransferTest, AWriteBackCountsFromItsStartAndHelpsFromItsEnd) {
  Open(kPlenty);
  Cache(Sequence(0, 12));
  const TransferId id = PlanWriteBacks().at(0).id;
  EXPECT_EQ(StatsOf(id_).num_host_pages, 3);
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, HasState() ? 3 : 0);
  EXPECT_EQ(cache_->Stats().num_free_host_pages, kPlenty - 3);
  EXPECT_EQ(cache_->Stats().num_pages_being_written_back, 3);
  EXPECT_EQ(cache_->NumAvailablePages(), kPlenty - 3) << "the sources are pinned";
  Complete(id);
  EXPECT_EQ(cache_->Stats().num_pages_being_written_back, 0);
  EXPECT_EQ(cache_->NumAvailablePages(), kPlenty);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 3);
}

TEST_P(TransferTest, AFailedWriteBackLeavesTheHostAsItWasAndCanBeTriedAgain) {
  Open(kPlenty);
  CacheOnBothTiers(Sequence(0, 8));
  Lease lease = Compute(Sequence(0, 16));
  Fail(PlanWriteBacks().at(0).id);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, HasState() ? 2 : 0);
  EXPECT_EQ(cache_->Stats().num_pages_being_written_back, 0);
  EXPECT_TRUE(PlanWriteBacks().empty()) << "a note is tried once";
  ASSERT_TRUE(cache_->StartWriteBack(lease));
  const TransferOrder order = TakeOrder();
  EXPECT_EQ(order.pages.size(), 2u);
  Complete(order.id);
  End(lease);
  EvictDevice();
  EXPECT_EQ(ProbeHost(Sequence(0, 16)), 16);
}

// --- Drains --------------------------------------------------------------------------------------

using TransferDrainTest = TransferTest;
LS_RUN_FOR_SETUPS(TransferDrainTest, {Domain::kAdapter}, {true}, {false, true});

TEST_P(TransferDrainTest, ANamespaceWaitsForItsCopiesAndKeepsOnlyTheirPages) {
  for (const bool is_done : {true, false}) {
    Open(kPlenty);
    CacheOnBothTiers(Sequence(0, 8));
    Cache(Sequence(100, 12));
    Cache(Sequence(200, 4));
    const TransferId first = PlanWriteBacks().at(0).id;
    Fail(TransferId{first.value() + 1});
    handle_ = {};
    cache_->DrainNamespace(id_);
    cache_->CheckInvariants();
    ASSERT_TRUE(cache_->HasNamespace(id_));
    EXPECT_EQ(StatsOf(id_).num_tree_pages, 3);
    EXPECT_EQ(StatsOf(id_).num_host_pages, 3);
    EXPECT_EQ(StatsOf(id_).num_device_snapshots, HasState() ? 3 : 0);
    EXPECT_EQ(StatsOf(id_).num_host_snapshots, HasState() ? 3 : 0);
    is_done ? Complete(first) : Fail(first);
    EXPECT_FALSE(cache_->HasNamespace(id_));
    EXPECT_EQ(cache_->Stats().num_free_pages, kPlenty);
    EXPECT_EQ(cache_->Stats().num_free_host_pages, kPlenty);
  }
}

TEST_P(TransferDrainTest, ALoadBackWithoutItsLeaseStillEndsTheNamespace) {
  for (const bool is_done : {true, false}) {
    Open(kPlenty);
    CacheOnBothTiers(Sequence(0, 12));
    EvictDevice();
    Lease lease = Acquire(Sequence(0, 16), 12);
    const TransferId id = TakeOrder().id;
    handle_ = {};
    cache_->DrainNamespace(id_);
    End(lease);
    ASSERT_TRUE(cache_->HasNamespace(id_)) << "both ends of the copy are still in use";
    EXPECT_EQ(StatsOf(id_).num_tree_pages, 3);
    EXPECT_EQ(StatsOf(id_).num_host_pages, 3);
    EXPECT_EQ(StatsOf(id_).num_private_pages, 0);
    is_done ? Complete(id) : Fail(id);
    EXPECT_FALSE(cache_->HasNamespace(id_));
    EXPECT_EQ(cache_->Stats().num_free_pages, kPlenty);
  }
}

TEST_P(TransferDrainTest, ARequestFromBeforeTheDrainMayStillLoadWhatARequestProtects) {
  Open(kPlenty);
  CacheOnBothTiers(Sequence(0, 12));
  EvictDevice();
  Lease loading = Acquire(Sequence(0, 12), 12);
  cache_->DrainNamespace(id_);
  EXPECT_EQ(TryAcquire(Sequence(0, 12), 12).outcome, AcquireOutcome::kInFlight);
  FinishLoading(loading);
  EXPECT_EQ(Acquire(Sequence(0, 12), 12).num_cached_tokens(), 12);
  EXPECT_FALSE(cache_->StartWriteBack(loading)) << "nothing is copied in a draining namespace";
}

// --- Eviction on the host, and by what the host has ----------------------------------------------

TEST_P(TransferTest, TheHostEvictsThePathLeastRecentlyUsed) {
  Open(kPlenty);
  CacheOnBothTiers(Sequence(0, 8));
  CacheOnBothTiers(Sequence(100, 8));
  EXPECT_EQ(Acquire(Sequence(0, 8), 8).num_cached_tokens(), 8);  // a hit on the device counts
  EXPECT_EQ(EvictDevice(), 4);
  EXPECT_EQ(Evict(Tier::kHost, 2), 2);
  EXPECT_EQ(ProbeHost(Sequence(0, 8)), 8);
  EXPECT_EQ(ProbeHost(Sequence(100, 8)), 0);
  EXPECT_EQ(cache_->Stats().num_evicted_host_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_evicted_host_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_evicted_device_pages, 4);
  EXPECT_EQ(cache_->Stats().num_evicted_pages, 4);
}

TEST_P(TransferTest, TheHostTrimsAPathFromItsEnd) {
  Open(kPlenty);
  CacheOnBothTiers(Sequence(0, 16));
  EvictDevice();
  EXPECT_EQ(Evict(Tier::kHost, 1), 1);
  EXPECT_EQ(ProbeHost(Sequence(0, 16)), 12);
  EXPECT_EQ(Evict(Tier::kHost, 2), 2);
  EXPECT_EQ(ProbeHost(Sequence(0, 16)), 4);
  EXPECT_EQ(Evict(Tier::kHost, 5), 1);
  EXPECT_EQ(cache_->Stats().num_nodes, 0);
}

TEST_P(TransferTest, ALeaseProtectsItsPathOnTheDeviceOnly) {
  Open(kPlenty);
  CacheOnBothTiers(Sequence(0, 8));
  const Lease lease = Acquire(Sequence(0, 8), 8);
  EXPECT_EQ(EvictDevice(), 0);
  EXPECT_EQ(EvictHost(), 2);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
}

TEST_P(TransferTest, EachTierHasItsOwnLeaves) {
  Open(kPlenty);
  CacheOnBothTiers(Sequence(0, 8));
  Cache(Sequence(0, 16));  // two pages more, on the device only
  EXPECT_EQ(Evict(Tier::kHost, 1), 1) << "no page of the host continues it";
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
  EXPECT_EQ(Evict(Tier::kDevice, 3), 3);
  EXPECT_EQ(ProbeBoth(Sequence(0, 16)), 4);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 1);
}

TEST_P(TransferTest, APageThatTheHostHasGoesBeforeAnOlderOneThatWouldBeLost) {
  Open(kPlenty);
  Cache(Sequence(0, 8));
  Lease backed = Compute(Sequence(100, 8));
  ASSERT_TRUE(cache_->StartWriteBack(backed));
  End(backed);
  CompleteAllTransfers();
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  EXPECT_EQ(Probe(Sequence(100, 8)), 0);
  EXPECT_EQ(ProbeHost(Sequence(100, 8)), 8);
}

TEST_P(TransferTest, OnlyThePagesThatTheHostHasAreBacked) {
  Open(kPlenty);
  Cache(Sequence(100, 4));
  Lease lease = Compute(Sequence(0, 8));
  ASSERT_TRUE(cache_->StartWriteBack(lease));
  CompleteAllTransfers();
  Grow(lease, Sequence(0, 16));
  End(lease);
  Cache(Sequence(200, 4));
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(Probe(Sequence(100, 4)), 0) << "the end of the other path would be lost as well";
  EXPECT_EQ(Evict(Tier::kDevice, 4), 4);
  EXPECT_EQ(Probe(Sequence(0, 16)), 0);
  EXPECT_EQ(ProbeHost(Sequence(0, 16)), 8);
  EXPECT_EQ(Probe(Sequence(200, 4)), 4);
}

TEST_P(TransferTest, AWriteBackMakesDevicePagesNoYounger) {
  Open(kPlenty);
  Cache(Sequence(0, 8));
  Cache(Sequence(100, 8));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 2u);
  Complete(orders[1].id);
  Complete(orders[0].id);  // the older one's copy ends last
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(Probe(Sequence(0, 8)), 0);
  EXPECT_EQ(Probe(Sequence(100, 8)), 8);
  EXPECT_EQ(Evict(Tier::kHost, 2), 2) << "on the host it is the younger one";
  EXPECT_EQ(ProbeHost(Sequence(0, 8)), 8);
}

TEST_P(TransferTest, APageThatTheHostHasLostIsNotBackedAnyMore) {
  Open(kPlenty);
  CacheOnBothTiers(Sequence(0, 8));
  CacheOnBothTiers(Sequence(100, 8));
  EXPECT_EQ(Evict(Tier::kHost, 2), 2);  // of the older one
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  EXPECT_EQ(Probe(Sequence(100, 8)), 0);
}

// --- Without a host tier -------------------------------------------------------------------------

using NoHostTest = TransferTest;
LS_RUN_FOR_SETUPS(NoHostTest, {Domain::kBase, Domain::kAdapter}, {false}, {false, true});

TEST_P(NoHostTest, NothingIsEverCopied) {
  Open(kPlenty);
  Lease lease = Compute(Sequence(0, 8));
  EXPECT_TRUE(PlanWriteBacks().empty());
  EXPECT_FALSE(cache_->StartWriteBack(lease));
  EXPECT_EQ(Evict(Tier::kHost, 1), 0);
  End(lease);
  EXPECT_EQ(EvictDevice(), 2);
  EXPECT_FALSE(Acquire(Sequence(0, 8), 8).IsLoading());
  EXPECT_EQ(cache_->Stats().num_transfers, 0);
}

}  // namespace
}  // namespace lora_serve
