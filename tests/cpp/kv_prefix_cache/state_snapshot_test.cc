#include "common/errors.h"
#include "state_scenario.h"

// Recurrent state on the device: snapshots at page boundaries, the slots they take, and who may
// resume from them. Their copies between the tiers are in state_transfer_test.cc.

namespace lora_serve {
namespace {

class StateSnapshotTest : public StateScenario {};
LS_RUN_FOR_EVERY_STATE_SETUP(StateSnapshotTest);

// --- Matching ------------------------------------------------------------------------------------

TEST_P(StateSnapshotTest, AMatchEndsAtTheDeepestSnapshot) {
  Open(16);
  CacheWith(Sequence(0, 20), {8, 16});
  EXPECT_EQ(Probe(Sequence(0, 20)), 20);
  EXPECT_EQ(ProbeResumable(Sequence(0, 20)), 16);
  EXPECT_EQ(ProbeResumable(Sequence(0, 15)), 8);
  EXPECT_EQ(ProbeResumable(Sequence(0, 7)), 0);
  EXPECT_EQ(Acquire(Sequence(0, 20), 20).num_cached_tokens(), 16);
  EXPECT_EQ(Acquire(Sequence(0, 20), 15).num_cached_tokens(), 8);
  const Lease cold = Acquire(Sequence(0, 20), 7);
  EXPECT_EQ(cold.num_cached_tokens(), 0);
  EXPECT_EQ(cold.resumed_snapshot(), kNoStateSlot);
}

TEST_P(StateSnapshotTest, PagesWithoutASnapshotAreNoUse) {
  Open(16);
  CacheWith(Sequence(0, 16), {});
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
  EXPECT_EQ(ProbeResumable(Sequence(0, 16)), 0);
  const Lease lease = Acquire(Sequence(0, 16), 16);
  EXPECT_EQ(lease.num_cached_tokens(), 0);
  EXPECT_EQ(lease.num_published_pages(), 0);
  EXPECT_EQ(lease.resumed_snapshot(), kNoStateSlot);
  EXPECT_NE(lease.state_slot(), kNoStateSlot);
}

TEST_P(StateSnapshotTest, ABranchingPointIsWorthASnapshot) {
  Open(kPlenty);
  const Tokens left = Concatenate(Sequence(0, 8), Sequence(100, 8));
  const Tokens right = Concatenate(Sequence(0, 8), Sequence(200, 8));
  CacheWith(left, {16});
  Lease lease = Acquire(right, 15);
  EXPECT_EQ(lease.num_cached_tokens(), 0);
  EXPECT_EQ(lease.branching_tokens(), 8);
  EXPECT_EQ(Acquire(right, 7).branching_tokens(), 4) << "no deeper than it may take";
  PublishWith(lease, right, {8});
  const Lease third = Acquire(Concatenate(Sequence(0, 8), Sequence(300, 8)), 15);
  EXPECT_EQ(third.num_cached_tokens(), 8);
  EXPECT_EQ(third.branching_tokens(), 0);
}

// --- Copy on write -------------------------------------------------------------------------------

TEST_P(StateSnapshotTest, EveryLeaseHasAWorkingSlotOfItsOwnAndSharesWhatItResumesFrom) {
  Open(kPlenty);
  const StateSlot snapshot = CacheWith(Sequence(0, 8), {8}).at(0);
  Lease first = Acquire(Sequence(0, 12), 8);
  const Lease second = Acquire(Sequence(0, 12), 8);
  EXPECT_EQ(first.resumed_snapshot(), snapshot);
  EXPECT_EQ(second.resumed_snapshot(), snapshot);
  EXPECT_NE(first.state_slot(), snapshot) << "the request would overwrite the snapshot";
  EXPECT_NE(second.state_slot(), snapshot);
  EXPECT_NE(first.state_slot(), second.state_slot());
  const StateSlot working = first.state_slot();
  cache_->Publish(first, Sequence(0, 12));
  EXPECT_EQ(first.resumed_snapshot(), kNoStateSlot);
  EXPECT_EQ(first.state_slot(), working);
  EXPECT_EQ(second.resumed_snapshot(), snapshot);
  EXPECT_EQ(Acquire(Sequence(0, 12), 8).resumed_snapshot(), snapshot);
}

TEST_P(StateSnapshotTest, AReservedSlotBecomesTheSnapshot) {
  Open(kPlenty);
  Lease lease = Acquire(Sequence(0, 12), 0);
  const std::optional<StateSlot> slot = cache_->ReserveSnapshot(lease, 8);
  ASSERT_TRUE(slot);
  EXPECT_NE(*slot, lease.state_slot());
  EXPECT_EQ(NumFreeSlots(), kPlenty - 2);
  EXPECT_EQ(NumSnapshots(), 0);
  cache_->Publish(lease, Sequence(0, 4));
  EXPECT_EQ(NumSnapshots(), 0) << "its boundary is not published";
  cache_->Publish(lease, Sequence(0, 12));
  EXPECT_EQ(NumSnapshots(), 1);
  EXPECT_EQ(NumFreeSlots(), kPlenty - 2);
  EXPECT_EQ(Acquire(Sequence(0, 12), 11).resumed_snapshot(), *slot);
}

// --- Pins ----------------------------------------------------------------------------------------

TEST_P(StateSnapshotTest, TheResumedSnapshotIsPinnedUntilTheFirstPublish) {
  OpenWithSlots(3);
  CacheWith(Sequence(0, 8), {8});
  Lease lease = Acquire(Sequence(0, 12), 8);
  const Lease filler = Acquire(Sequence(100, 4), 0);
  const std::string before = cache_->Dump();
  EXPECT_EQ(TryAcquire(Sequence(200, 4), 0).outcome, AcquireOutcome::kNoRoom);
  EXPECT_EQ(cache_->ReserveSnapshot(lease, 12), std::nullopt);
  EXPECT_EQ(cache_->Dump(), before);
  cache_->Publish(lease, Sequence(0, 9));  // nothing new, but the copy has been made
  const Lease newcomer = Acquire(Sequence(200, 4), 0);
  EXPECT_EQ(NumSnapshots(), 0);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8) << "the pages are still leased";
}

TEST_P(StateSnapshotTest, TheEndOfALeaseUnpinsTheSnapshotItResumedFrom) {
  OpenWithSlots(2);
  CacheWith(Sequence(0, 8), {8});
  Lease lease = Acquire(Sequence(0, 12), 8);
  EXPECT_EQ(TryAcquire(Sequence(100, 4), 0).outcome, AcquireOutcome::kNoRoom);
  End(lease);
  const Lease first = Acquire(Sequence(100, 4), 0);
  const Lease second = Acquire(Sequence(200, 4), 0);
  EXPECT_EQ(NumSnapshots(), 0);
}

using StateDrainTest = StateSnapshotTest;
LS_RUN_FOR_SETUPS(StateDrainTest, {Domain::kAdapter}, {false, true}, {true});

TEST_P(StateDrainTest, ADrainTakesSnapshotsAsSoonAsNobodyResumesFromThem) {
  Open(kPlenty);
  CacheWith(Sequence(0, 16), {8, 16});
  CopyToHost();
  Lease lease = Acquire(Sequence(0, 12), 8);
  cache_->DrainNamespace(id_);
  cache_->CheckInvariants();
  EXPECT_EQ(NumSnapshots(), 1);
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, 0);
  EXPECT_EQ(cache_->ReserveSnapshot(lease, 12), std::nullopt);
  cache_->Publish(lease, Sequence(0, 12));
  cache_->CheckInvariants();
  EXPECT_EQ(NumSnapshots(), 0);
  EXPECT_EQ(lease.num_published_pages(), 2);
}

