#include "cache_scenario.h"

// Failures of earlier systems around copies and recurrent state, as scenarios; the numbers are
// those of the list of pitfalls.

namespace lora_serve {
namespace {

class TransferPitfallsTest : public CacheScenario {};
LS_RUN_FOR_EVERY_HOST_SETUP(TransferPitfallsTest);

// Pitfall 13.
TEST_P(TransferPitfallsTest, TheWriteBackOfAPathThatIsCutCopiesWhatWasPlanned) {
  Open(kPlenty);
  const Tokens prompt = Sequence(0, 24);
  Lease lease = Compute(prompt);
  const std::vector<PageId> pages = PagesOf(lease);
  cache_->PlanWriteBacks();
  Lease shallow = Acquire(prompt, 8);  // cuts the edge before the order is handed out
  const TransferOrder order = TakeOrder();
  EXPECT_EQ(SourcesOf(order), pages);
  // Cut again while the copy runs, continued, and left by everybody who computed it.
  Lease branch = Compute(Concatenate(Sequence(0, 16), Sequence(500, 8)));
  Grow(lease, Sequence(0, 32));
  End(lease);
  End(shallow);
  End(branch);
  EXPECT_EQ(EvictDevice(), 4) << "everything but the source of the copy";
  Complete(order.id);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 6);
  EXPECT_EQ(EvictDevice(), 6);
  EXPECT_EQ(ProbeHost(prompt), 24);
  // The load-back reads exactly what was written, in the order of the sequence.
  const Lease again = Acquire(prompt, 24);
  const TransferOrder load_back = TakeOrder();
  EXPECT_EQ(SourcesOf(load_back), DestinationsOf(order));
  EXPECT_EQ(DestinationsOf(load_back), PagesOf(again));
}

// Pitfall 13.
TEST_P(TransferPitfallsTest, AWriteBackThatFailsAfterACutLeavesNothingOnTheHost) {
  Open(kPlenty);
  Cache(Sequence(0, 24));
  cache_->PlanWriteBacks();
  Cache(Concatenate(Sequence(0, 8), Sequence(500, 4)));
  Cache(Concatenate(Sequence(0, 16), Sequence(600, 4)));
  Fail(TakeOrder().id);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 0);
  EXPECT_EQ(cache_->Stats().num_free_host_pages, kPlenty);
  EXPECT_EQ(cache_->Stats().num_free_host_state_slots, HasState() ? kPlenty : 0);
  EXPECT_EQ(Probe(Sequence(0, 24)), 24);
}

// Pitfall 13.
TEST_P(TransferPitfallsTest, TheLoadBackOfAPathThatIsCutCopiesWhatWasPlanned) {
  Open(kPlenty);
  const Tokens prompt = Sequence(0, 24);
  Lease lease = Compute(prompt);
  const std::vector<PageId> device_pages = PagesOf(lease);
  cache_->PlanWriteBacks();
  const std::vector<PageId> host_pages = DestinationsOf(TakeOrder());
  CompleteAllTransfers();
  End(lease);
  Evict(Tier::kDevice, 3);
  Lease loading = Acquire(prompt, 24);
  const std::vector<PageId> pages = PagesOf(loading);
  const Lease shallow = Acquire(prompt, 4);  // cuts in front of the pages under way
  Lease branch = Acquire(Concatenate(Sequence(0, 8), Sequence(500, 8)), 8);
  Publish(branch, Concatenate(Sequence(0, 8), Sequence(500, 8)));
  const TransferOrder order = TakeOrder();
  EXPECT_EQ(SourcesOf(order), std::vector<PageId>(host_pages.begin() + 3, host_pages.end()));
  EXPECT_EQ(DestinationsOf(order), std::vector<PageId>(pages.begin() + 3, pages.end()));
  EXPECT_TRUE(std::ranges::equal(std::span(pages).first(3), std::span(device_pages).first(3)));
  Complete(order.id);
  EXPECT_EQ(PagesOf(loading), pages);
  EXPECT_EQ(PagesOf(Acquire(prompt, 24)), pages);
}

// Pitfall 13: a page's place in the sequence must survive cuts, evictions and copies in turn.
TEST_P(TransferPitfallsTest, CopiesInPiecesAddUpToTheSequence) {
  Open(kPlenty);
  const Tokens prompt = Sequence(0, 24);
  std::vector<PageId> host_pages;
  Lease lease = Acquire(prompt, 0);
  for (const std::int32_t num_computed : {8, 12, 24}) {
    Publish(lease, FirstTokens(prompt, num_computed));
    cache_->PlanWriteBacks();
    (void)Acquire(prompt, num_computed - 4);  // cuts what was just published
    const TransferOrder order = TakeOrder();
    for (const PageCopy& copy : order.pages) {
      EXPECT_EQ(copy.source, lease.pages()[host_pages.size()]);
      host_pages.push_back(copy.destination);
    }
    Complete(order.id);
  }
  End(lease);
  EvictDevice();
  const Lease again = Acquire(prompt, 24);
  EXPECT_EQ(SourcesOf(TakeOrder()), host_pages);
}

class StatePitfallsTest : public CacheScenario {};
LS_RUN_FOR_EVERY_STATE_SETUP(StatePitfallsTest);

