#include "common/errors.h"
#include "state_scenario.h"

// Recurrent state between the tiers: snapshots that go to the host with their path, and come back
// alone or with their pages.

namespace lora_serve {
namespace {

class StateTransferTest : public StateScenario {};
LS_RUN_FOR_SETUPS(StateTransferTest, {Domain::kBase, Domain::kAdapter}, {true}, {true});

TEST_P(StateTransferTest, AWriteBackTakesTheSnapshotsOfItsPathAlong) {
  Open(kPlenty);
  const std::vector<StateSlot> slots = CacheWith(Sequence(0, 20), {8, 16});
  const TransferOrder order = PlanWriteBacks().at(0);
  EXPECT_EQ(order.pages.size(), 5u);
  ASSERT_EQ(order.states.size(), 2u);
  EXPECT_EQ(order.states[0].source, slots[0]);
  EXPECT_EQ(order.states[1].source, slots[1]);
  EXPECT_NE(order.states[0].destination, order.states[1].destination);
  EXPECT_EQ(cache_->Stats().num_free_host_state_slots, kPlenty - 2);
  EvictDeviceSnapshots();
  EXPECT_EQ(NumSnapshots(), 2) << "sources of a copy";
  Complete(order.id);
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, 2);
}

TEST_P(StateTransferTest, WhereOnlySnapshotsAreMissingOnlyTheyAreCopied) {
  Open(kPlenty);
  Lease lease = Acquire(Sequence(0, 12), 0);
  cache_->Publish(lease, Sequence(0, 12));
  CopyToHost();
  EXPECT_TRUE(PlanWriteBacks().empty());
  const StateSlot slot = PublishWith(lease, Sequence(0, 12), {12}).at(0);
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u) << "an attached snapshot is news, too";
  EXPECT_TRUE(orders[0].pages.empty());
  ASSERT_EQ(orders[0].states.size(), 1u);
  EXPECT_EQ(orders[0].states[0].source, slot);
  EXPECT_EQ(cache_->Stats().num_pages_being_written_back, 0);
}

TEST_P(StateTransferTest, AsManySnapshotsAsTheHostHasSlotsForAreCopiedShallowestFirst) {
  OpenWithSlots(kPlenty, 2);
  Lease lease = Acquire(Sequence(0, 12), 0);
  const std::vector<StateSlot> slots = PublishWith(lease, Sequence(0, 12), {4, 8, 12});
  const TransferOrder order = PlanWriteBacks().at(0);
  EXPECT_EQ(order.pages.size(), 3u);
  ASSERT_EQ(order.states.size(), 2u);
  EXPECT_EQ(order.states[0].source, slots[0]);
  EXPECT_EQ(order.states[1].source, slots[1]);
  Complete(order.id);
  EXPECT_FALSE(cache_->StartWriteBack(lease)) << "room is never made of the path itself";
  // Another path may take them.
  Lease other_lease = Acquire(Sequence(100, 4), 0);
  PublishWith(other_lease, Sequence(100, 4), {4});
  ASSERT_TRUE(cache_->StartWriteBack(other_lease));
  EXPECT_EQ(TakeOrder().states.size(), 1u);
}

TEST_P(StateTransferTest, APathWithANewSnapshotIsTheYoungestNote) {
  KVPrefixCacheOptions options = OptionsWith(kPlenty);
  options.num_host_pages = 2;
  OpenWith(options);
  Lease lease = Acquire(Sequence(0, 8), 0);
  PublishWith(lease, Sequence(0, 8), {});
  Lease other_lease = Acquire(Sequence(100, 8), 0);
  PublishWith(other_lease, Sequence(100, 8), {});
  PublishWith(lease, Sequence(0, 8), {8});
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 1u) << "the host has room for one of them";
  EXPECT_EQ(SourcesOf(orders[0]), PagesOf(other_lease));
}