// --- Slots ---------------------------------------------------------------------------------------

TEST_P(StateSnapshotTest, ALeaseNeedsASlotEvenIfPagesAreFree) {
  OpenWithSlots(2);
  Lease first = Acquire(Sequence(0, 4), 0);
  const Lease second = Acquire(Sequence(100, 4), 0);
  EXPECT_EQ(TryAcquire(Sequence(200, 4), 0).outcome, AcquireOutcome::kNoRoom);
  EXPECT_EQ(cache_->Stats().num_free_pages, kPlenty - 2);
  End(first);
  EXPECT_EQ(TryAcquire(Sequence(200, 4), 0).outcome, AcquireOutcome::kAcquired);
}

TEST_P(StateSnapshotTest, ALeaseNeverTakesTheSlotOfTheSnapshotItResumesFrom) {
  OpenWithSlots(2);
  CacheWith(Sequence(0, 8), {8});
  const Lease running = Acquire(Sequence(100, 4), 0);
  const std::string before = cache_->Dump();
  EXPECT_EQ(TryAcquire(Sequence(0, 12), 8).outcome, AcquireOutcome::kNoRoom);
  EXPECT_EQ(cache_->Dump(), before);
  EXPECT_EQ(TryAcquire(Sequence(0, 12), 0).outcome, AcquireOutcome::kAcquired);
  EXPECT_EQ(NumSnapshots(), 0);
}