// Pitfall 15.
TEST_P(StatePitfallsTest, ASnapshotGoesWithThePageAtItsEnd) {
  Open(16);
  Cache(Sequence(0, 16));
  CopyToHost();
  EXPECT_EQ(StatsOf(id_).num_device_snapshots, 4);
  Evict(Tier::kDevice, 1);
  EXPECT_EQ(StatsOf(id_).num_device_snapshots, HasHost() ? 4 : 3) << "the host still has the page";
  EXPECT_EQ(ProbeResumable(Sequence(0, 16)), HasHost() ? 16 : 12);
  if (HasHost()) Evict(Tier::kHost, 1);
  EXPECT_EQ(StatsOf(id_).num_device_snapshots, 3);
  EXPECT_EQ(StatsOf(id_).num_host_snapshots, HasHost() ? 3 : 0);
  EXPECT_EQ(NumFreeSlots(), kPlenty - 3);
  EXPECT_EQ(ProbeResumable(Sequence(0, 16)), 12);
}

// Pitfall 15: the page comes back, the state that belonged to it does not.
TEST_P(StatePitfallsTest, ASnapshotDoesNotComeBackWithItsPage) {
  Open(16);
  Cache(Sequence(0, 16));
  Evict(Tier::kDevice, 1);
  Lease lease = Acquire(Sequence(0, 16), 16);
  EXPECT_EQ(lease.num_cached_tokens(), 12);
  cache_->Publish(lease, Sequence(0, 16));  // without a snapshot
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
  EXPECT_EQ(ProbeResumable(Sequence(0, 16)), 12);
}

// Pitfall 15: cuts and growing edges must not move a snapshot to another boundary.
TEST_P(StatePitfallsTest, ASnapshotStaysAtItsBoundaryWhenItsEdgeGrowsOrIsCut) {
  Open(16);
  Lease lease = Acquire(Sequence(0, 24), 0);
  ASSERT_TRUE(cache_->ReserveSnapshot(lease, 12));
  cache_->Publish(lease, Sequence(0, 12));
  cache_->Publish(lease, Sequence(0, 24));  // no snapshot at the new end
  EXPECT_EQ(ProbeResumable(Sequence(0, 24)), 12);
  Lease branch = Acquire(Concatenate(Sequence(0, 8), Sequence(100, 4)), 0);
  cache_->Publish(branch, Concatenate(Sequence(0, 8), Sequence(100, 4)));  // cuts after 8 tokens
  EXPECT_EQ(ProbeResumable(Sequence(0, 24)), 12);
  EXPECT_EQ(ProbeResumable(Sequence(0, 8)), 0);
  EXPECT_EQ(ProbeResumable(Concatenate(Sequence(0, 8), Sequence(100, 4))), 0);
  cache_->CheckInvariants();
}

// Pitfall 15: what a lease remembers of its snapshots may be gone when it looks again.
TEST_P(StatePitfallsTest, ARequestOutlivesTheSnapshotsItLeft) {
  KVPrefixCacheOptions options = OptionsWith(kPlenty);
  options.num_device_state_slots = 4;
  options.max_snapshots_per_lease = 2;
  OpenWith(options);
  Lease lease = Acquire(Sequence(0, 40), 0);
  Publish(lease, Sequence(0, 8));  // slots: the lease's, two snapshots
  EXPECT_EQ(StatsOf(id_).num_device_snapshots, 2);
  {  // others need the slots
    const Lease second = Acquire(Sequence(100, 4), 0);
    const Lease third = Acquire(Sequence(200, 4), 0);
    const Lease fourth = Acquire(Sequence(300, 4), 0);
    EXPECT_EQ(StatsOf(id_).num_device_snapshots, 0);
  }
  Publish(lease, Sequence(0, 24));  // goes over the limit of its snapshots, that are gone
  EXPECT_EQ(StatsOf(id_).num_device_snapshots, 2);
  EXPECT_EQ(ProbeResumable(Sequence(0, 24)), 24);
  EXPECT_EQ(ProbeResumable(Sequence(0, 16)), 0);
  End(lease);
  EXPECT_EQ(NumFreeSlots(), 2);
}

class WindowPitfallsTest : public CacheScenario {
 protected:
  void OpenWindowed(WindowLayers window_layers) {
    KVPrefixCacheOptions options = OptionsWith(kPlenty);
    options.window_layers = window_layers;
    OpenWith(options);
    Cache(Sequence(0, 16));
    CopyToHost();
  }
};
LS_RUN_FOR_EVERY_SETUP(WindowPitfallsTest);

// Pitfall 15: what a ring buffer held at a boundary is gone, whoever asks.
TEST_P(WindowPitfallsTest, APrefixWhoseSlidingWindowIsInARingBufferIsNeverResumed) {
  OpenWindowed(WindowLayers::kRingBuffer);
  if (HasHost()) Evict(Tier::kDevice, 2);
  for (const MatchIntent intent : {MatchIntent::kPrefixReuse, MatchIntent::kRecovery}) {
    EXPECT_EQ(ProbeAll(id_, Sequence(0, 16), intent).num_resumable_tokens, 0);
    EXPECT_FALSE(ProbeAll(id_, Sequence(0, 16), intent).is_in_flight);
    const Lease lease = Acquire(Sequence(0, 16), 16, intent);
    EXPECT_EQ(lease.num_cached_tokens(), 0);
    EXPECT_FALSE(lease.IsLoading());
    EXPECT_EQ(lease.resumed_snapshot(), kNoStateSlot);
  }
}

TEST_P(WindowPitfallsTest, APrefixWhoseSlidingWindowIsInPagesIsResumedAnywhere) {
  OpenWindowed(WindowLayers::kPaged);
  EXPECT_EQ(Acquire(Sequence(0, 16), 15).num_cached_tokens(), 12);
  if (HasHost()) EvictDevice();
  EXPECT_EQ(Acquire(Sequence(0, 16), 11).num_cached_tokens(), 8);
}

}  // namespace
}  // namespace lora_serve
