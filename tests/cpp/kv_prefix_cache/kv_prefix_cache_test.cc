#include "kv_prefix_cache/kv_prefix_cache.h"

#include <limits>
#include <utility>

#include "cache_scenario.h"
#include "common/errors.h"

namespace lora_serve {
namespace {

TEST(KVPrefixCacheOptionsTest, AreValidated) {
  EXPECT_THROW(KVPrefixCache({.page_size = 0, .num_device_pages = 1}), InvalidArgumentError);
  EXPECT_THROW(KVPrefixCache({.page_size = 16, .num_device_pages = 0}), InvalidArgumentError);
  EXPECT_THROW(KVPrefixCache({.num_device_pages = 1, .num_host_pages = -1}), InvalidArgumentError);
  EXPECT_THROW(KVPrefixCache({.num_device_pages = 1, .write_back_watermark_pages = -1}),
               InvalidArgumentError);
  EXPECT_THROW(KVPrefixCache({.num_device_pages = 1, .num_device_state_slots = -1}),
               InvalidArgumentError);
  EXPECT_THROW(KVPrefixCache({.num_device_pages = 1,
                              .num_host_pages = 1,
                              .num_device_state_slots = 1,
                              .num_host_state_slots = -1}),
               InvalidArgumentError);
  EXPECT_THROW(
      KVPrefixCache({.num_device_pages = 1, .num_host_pages = 1, .num_host_state_slots = 1}),
      InvalidArgumentError)
      << "host slots without device slots";
  EXPECT_THROW(KVPrefixCache({.num_device_pages = 1, .max_snapshots_per_lease = 0}),
               InvalidArgumentError);
  const KVPrefixCache cache({.page_size = 16, .num_device_pages = 1});
  EXPECT_EQ(cache.page_size(), 16);
  EXPECT_EQ(cache.Stats().num_free_pages, 1);
  EXPECT_EQ(cache.NamespaceStatsList().size(), 1u);
}

class KVPrefixCacheTest : public CacheScenario {};
LS_RUN_FOR_EVERY_SETUP(KVPrefixCacheTest);

/// What counts nodes: snapshots cut edges, so only for models without state.
using EdgeTest = KVPrefixCacheTest;
LS_RUN_FOR_EVERY_DOMAIN(EdgeTest);

TEST_P(KVPrefixCacheTest, ProbeFindsWholePublishedPages) {
  Open(8);
  const Lease lease = Compute(Sequence(0, 10));
  EXPECT_EQ(lease.num_published_pages(), 2);
  EXPECT_EQ(lease.pages().size(), 3u);
  EXPECT_EQ(Probe(Sequence(0, 10)), 8);
  EXPECT_EQ(Probe(Sequence(0, 7)), 4);
  EXPECT_EQ(Probe(Sequence(0, 3)), 0);
  EXPECT_EQ(Probe(Sequence(1, 10)), 0);
}

TEST_P(KVPrefixCacheTest, ProbeChangesNothing) {
  Open(8);
  Cache(Sequence(0, 16));
  Cache(Sequence(100, 8));
  const std::string before = cache_->Dump();
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);  // ends inside the edge
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
  EXPECT_EQ(Probe(Sequence(50, 16)), 0);
  EXPECT_EQ(cache_->Dump(), before);
  // No touch either: what was only probed is still the oldest.
  Evict(Tier::kDevice, 1);
  EXPECT_EQ(Probe(Sequence(0, 16)), 12);
  EXPECT_EQ(Probe(Sequence(100, 8)), 8);
}

TEST_P(KVPrefixCacheTest, AcquireTakesCachedPagesAndAddsPrivateOnes) {
  Open(8);
  std::vector<PageId> first_pages;
  {
    const Lease lease = Compute(Sequence(0, 8));
    first_pages = PagesOf(lease);
  }
  const Lease lease = Acquire(Sequence(0, 13), 12);
  EXPECT_EQ(lease.num_cached_tokens(), 8);
  EXPECT_EQ(lease.num_published_pages(), 2);
  ASSERT_EQ(lease.pages().size(), 4u);
  EXPECT_EQ(lease.pages()[0], first_pages[0]);
  EXPECT_EQ(lease.pages()[1], first_pages[1]);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_leases, 1);
}