TEST_P(StateSnapshotTest, LeasesAndSnapshotsAreCountedInSlots) {
  Open(kPlenty);
  Lease lease = Acquire(Sequence(0, 16), 0);
  EXPECT_EQ(NumFreeSlots(), kPlenty - 1);
  PublishWith(lease, Sequence(0, 16), {8, 16});
  EXPECT_EQ(NumFreeSlots(), kPlenty - 3);
  EXPECT_EQ(NumSnapshots(), 2);
  ASSERT_TRUE(cache_->Extend(lease, 24));
  EXPECT_TRUE(cache_->ReserveSnapshot(lease, 24));
  EXPECT_EQ(NumFreeSlots(), kPlenty - 4);
  End(lease);
  EXPECT_EQ(NumFreeSlots(), kPlenty - 2) << "a reservation goes back with its lease";
  EXPECT_EQ(cache_->Stats().num_device_state_slots, kPlenty);
}

TEST_P(StateSnapshotTest, AReservationIsRefusedWhenItIsOfNoUse) {
  OpenWithSlots(3);
  Lease lease = Acquire(Sequence(0, 12), 0);
  EXPECT_TRUE(cache_->ReserveSnapshot(lease, 8));
  EXPECT_EQ(cache_->ReserveSnapshot(lease, 8), std::nullopt) << "one is reserved already";
  cache_->Publish(lease, Sequence(0, 8));
  EXPECT_EQ(cache_->ReserveSnapshot(lease, 8), std::nullopt) << "the tree has it";
  EXPECT_EQ(NumSnapshots(), 1);
  const Lease resumed = Acquire(Sequence(0, 8), 8);
  EXPECT_EQ(cache_->ReserveSnapshot(lease, 12), std::nullopt) << "no slot can be had";
}

TEST_P(StateSnapshotTest, AReservationAtAPublishedBoundaryIsAttachedByTheNextPublish) {
  Open(kPlenty);
  Lease lease = Acquire(Sequence(0, 12), 0);
  cache_->Publish(lease, Sequence(0, 8));
  ASSERT_TRUE(cache_->ReserveSnapshot(lease, 8));
  cache_->Publish(lease, Sequence(0, 8));
  EXPECT_EQ(NumSnapshots(), 1);
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 8);
}

TEST_P(StateSnapshotTest, AReservationTakesTheSlotOfAnOlderSnapshot) {
  OpenWithSlots(3);
  CacheWith(Sequence(100, 4), {4});
  CacheWith(Sequence(200, 4), {4});
  Lease lease = Acquire(Sequence(0, 8), 0);
  EXPECT_TRUE(cache_->ReserveSnapshot(lease, 8));
  EXPECT_EQ(ProbeResumable(Sequence(100, 4)), 0);
  EXPECT_EQ(ProbeResumable(Sequence(200, 4)), 4);
}

TEST_P(StateSnapshotTest, OfTwoTwinsTheTreeKeepsTheFirstSnapshot) {
  Open(kPlenty);
  Lease first = Acquire(Sequence(0, 8), 0);
  Lease second = Acquire(Sequence(0, 8), 0);
  const std::optional<StateSlot> slot = cache_->ReserveSnapshot(first, 8);
  ASSERT_TRUE(slot);
  ASSERT_TRUE(cache_->ReserveSnapshot(second, 8));
  cache_->Publish(first, Sequence(0, 8));
  EXPECT_EQ(NumFreeSlots(), kPlenty - 4);
  cache_->Publish(second, Sequence(0, 8));
  EXPECT_EQ(NumFreeSlots(), kPlenty - 3) << "the second one's slot was not given back";
  EXPECT_EQ(NumSnapshots(), 1);
  EXPECT_EQ(Acquire(Sequence(0, 8), 8).resumed_snapshot(), *slot);
}

TEST_P(StateSnapshotTest, BoundariesThatMakeNoSenseAreRefused) {
  Open(kPlenty);
  Lease lease = Acquire(Sequence(0, 16), 0);
  cache_->Publish(lease, Sequence(0, 8));
  for (const std::int32_t num_tokens : {-4, 0, 4, 10, 20}) {
    EXPECT_THROW((void)cache_->ReserveSnapshot(lease, num_tokens), InternalError)
        << "after " << num_tokens << " tokens";
  }
  EXPECT_EQ(NumFreeSlots(), kPlenty - 1);
}

// --- What one lease may leave behind -------------------------------------------------------------

class SnapshotLimitTest : public StateSnapshotTest {
 protected:
  void OpenWithLimit(std::int32_t max_snapshots_per_lease) {
    KVPrefixCacheOptions options = OptionsWith(kPlenty);
    options.max_snapshots_per_lease = max_snapshots_per_lease;
    OpenWith(options);
  }
};
LS_RUN_FOR_EVERY_STATE_SETUP(SnapshotLimitTest);

