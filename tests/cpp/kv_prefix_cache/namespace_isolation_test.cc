#include "cache_scenario.h"
#include "common/errors.h"

// A token computed in one namespace never serves another, here on the device; the same stories
// with copies between the tiers are in pitfalls_namespace_test.cc.

namespace lora_serve {
namespace {

class NamespaceIsolationTest : public CacheScenario {
 protected:
  void ExpectNothingOutside(const Tokens& tokens) const {
    for (const NamespaceStats& stats : cache_->NamespaceStatsList()) {
      if (stats.id == id_) continue;
      EXPECT_EQ(ProbeIn(stats.id, tokens), 0) << "in namespace " << stats.id;
      EXPECT_EQ(stats.num_tree_pages, 0) << "in namespace " << stats.id;
      EXPECT_EQ(stats.num_private_pages, 0) << "in namespace " << stats.id;
    }
  }
};
LS_RUN_FOR_EVERY_SETUP(NamespaceIsolationTest);

TEST_P(NamespaceIsolationTest, ChunksDecodesPreemptionAndFinishStayInTheirNamespace) {
  Open(16);
  Tokens tokens = Sequence(0, 18);
  Lease lease = AcquireIn(handle_, tokens, {.max_cached_tokens = 17, .num_capacity_tokens = 6});
  for (const std::int32_t num_computed : {6, 12, 18}) {  // chunks of 6
    Grow(lease, Sequence(0, num_computed));
    ExpectNothingOutside(tokens);
  }
  for (TokenId token = 18; token < 24; ++token) {  // decodes
    tokens.push_back(token);
    Grow(lease, tokens);
    ExpectNothingOutside(tokens);
  }
  End(lease);  // preempted
  ExpectNothingOutside(tokens);
  lease = Acquire(tokens, NumTokensOf(tokens) - 1);
  EXPECT_EQ(lease.num_cached_tokens(), 20);
  Publish(lease, tokens);
  End(lease);  // finished
  ExpectNothingOutside(tokens);
  EXPECT_EQ(Probe(tokens), 24);
}

TEST_P(NamespaceIsolationTest, AThreeChunkPromptIsHitInItsOwnNamespaceOnly) {
  Open(16);
  const NamespaceId second_adapter = cache_->OpenNamespace({.digest_seed = 8});
  const Tokens prompt = Sequence(0, 24);
  {
    Lease lease = AcquireIn(handle_, prompt, {.max_cached_tokens = 0, .num_capacity_tokens = 8});
    for (const std::int32_t num_computed : {8, 16, 24}) Grow(lease, Sequence(0, num_computed));
  }
  EXPECT_EQ(ProbeIn(other_, prompt), 0);
  EXPECT_EQ(ProbeIn(second_adapter, prompt), 0);
  EXPECT_EQ(Probe(prompt), 24);
  const auto second_handle = cache_->RetainNamespace(second_adapter);
  const Lease lease =
      AcquireIn(second_handle, prompt, {.max_cached_tokens = 24, .num_capacity_tokens = 24});
  EXPECT_EQ(lease.num_cached_tokens(), 0);
}

TEST_P(NamespaceIsolationTest, APreemptedRequestFindsItsOwnPagesAgain) {
  Open(8);
  const Tokens tokens = Sequence(0, 14);
  std::vector<PageId> pages;
  {
    const Lease lease = Compute(tokens);
    pages = PagesOf(lease);
  }
  const auto other_handle = cache_->RetainNamespace(other_);
  const Lease intruder =
      AcquireIn(other_handle, tokens, {.max_cached_tokens = 14, .num_capacity_tokens = 14});
  EXPECT_EQ(intruder.num_cached_tokens(), 0);
  const Lease lease = Acquire(tokens, 13);
  EXPECT_EQ(lease.num_cached_tokens(), 12);
  for (std::size_t page = 0; page < 3; ++page) EXPECT_EQ(lease.pages()[page], pages[page]);
}

TEST_P(NamespaceIsolationTest, PromptsShorterThanAPageAndChainsFromTheMiddleLeaveNothingElsewhere) {
  Open(8);
  Cache(Sequence(0, 3));
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 0);
  {
    Lease lease = Compute(Sequence(0, 4));
    Grow(lease, Sequence(0, 12));
  }
  ExpectNothingOutside(Sequence(0, 12));
  EXPECT_EQ(ProbeIn(other_, Sequence(4, 8)), 0);
  EXPECT_EQ(Probe(Sequence(4, 8)), 0) << "a page only counts behind all pages before it";
}

TEST_P(NamespaceIsolationTest, TheSameTokensInTwoNamespacesHaveTwoSetsOfPages) {
  Open(8);
  const Tokens tokens = Sequence(0, 8);
  const Lease lease = Compute(tokens);
  const auto other_handle = cache_->RetainNamespace(other_);
  const Lease twin = ComputeIn(other_handle, tokens);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
  EXPECT_EQ(StatsOf(other_).num_tree_pages, 2);
  EXPECT_EQ(StatsOf(other_).num_private_pages, 0);
  for (const PageId page : lease.pages()) {
    for (const PageId twin_page : twin.pages()) EXPECT_NE(page, twin_page);
  }
}

TEST_P(NamespaceIsolationTest, ProbingUnknownNamespacesCreatesNothing) {
  Open(4);
  const std::size_t num_namespaces = cache_->NamespaceStatsList().size();
  for (std::int64_t id = 100; id < 1100; ++id) {
    EXPECT_THROW((void)ProbeAll(NamespaceId{id}, Sequence(0, 8)), NotFoundError);
    EXPECT_THROW((void)cache_->RetainNamespace(NamespaceId{id}), NotFoundError);
    EXPECT_THROW(cache_->DrainNamespace(NamespaceId{id}), NotFoundError);
    EXPECT_FALSE(cache_->HasNamespace(NamespaceId{id}));
  }
  EXPECT_THROW((void)ProbeAll(NamespaceId{-1}, Sequence(0, 8)), NotFoundError);
  EXPECT_EQ(cache_->NamespaceStatsList().size(), num_namespaces);
}

TEST_P(NamespaceIsolationTest, AReloadedAdapterStartsEmpty) {
  Open(8);
  const Tokens tokens = Sequence(0, 8);
  Cache(tokens);
  const std::int32_t num_cached_before = ProbeIn(id_, tokens);
  const NamespaceId old_generation = cache_->OpenNamespace({.digest_seed = 5});
  CacheIn(cache_->RetainNamespace(old_generation), tokens);
  EXPECT_EQ(ProbeIn(old_generation, tokens), 8);
  cache_->DrainNamespace(old_generation);
  EXPECT_FALSE(cache_->HasNamespace(old_generation));
  const NamespaceId new_generation = cache_->OpenNamespace({.digest_seed = 5});
  EXPECT_NE(new_generation, old_generation);
  EXPECT_EQ(ProbeIn(new_generation, tokens), 0);
  EXPECT_THROW((void)ProbeAll(old_generation, tokens), NotFoundError);
  EXPECT_EQ(Probe(tokens), num_cached_before) << "the drain touched another namespace";
  EXPECT_EQ(cache_->Stats().num_free_pages, 6);
}

}  // namespace
}  // namespace lora_serve