TEST_P(KVPrefixCacheTest, AcquireTakesNoMoreThanItIsAllowed) {
  Open(8);
  Cache(Sequence(0, 16));
  EXPECT_EQ(Acquire(Sequence(0, 16), 15).num_cached_tokens(), 12);
  EXPECT_EQ(Acquire(Sequence(0, 16), 12).num_cached_tokens(), 12);
  EXPECT_EQ(Acquire(Sequence(0, 16), 3).num_cached_tokens(), 0);
  EXPECT_EQ(Acquire(Sequence(0, 16), 0).num_cached_tokens(), 0);
  EXPECT_EQ(Acquire(Sequence(0, 16), 16).num_cached_tokens(), 16);
}

TEST_P(KVPrefixCacheTest, CapacityMayBeLessThanTheSequenceAndLessThanTheHit) {
  Open(8);
  const Tokens tokens = Sequence(0, 16);
  Cache(tokens);
  const Lease first_chunk =
      AcquireIn(handle_, tokens, {.max_cached_tokens = 0, .num_capacity_tokens = 5});
  EXPECT_EQ(first_chunk.pages().size(), 2u);
  const Lease hit = AcquireIn(handle_, tokens, {.max_cached_tokens = 16, .num_capacity_tokens = 4});
  EXPECT_EQ(hit.pages().size(), 4u);
}

TEST_P(KVPrefixCacheTest, AcquireFailsWithoutATrace) {
  Open(6);
  Cache(Sequence(100, 4));
  Cache(Sequence(0, 16));
  const Lease running = Acquire(Sequence(50, 4), 0);
  const std::string before = cache_->Dump();
  // 2 pages of the prefix would be pinned and 5 more are needed, but only 3 + 0 could be freed.
  EXPECT_EQ(TryAcquire(Sequence(0, 8 + 20), 8).outcome, AcquireOutcome::kNoRoom);
  EXPECT_EQ(TryAcquire(Concatenate(Sequence(0, 8), Sequence(200, 16)), 8).outcome,
            AcquireOutcome::kNoRoom);
  EXPECT_EQ(cache_->Dump(), before);
  const CacheStats stats = cache_->Stats();
  EXPECT_EQ(stats.num_evicted_pages, 0);
  EXPECT_EQ(stats.num_tree_pages, 5);
  EXPECT_EQ(StatsOf(id_).num_leases, 1);
  Evict(Tier::kDevice, 1);
  EXPECT_EQ(Probe(Sequence(100, 4)), 0) << "a failed Acquire changed the order of eviction";
}

TEST_P(KVPrefixCacheTest, AcquireNeverEvictsThePrefixItTakes) {
  Open(4);
  Cache(Sequence(0, 12));
  // The prefix is the only thing that could be evicted: one page is free, two are needed.
  EXPECT_EQ(TryAcquire(Sequence(0, 20), 12).outcome, AcquireOutcome::kNoRoom);
  const Lease lease = Acquire(Sequence(0, 16), 12);
  EXPECT_EQ(lease.num_cached_tokens(), 12);
  EXPECT_EQ(cache_->Stats().num_evicted_pages, 0);
}

TEST_P(KVPrefixCacheTest, AcquireEvictsTheUnusedRestOfTheEdgeItTakes) {
  Open(4);
  Cache(Sequence(0, 16));
  const Lease lease = Acquire(Concatenate(Sequence(0, 4), Sequence(100, 12)), 4);
  EXPECT_EQ(lease.num_cached_tokens(), 4);
  EXPECT_EQ(cache_->Stats().num_evicted_pages, 3);
  EXPECT_EQ(Probe(Sequence(0, 16)), 4);
}

TEST_P(KVPrefixCacheTest, ExtendGrowsTheLeaseAndKeepsItsPages) {
  Open(4);
  Lease lease = Acquire(Sequence(0, 4), 0);
  const PageId first_page = lease.pages()[0];
  EXPECT_TRUE(cache_->Extend(lease, 4));
  EXPECT_EQ(lease.pages().size(), 1u);
  EXPECT_TRUE(cache_->Extend(lease, 5));
  EXPECT_EQ(lease.pages().size(), 2u);
  EXPECT_EQ(lease.pages()[0], first_page);
  EXPECT_TRUE(cache_->Extend(lease, 0));
  EXPECT_EQ(lease.pages().size(), 2u);
}