TEST_P(SnapshotLimitTest, TheOldestSnapshotOfALeaseMakesRoomForItsNext) {
  OpenWithLimit(2);
  CacheWith(Sequence(100, 4), {4});  // somebody else's does not count
  Lease lease = Acquire(Sequence(0, 16), 0);
  PublishWith(lease, Sequence(0, 12), {4, 8, 12});
  EXPECT_EQ(NumSnapshots(), 3);
  EXPECT_EQ(ProbeResumable(Sequence(0, 4)), 0);
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 8);
  PublishWith(lease, Sequence(0, 16), {16});
  EXPECT_EQ(NumSnapshots(), 3);
  EXPECT_EQ(ProbeResumable(Sequence(0, 11)), 0);
  EXPECT_EQ(ProbeResumable(Sequence(0, 12)), 12);
  EXPECT_EQ(ProbeResumable(Sequence(100, 4)), 4);
}

TEST_P(SnapshotLimitTest, ASnapshotThatSomebodyResumesFromStays) {
  OpenWithLimit(1);
  Lease lease = Acquire(Sequence(0, 12), 0);
  const StateSlot slot = PublishWith(lease, Sequence(0, 4), {4}).at(0);
  const Lease resumed = Acquire(Sequence(0, 8), 4);
  EXPECT_EQ(resumed.resumed_snapshot(), slot);
  PublishWith(lease, Sequence(0, 8), {8});
  EXPECT_EQ(NumSnapshots(), 2);
  EXPECT_EQ(resumed.resumed_snapshot(), slot);
  PublishWith(lease, Sequence(0, 12), {12});
  EXPECT_EQ(NumSnapshots(), 2) << "the one after 8 tokens was its oldest";
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 4);
}

// --- Eviction ------------------------------------------------------------------------------------

TEST_P(StateSnapshotTest, AnInnerSnapshotMayGoBeforeDeeperOnesAndItsPagesStay) {
  OpenWithSlots(4);
  CacheWith(Sequence(0, 12), {4, 8, 12});
  const Lease first = Acquire(Sequence(100, 4), 0);
  const Lease second = Acquire(Sequence(200, 4), 0);
  EXPECT_EQ(NumSnapshots(), 2);
  EXPECT_EQ(ProbeResumable(Sequence(0, 4)), 0) << "the first attached is the oldest";
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 8);
  EXPECT_EQ(ProbeResumable(Sequence(0, 12)), 12);
  EXPECT_EQ(Probe(Sequence(0, 12)), 12);
  EXPECT_EQ(cache_->Stats().num_evicted_pages, 0);
}

TEST_P(StateSnapshotTest, ASnapshotBelowALeaseThatDoesNotResumeFromItMayGo) {
  OpenWithSlots(3);
  CacheWith(Sequence(0, 8), {4, 8});
  const Lease lease = Acquire(Sequence(0, 8), 4);
  EXPECT_EQ(TryAcquire({}, 0).outcome, AcquireOutcome::kAcquired);
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 4);
}

TEST_P(StateSnapshotTest, AResumedSnapshotIsYoung) {
  OpenWithSlots(3);
  CacheWith(Sequence(0, 4), {4});
  CacheWith(Sequence(100, 4), {4});
  EXPECT_EQ(Acquire(Sequence(0, 8), 4).num_cached_tokens(), 4);
  const Lease first = Acquire({}, 0);
  const Lease second = Acquire({}, 0);
  EXPECT_EQ(ProbeResumable(Sequence(0, 4)), 4);
  EXPECT_EQ(ProbeResumable(Sequence(100, 4)), 0);
}

// --- Models without recurrent state --------------------------------------------------------------

using NoStateTest = StateSnapshotTest;
LS_RUN_FOR_SETUPS(NoStateTest, {Domain::kBase, Domain::kAdapter}, {false, true}, {false});

TEST_P(NoStateTest, AModelWithoutRecurrentStateHasNoSlots) {
  Open(kPlenty);
  Lease lease = Acquire(Sequence(0, 12), 0);
  EXPECT_EQ(lease.state_slot(), kNoStateSlot);
  EXPECT_EQ(lease.resumed_snapshot(), kNoStateSlot);
  EXPECT_EQ(cache_->ReserveSnapshot(lease, 8), std::nullopt);
  Publish(lease, Sequence(0, 12));
  const Lease next = Acquire(Sequence(0, 12), 11);
  EXPECT_EQ(next.num_cached_tokens(), 8);
  EXPECT_EQ(next.resumed_snapshot(), kNoStateSlot);
  EXPECT_EQ(next.branching_tokens(), 0);
}

}  // namespace
}  // namespace lora_serve