TEST_P(StateTransferTest, ASnapshotThatTheHostHasGoesBeforeAnOlderOneThatWouldBeLost) {
  OpenWithSlots(3);
  CacheWith(Sequence(0, 4), {4});
  Lease backed = Acquire(Sequence(100, 4), 0);
  PublishWith(backed, Sequence(100, 4), {4});
  ASSERT_TRUE(cache_->StartWriteBack(backed));
  CompleteAllTransfers();
  const Lease newcomer = Acquire({}, 0);
  EXPECT_EQ(NumSnapshots(), 1);
  EXPECT_EQ(ProbeResumable(Sequence(0, 4)), 4);
  EXPECT_EQ(ProbeResumable(Sequence(100, 4)), 4) << "on the host";
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, 1);
}

TEST_P(StateTransferTest, AWriteBackWaitsForTheLoadBackOfItsLease) {
  OpenWithSlots(kPlenty, 1);
  CacheWith(Sequence(0, 16), {8, 16});
  CopyToHost();
  CacheWith(Sequence(100, 4), {4});
  CopyToHost();  // takes the one slot of the host
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  Lease lease = Acquire(Sequence(0, 16), 16);
  ASSERT_TRUE(lease.IsLoading());
  EXPECT_FALSE(cache_->StartWriteBack(lease)) << "even of a snapshot that is there";
  FinishLoading(lease);
  EXPECT_TRUE(cache_->StartWriteBack(lease));
  EXPECT_EQ(TakeOrder().states.size(), 1u);
}

TEST_P(StateTransferTest, WhoResumesAbovePagesOnTheirWayNeedNotWait) {
  Open(kPlenty);
  CacheWith(Sequence(0, 16), {8, 16});
  CopyToHost();
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  const Lease loading = Acquire(Sequence(0, 16), 16);
  ASSERT_TRUE(loading.IsLoading());
  const AcquireResult shallower = TryAcquire(Sequence(0, 16), 15);  // no snapshot after 12 tokens
  EXPECT_EQ(shallower.outcome, AcquireOutcome::kAcquired);
  EXPECT_EQ(shallower.lease.num_cached_tokens(), 8);
  EXPECT_FALSE(ProbeAll(id_, Sequence(0, 15)).is_in_flight);
  EXPECT_EQ(TryAcquire(Sequence(0, 16), 16).outcome, AcquireOutcome::kInFlight);
}

class StateLoadBackTest : public StateScenario {
 protected:
  /// 8 tokens on both tiers, their snapshot on the host only; three slots are free.
  void SetUp() override {
    OpenWithSlots(3);
    CacheWith(Sequence(0, 8), {8});
    CopyToHost();
    EvictDeviceSnapshots();
    ASSERT_EQ(NumSnapshots(), 0);
    ASSERT_EQ(StatsOf(id_).num_host_snapshots, 1);
    ASSERT_EQ(Probe(Sequence(0, 8)), 8);
  }
};
LS_RUN_FOR_SETUPS(StateLoadBackTest, {Domain::kBase, Domain::kAdapter}, {true}, {true});

TEST_P(StateLoadBackTest, ASnapshotAloneIsLoadedBackWhenThePagesAreThere) {
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 8);
  Lease lease = Acquire(Sequence(0, 12), 8);
  EXPECT_TRUE(lease.IsLoading());
  EXPECT_EQ(lease.num_cached_tokens(), 8);
  EXPECT_EQ(lease.num_host_cached_tokens(), 0);
  const TransferOrder order = TakeOrder();
  EXPECT_EQ(order.kind, TransferKind::kLoadBack);
  EXPECT_TRUE(order.pages.empty());
  ASSERT_EQ(order.states.size(), 1u);
  EXPECT_EQ(order.states[0].destination, lease.resumed_snapshot());
  EXPECT_NE(order.states[0].destination, lease.state_slot());
  EXPECT_EQ(NumFreeSlots(), 1);

  EXPECT_TRUE(ProbeAll(id_, Sequence(0, 8)).is_in_flight);
  EXPECT_EQ(TryAcquire(Sequence(0, 12), 8).outcome, AcquireOutcome::kInFlight);
  EXPECT_THROW(cache_->Publish(lease, Sequence(0, 12)), InternalError);
  EXPECT_THROW((void)cache_->ReserveSnapshot(lease, 12), InternalError);

  Complete(order.id);
  EXPECT_FALSE(lease.IsLoading());
  EXPECT_EQ(NumSnapshots(), 1);
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, 1);
  const Lease next = Acquire(Sequence(0, 12), 8);
  EXPECT_FALSE(next.IsLoading());
  EXPECT_EQ(next.resumed_snapshot(), lease.resumed_snapshot());
}

