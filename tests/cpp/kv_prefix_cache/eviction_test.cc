#include "cache_scenario.h"

// What goes first on the device, and what may not go. Quotas, residency and age buckets are in
// quota_test.cc, the host in transfer_test.cc.

namespace lora_serve {
namespace {

class EvictionTest : public CacheScenario {
 protected:
  void Hit(const Tokens& tokens, std::int32_t max_cached_tokens) {
    const Lease lease = Acquire(tokens, max_cached_tokens);
    EXPECT_EQ(lease.num_cached_tokens(), max_cached_tokens);
  }
};
LS_RUN_FOR_EVERY_SETUP(EvictionTest);

/// What counts nodes: snapshots cut edges, so only for models without state.
using EdgeEvictionTest = EvictionTest;
LS_RUN_FOR_EVERY_DOMAIN(EdgeEvictionTest);

TEST_P(EvictionTest, TheLeastRecentlyReleasedGoesFirst) {
  Open(8);
  Lease first = Compute(Sequence(0, 8));
  Cache(Sequence(100, 8));
  first = Lease();  // used until now
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(Probe(Sequence(100, 8)), 0);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
}

TEST_P(EvictionTest, AHitMakesAPrefixYoung) {
  Open(8);
  Cache(Sequence(0, 8));
  Cache(Sequence(100, 8));
  Hit(Sequence(0, 8), 8);
  Evict(Tier::kDevice, 2);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  EXPECT_EQ(Probe(Sequence(100, 8)), 0);
}

TEST_P(EdgeEvictionTest, TrimsTheSuffixOfALeafFirst) {
  Open(8);
  Cache(Sequence(0, 16));
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(Probe(Sequence(0, 16)), 12);
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(Probe(Sequence(0, 16)), 4);
  EXPECT_EQ(cache_->Stats().num_nodes, 1);
  EXPECT_EQ(Evict(Tier::kDevice, 5), 1);
  EXPECT_EQ(cache_->Stats().num_nodes, 0);
  EXPECT_EQ(cache_->Stats().num_evicted_pages, 4);
}

TEST_P(EvictionTest, ATrimmedLeafCanBeContinued) {
  Open(8);
  Cache(Sequence(0, 16));
  Evict(Tier::kDevice, 2);
  Cache(Sequence(0, 16));
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
}

TEST_P(EdgeEvictionTest, AParentBecomesEvictableAfterItsLastChild) {
  Open(16);
  Cache(Concatenate(Sequence(0, 8), Sequence(100, 8)));
  Cache(Concatenate(Sequence(0, 8), Sequence(200, 8)));
  EXPECT_EQ(cache_->Stats().num_nodes, 3);
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(Probe(Concatenate(Sequence(0, 8), Sequence(100, 8))), 8);
  EXPECT_EQ(Probe(Concatenate(Sequence(0, 8), Sequence(200, 8))), 16);
  EXPECT_EQ(Evict(Tier::kDevice, 16), 4);
  EXPECT_EQ(cache_->Stats().num_free_pages, 16);
}

TEST_P(EvictionTest, AHitMakesTheWholePathYoung) {
  Open(16);
  const Tokens prompt = Concatenate(Sequence(0, 4), Sequence(100, 4));
  Cache(prompt);
  Hit(prompt, 4);  // splits the edge
  Cache(Sequence(300, 4));
  Hit(prompt, 8);
  Cache(Sequence(500, 4));
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(Probe(Sequence(300, 4)), 0);
  EXPECT_EQ(Evict(Tier::kDevice, 2),
            2);  // both nodes of the prompt, before the younger Sequence(500)
  EXPECT_EQ(Probe(prompt), 0);
  EXPECT_EQ(Probe(Sequence(500, 4)), 4);
}

TEST_P(EvictionTest, TheWholePathOfAPinStays) {
  Open(16);
  Cache(Sequence(0, 8));
  Cache(Concatenate(Sequence(0, 8), Sequence(100, 8)));
  const Lease lease = Acquire(Concatenate(Sequence(0, 8), Sequence(100, 8)), 16);
  EXPECT_EQ(Evict(Tier::kDevice, 16), 0);
  EXPECT_EQ(Probe(Concatenate(Sequence(0, 8), Sequence(100, 8))), 16);
}

TEST_P(EvictionTest, APinInTheMiddleProtectsNothingBelowIt) {
  Open(16);
  Cache(Sequence(0, 16));
  const Lease lease = Acquire(Sequence(0, 16), 8);
  EXPECT_EQ(Evict(Tier::kDevice, 16), 2);
  EXPECT_EQ(Probe(Sequence(0, 16)), 8);
}

TEST_P(EvictionTest, TheVirtualRootIsNeverEvicted) {
  Open(4);
  Lease cold = Acquire(Sequence(0, 8), 0);  // its only pin is on the virtual root
  Cache(Sequence(100, 8));
  EXPECT_EQ(Evict(Tier::kDevice, 4), 2);
  EXPECT_EQ(Evict(Tier::kDevice, 4), 0);
  Publish(cold, Sequence(0, 8));
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  cold = Lease();
  EXPECT_EQ(Evict(Tier::kDevice, 4), 2);
  EXPECT_TRUE(cache_->HasNamespace(id_));
  Cache(Sequence(0, 8));
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
}

TEST_P(EvictionTest, NamespacesShareOneOrder) {
  Open(8);
  const auto other_handle = cache_->RetainNamespace(other_);
  Cache(Sequence(0, 8));
  CacheIn(other_handle, Sequence(0, 8));
  Cache(Sequence(100, 8));
  EXPECT_EQ(Evict(Tier::kDevice, 3), 3);
  EXPECT_EQ(Probe(Sequence(0, 8)), 0);
  EXPECT_EQ(ProbeIn(other_, Sequence(0, 8)), 4);
  EXPECT_EQ(Probe(Sequence(100, 8)), 8);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(ProbeIn(other_, Sequence(0, 8)), 0);
}

TEST_P(EvictionTest, EvictingNothingIsNothing) {
  Open(4);
  EXPECT_EQ(Evict(Tier::kDevice, 0), 0);
  EXPECT_EQ(Evict(Tier::kDevice, 4), 0);
  Cache(Sequence(0, 4));
  EXPECT_EQ(Evict(Tier::kDevice, 0), 0);
  EXPECT_EQ(Probe(Sequence(0, 4)), 4);
}

}  // namespace
}  // namespace lora_serve
