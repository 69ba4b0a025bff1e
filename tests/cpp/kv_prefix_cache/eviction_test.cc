#include "cache_scenario.h"

// What goes first, and what may not go (PITFALLS 4, 6).

namespace lora_serve {
namespace {

class EvictionTest : public CacheScenario {
 protected:
  void Cache(const Tokens& tokens) { const Lease lease = Compute(tokens); }
  void Hit(const Tokens& tokens, std::int32_t max_cached_tokens) {
    const Lease lease = Acquire(tokens, max_cached_tokens);
  }
};
LS_RUN_FOR_EVERY_DOMAIN(EvictionTest);

TEST_P(EvictionTest, TheLeastRecentlyReleasedGoesFirst) {
  Open(8);
  Lease first = Compute(Sequence(0, 8));
  Cache(Sequence(100, 8));
  first = Lease();  // used until now
  EXPECT_EQ(cache_->Evict(2), 2);
  EXPECT_EQ(Probe(Sequence(100, 8)), 0);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
}

TEST_P(EvictionTest, AHitMakesAPrefixYoung) {
  Open(8);
  Cache(Sequence(0, 8));
  Cache(Sequence(100, 8));
  Hit(Sequence(0, 8), 8);
  cache_->Evict(2);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  EXPECT_EQ(Probe(Sequence(100, 8)), 0);
}

TEST_P(EvictionTest, TrimsTheSuffixOfALeafFirst) {
  Open(8);
  Cache(Sequence(0, 16));
  EXPECT_EQ(cache_->Evict(1), 1);
  EXPECT_EQ(Probe(Sequence(0, 16)), 12);
  EXPECT_EQ(cache_->Evict(2), 2);
  EXPECT_EQ(Probe(Sequence(0, 16)), 4);
  EXPECT_EQ(cache_->Stats().num_nodes, 1);
  EXPECT_EQ(cache_->Evict(5), 1);
  EXPECT_EQ(cache_->Stats().num_nodes, 0);
  EXPECT_EQ(cache_->Stats().num_evicted_pages, 4);
}

TEST_P(EvictionTest, ATrimmedLeafCanBeContinued) {
  Open(8);
  Cache(Sequence(0, 16));
  cache_->Evict(2);
  Cache(Sequence(0, 16));
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
}

TEST_P(EvictionTest, AParentBecomesEvictableAfterItsLastChild) {
  Open(16);
  Cache(Concatenate(Sequence(0, 8), Sequence(100, 8)));
  Cache(Concatenate(Sequence(0, 8), Sequence(200, 8)));
  EXPECT_EQ(cache_->Stats().num_nodes, 3);
  EXPECT_EQ(cache_->Evict(2), 2);
  EXPECT_EQ(Probe(Concatenate(Sequence(0, 8), Sequence(100, 8))), 8);
  EXPECT_EQ(Probe(Concatenate(Sequence(0, 8), Sequence(200, 8))), 16);
  EXPECT_EQ(cache_->Evict(16), 4);
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
  EXPECT_EQ(cache_->Evict(1), 1);
  EXPECT_EQ(Probe(Sequence(300, 4)), 0);
  EXPECT_EQ(cache_->Evict(2), 2);  // both nodes of the prompt, before the younger Sequence(500)
  EXPECT_EQ(Probe(prompt), 0);
  EXPECT_EQ(Probe(Sequence(500, 4)), 4);
}

TEST_P(EvictionTest, TheWholePathOfAPinStays) {
  Open(16);
  Cache(Sequence(0, 8));
  Cache(Concatenate(Sequence(0, 8), Sequence(100, 8)));
  const Lease lease = Acquire(Concatenate(Sequence(0, 8), Sequence(100, 8)), 16);
  EXPECT_EQ(cache_->Evict(16), 0);
  EXPECT_EQ(Probe(Concatenate(Sequence(0, 8), Sequence(100, 8))), 16);
}

TEST_P(EvictionTest, APinInTheMiddleProtectsNothingBelowIt) {
  Open(16);
  Cache(Sequence(0, 16));
  const Lease lease = Acquire(Sequence(0, 16), 8);
  EXPECT_EQ(cache_->Evict(16), 2);
  EXPECT_EQ(Probe(Sequence(0, 16)), 8);
}

TEST_P(EvictionTest, TheVirtualRootIsNeverEvicted) {
  Open(4);
  Lease cold = Acquire(Sequence(0, 8), 0);  // its only pin is on the virtual root
  Cache(Sequence(100, 8));
  EXPECT_EQ(cache_->Evict(4), 2);
  EXPECT_EQ(cache_->Evict(4), 0);
  Publish(cold, Sequence(0, 8));
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  cold = Lease();
  EXPECT_EQ(cache_->Evict(4), 2);
  EXPECT_TRUE(cache_->HasNamespace(id_));
  Cache(Sequence(0, 8));
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
}

TEST_P(EvictionTest, NamespacesShareOneOrder) {
  Open(8);
  const auto other_handle = cache_->RetainNamespace(other_);
  const auto cache_in_other = [&](const Tokens& tokens) {
    auto lease = cache_->Acquire(
        other_handle, tokens, {.max_cached_tokens = 0, .num_capacity_tokens = NumTokensOf(tokens)});
    ASSERT_TRUE(lease);
    cache_->Publish(*lease, tokens);
  };
  Cache(Sequence(0, 8));
  cache_in_other(Sequence(0, 8));
  Cache(Sequence(100, 8));
  EXPECT_EQ(cache_->Evict(3), 3);
  EXPECT_EQ(Probe(Sequence(0, 8)), 0);
  EXPECT_EQ(ProbeIn(other_, Sequence(0, 8)), 4);
  EXPECT_EQ(Probe(Sequence(100, 8)), 8);
  EXPECT_EQ(cache_->Evict(1), 1);
  EXPECT_EQ(ProbeIn(other_, Sequence(0, 8)), 0);
}

TEST_P(EvictionTest, EvictingNothingIsNothing) {
  Open(4);
  EXPECT_EQ(cache_->Evict(0), 0);
  EXPECT_EQ(cache_->Evict(4), 0);
  Cache(Sequence(0, 4));
  EXPECT_EQ(cache_->Evict(0), 0);
  EXPECT_EQ(Probe(Sequence(0, 4)), 4);
}

}  // namespace
}  // namespace lora_serve