TEST_P(StateLoadBackTest, ASnapshotThatCannotBeReadIsForgotten) {
  Lease lease = Acquire(Sequence(0, 12), 8);
  FailLoading(lease);
  EXPECT_EQ(lease.num_cached_tokens(), 0);
  EXPECT_EQ(lease.num_published_pages(), 0);
  EXPECT_TRUE(lease.pages().empty());
  EXPECT_EQ(lease.resumed_snapshot(), kNoStateSlot);
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, 0);
  EXPECT_EQ(NumSnapshots(), 0);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 2) << "the pages are as good as before";
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 0);
  EXPECT_EQ(NumFreeSlots(), 2);
  ASSERT_TRUE(cache_->Extend(lease, 12));
  PublishWith(lease, Sequence(0, 12), {8});
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 8);
}

TEST_P(StateLoadBackTest, PagesAndTheSnapshotAtTheirEndComeTogether) {
  EXPECT_EQ(EvictDevice(), 2);
  Lease lease = Acquire(Sequence(0, 12), 8);
  const TransferOrder order = TakeOrder();
  EXPECT_EQ(order.pages.size(), 2u);
  EXPECT_EQ(order.states.size(), 1u);
  EXPECT_EQ(lease.num_host_cached_tokens(), 8);
  Complete(order.id);
  EXPECT_EQ(NumSnapshots(), 1);
}

TEST_P(StateLoadBackTest, ASnapshotFromTheHostNeedsASlotMore) {
  const Lease first = Acquire({}, 0);
  Lease second = Acquire({}, 0);
  const std::string before = cache_->Dump();
  EXPECT_EQ(TryAcquire(Sequence(0, 12), 8).outcome, AcquireOutcome::kNoRoom);
  EXPECT_EQ(cache_->Dump(), before);
  EXPECT_EQ(TryAcquire(Sequence(0, 12), 0).outcome, AcquireOutcome::kAcquired);
  End(second);
  EXPECT_EQ(TryAcquire(Sequence(0, 12), 8).outcome, AcquireOutcome::kAcquired);
}

TEST_P(StateLoadBackTest, ASnapshotComputedAnewJoinsTheOneOnTheHost) {
  Lease lease = Acquire(Sequence(0, 8), 0);
  PublishWith(lease, Sequence(0, 8), {8});
  EXPECT_EQ(NumSnapshots(), 1);
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, 1);
  EXPECT_FALSE(Acquire(Sequence(0, 8), 8).IsLoading());
}

TEST_P(StateLoadBackTest, ACopyWhoseLeaseHasEndedKeepsItsSlotsUntilItsEvent) {
  Lease lease = Acquire(Sequence(0, 12), 8);
  End(lease);
  EXPECT_EQ(NumFreeSlots(), 2);
  EvictDeviceSnapshots();
  EXPECT_EQ(EvictDevice(), 0);
  EXPECT_EQ(NumSnapshots(), 1);
  CompleteAllTransfers();
  EXPECT_FALSE(Acquire(Sequence(0, 12), 8).IsLoading());
}

}  // namespace
}  // namespace lora_serve