TEST_P(KVPrefixCacheTest, ExtendFailsWithoutATraceWhenLeasesHoldEverything) {
  Open(5);
  Cache(Sequence(100, 4));
  Lease lease = Compute(Sequence(0, 8));
  const Lease other_lease = Acquire(Sequence(50, 4), 0);
  EXPECT_FALSE(cache_->Extend(lease, 20));
  EXPECT_FALSE(cache_->Extend(lease, std::numeric_limits<std::int32_t>::max()));
  EXPECT_EQ(lease.pages().size(), 2u);
  EXPECT_EQ(Probe(Sequence(100, 4)), 4);
  EXPECT_TRUE(cache_->Extend(lease, 16));  // the free page and the evicted one
  EXPECT_EQ(Probe(Sequence(100, 4)), 0);
  cache_->CheckInvariants();
}

TEST_P(EdgeTest, ADecodingLeaseGrowsOneEdge) {
  Open(8);
  Tokens tokens = Sequence(0, 6);
  Lease lease = Compute(tokens);
  for (TokenId token = 6; token < 26; ++token) {
    tokens.push_back(token);
    ASSERT_TRUE(cache_->Extend(lease, NumTokensOf(tokens)));
    Publish(lease, tokens);
    ASSERT_EQ(lease.num_published_pages(), NumTokensOf(tokens) / kPageSize);
  }
  EXPECT_EQ(cache_->Stats().num_nodes, 1);
  EXPECT_EQ(Probe(tokens), 24);
}

TEST_P(EdgeTest, PublishDoesNotGrowAnEdgeThatAnotherLeasePins) {
  Open(8);
  Lease first = Compute(Sequence(0, 8));
  const Lease second = Acquire(Sequence(0, 8), 8);
  ASSERT_TRUE(cache_->Extend(first, 12));
  Publish(first, Sequence(0, 12));
  EXPECT_EQ(cache_->Stats().num_nodes, 2);
  EXPECT_EQ(second.pages().size(), 2u);
  first = Lease();
  EXPECT_EQ(EvictDevice(), 1) << "the other lease protects the first two pages only";
}

TEST_P(EdgeTest, PublishDoesNotGrowAnEdgeThatHasChildren) {
  Open(8);
  Lease first = Compute(Sequence(0, 4));
  {
    const Lease branch = Compute(Concatenate(Sequence(0, 4), Sequence(100, 4)));
  }
  ASSERT_TRUE(cache_->Extend(first, 8));
  Publish(first, Sequence(0, 8));
  EXPECT_EQ(Probe(Concatenate(Sequence(0, 4), Sequence(100, 4))), 8);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  EXPECT_EQ(cache_->Stats().num_nodes, 3);
}

TEST_P(KVPrefixCacheTest, TheTreeKeepsTheFirstOfTwoTwinsAndTheLeaseItsOwn) {
  Open(8);
  Lease first = Acquire(Sequence(0, 8), 0);
  Lease second = Acquire(Sequence(0, 8), 0);
  Publish(first, Sequence(0, 8));
  const std::vector<PageId> own_pages = PagesOf(second);
  Publish(second, Sequence(0, 8));
  EXPECT_EQ(PagesOf(second), own_pages) << "a page changed under a running request";
  EXPECT_EQ(second.num_published_pages(), 2);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 2);
  EXPECT_EQ(PagesOf(Acquire(Sequence(0, 8), 8)), PagesOf(first));
  second = Lease();
  EXPECT_EQ(StatsOf(id_).num_private_pages, 0);
}

TEST_P(KVPrefixCacheTest, PublishContinuesBelowATwin) {
  Open(12);
  Lease first = Acquire(Sequence(0, 8), 0);
  Lease second = Acquire(Sequence(0, 16), 0);
  Publish(first, Sequence(0, 8));
  Publish(second, Sequence(0, 16));
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 4);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 2);
  first = Lease();
  // The pin moved to the deepest published node: nothing of the path can go.
  EXPECT_EQ(EvictDevice(), 0);
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
}

TEST_P(KVPrefixCacheTest, PublishInsideATwinPinsExactlyWhatWasPublished) {
  Open(12);
  Lease first = Acquire(Sequence(0, 16), 0);
  Lease second = Acquire(Sequence(0, 16), 0);
  Publish(first, Sequence(0, 16));
  Publish(second, Sequence(0, 8));  // a chunk behind
  first = Lease();
  EXPECT_EQ(EvictDevice(), 2);
  EXPECT_EQ(Probe(Sequence(0, 16)), 8);
  Publish(second, Sequence(0, 16));  // its own pages replace the evicted ones
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 2);
}

TEST_P(KVPrefixCacheTest, PublishingTheSameTwiceChangesNothing) {
  Open(4);
  Lease lease = Compute(Sequence(0, 10));
  Publish(lease, Sequence(0, 10));
  Publish(lease, Sequence(0, 4));
  EXPECT_EQ(lease.num_published_pages(), 2);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
}

TEST_P(KVPrefixCacheTest, ReleaseReturnsPrivatePagesAndKeepsPublishedOnes) {
  Open(8);
  Lease lease = Compute(Sequence(0, 10));
  EXPECT_EQ(cache_->Stats().num_free_pages, 5);
  lease = Lease();
  EXPECT_EQ(cache_->Stats().num_free_pages, 6);
  EXPECT_EQ(Probe(Sequence(0, 10)), 8);
}

TEST_P(KVPrefixCacheTest, RefusesWhatItsCallersMustNotDo) {
  Open(4);
  const Tokens tokens = Sequence(0, 8);
  EXPECT_THROW((void)cache_->Acquire(NamespaceHandle(), tokens, {}), InternalError);
  EXPECT_THROW((void)cache_->Acquire(handle_, tokens, {.max_cached_tokens = 9}), InternalError);
  EXPECT_THROW((void)cache_->Acquire(handle_, tokens, {.max_cached_tokens = -1}), InternalError);
  EXPECT_THROW((void)cache_->Acquire(handle_, tokens, {.num_capacity_tokens = -1}), InternalError);
  Lease lease = Acquire(tokens, 0);
  EXPECT_THROW(cache_->Publish(lease, Sequence(0, 12)), InternalError) << "no page for the third";
  EXPECT_EQ(lease.num_published_pages(), 0);
  EXPECT_THROW((void)cache_->Extend(lease, -1), InternalError);
  EXPECT_THROW((void)cache_->Evict(Tier::kDevice, -1), InternalError);
  EXPECT_THROW((void)cache_->Evict(Tier::kHost, -1), InternalError);
  Lease empty;
  EXPECT_THROW(cache_->Publish(empty, tokens), InternalError);
  EXPECT_THROW((void)cache_->Extend(empty, 4), InternalError);
  EXPECT_THROW((void)cache_->ReserveSnapshot(empty, 4), InternalError);
  EXPECT_THROW((void)cache_->StartWriteBack(empty), InternalError);
}

TEST_P(KVPrefixCacheTest, RefusesLeasesAndHandlesOfAnotherCache) {
  Open(4);
  KVPrefixCache other_cache(OptionsWith(4));
  Lease lease = Acquire(Sequence(0, 4), 0);
  EXPECT_THROW((void)other_cache.Acquire(handle_, Sequence(0, 4), {}), InternalError);
  EXPECT_THROW(other_cache.Publish(lease, Sequence(0, 4)), InternalError);
  EXPECT_THROW((void)other_cache.Extend(lease, 8), InternalError);
  EXPECT_THROW((void)other_cache.ReserveSnapshot(lease, 4), InternalError);
  EXPECT_THROW((void)other_cache.StartWriteBack(lease), InternalError);
}

#ifdef LS_DEBUG_CHECKS
TEST_P(KVPrefixCacheTest, PublishNoticesAnotherSequence) {
  Open(4);
  Lease lease = Compute(Sequence(0, 4));
  ASSERT_TRUE(cache_->Extend(lease, 8));
  EXPECT_THROW(cache_->Publish(lease, Sequence(1, 8)), InternalError);
}
#endif

TEST_P(KVPrefixCacheTest, AvailablePagesAreFreePlusEverythingUnpinned) {
  Open(10);
  EXPECT_EQ(cache_->NumAvailablePages(), 10);
  Cache(Sequence(0, 16));
  EXPECT_EQ(cache_->NumAvailablePages(), 10);
  const Lease lease = Acquire(Sequence(0, 12), 8);
  EXPECT_EQ(cache_->NumAvailablePages(), 7);  // 2 pinned, 1 private
  EXPECT_EQ(EvictDevice(), 2);
  EXPECT_EQ(cache_->NumAvailablePages(), 7);
  EXPECT_EQ(cache_->Stats().num_free_pages, 7);
}

}  // namespace
}  // namespace lora_serve
