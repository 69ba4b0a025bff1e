#include <array>
#include <set>

#include "cache_scenario.h"
#include "common/errors.h"
#include "kv_event_mirror.h"

// Failures of earlier systems around namespaces, as scenarios; the numbers are those of the list of
// pitfalls.

namespace lora_serve {
namespace {

class NamespacePitfallsTest : public CacheScenario {
 protected:
  /// Everything that the namespace has computed is on the device, and copied to the host.
  void ExpectPagesOnEveryTier(NamespaceId id, std::int64_t num_pages) const {
    EXPECT_EQ(StatsOf(id).num_tree_pages, num_pages) << "in namespace " << id;
    EXPECT_EQ(StatsOf(id).num_host_pages, HasHost() ? num_pages : 0) << "in namespace " << id;
    EXPECT_EQ(StatsOf(id).num_device_snapshots, HasState() ? num_pages : 0)
        << "in namespace " << id;
  }
};
LS_RUN_FOR_EVERY_SETUP(NamespacePitfallsTest);

using NamespaceTransferPitfallsTest = NamespacePitfallsTest;
LS_RUN_FOR_EVERY_HOST_SETUP(NamespaceTransferPitfallsTest);

// Pitfall 1. That the scheduler names the request's own namespace in every call is tested in
// tests/cpp/scheduler (scheduler_adapters_test.cc).
TEST_P(NamespacePitfallsTest, InterleavedChunksDecodesRetractionAndFinishStayInTheirNamespaces) {
  Open(kPlenty);
  const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
  const NamespaceHandle third_handle =
      cache_->RetainNamespace(cache_->OpenNamespace({.digest_seed = 8}));
  const std::array<const NamespaceHandle*, 3> handles{&handle_, &other_handle, &third_handle};
  Tokens tokens = Sequence(0, 24);
  std::array<Lease, 3> leases;
  for (std::size_t i = 0; i < 3; ++i) {
    leases[i] = AcquireIn(*handles[i], tokens, {.num_capacity_tokens = 8});
  }
  for (const std::int32_t num_computed : {8, 16, 24}) {
    for (std::size_t i = 0; i < 3; ++i) {
      Grow(leases[i], Sequence(0, num_computed));
      CopyToHost();
      for (std::size_t k = 0; k < 3; ++k) {
        ExpectPagesOnEveryTier(handles[k]->id(), (k <= i ? num_computed : num_computed - 8) / 4);
      }
    }
  }
  for (TokenId token = 24; token < 28; ++token) {  // decodes
    tokens.push_back(token);
    Grow(leases[0], tokens);
  }
  CopyToHost();
  End(leases[0]);  // retracted
  leases[0] = Acquire(tokens, 27, MatchIntent::kRecovery);
  EXPECT_EQ(leases[0].num_cached_tokens(), 24);
  Publish(leases[0], tokens);
  End(leases[0]);  // finished
  CopyToHost();
  ExpectPagesOnEveryTier(id_, 7);
  ExpectPagesOnEveryTier(other_, 6);
  ExpectPagesOnEveryTier(third_handle.id(), 6);
}

// Pitfall 1: a copy between the tiers is an insertion too.
TEST_P(NamespaceTransferPitfallsTest, ACopyBelongsToTheNamespaceOfItsPages) {
  Open(kPlenty);
  const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
  const Lease lease = Compute(Sequence(0, 8));
  const Lease other_lease = ComputeIn(other_handle, Sequence(0, 8));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 2u);
  EXPECT_EQ(orders[0].namespace_id, id_);
  EXPECT_EQ(SourcesOf(orders[0]), PagesOf(lease));
  EXPECT_EQ(orders[1].namespace_id, other_);
  EXPECT_EQ(SourcesOf(orders[1]), PagesOf(other_lease));
  Complete(orders[1].id);
  Fail(orders[0].id);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 0);
  EXPECT_EQ(StatsOf(other_).num_host_pages, 2);
}

// Pitfall 2.
TEST_P(NamespacePitfallsTest, AThreeChunkPromptIsHitOnEveryTierOfItsNamespaceAndOnNoneOfOthers) {
  Open(kPlenty);
  const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
  const NamespaceHandle third_handle =
      cache_->RetainNamespace(cache_->OpenNamespace({.digest_seed = 8}));
  const Tokens prompt = Sequence(0, 24);
  {
    Lease lease = AcquireIn(handle_, prompt, {.num_capacity_tokens = 8});
    for (const std::int32_t num_computed : {8, 16, 24}) Grow(lease, Sequence(0, num_computed));
  }
  CopyToHost();
  for (const bool is_on_device : {true, false}) {
    if (!is_on_device && HasHost()) {
      EXPECT_EQ(EvictDevice(), 6);
    }
    for (const NamespaceHandle* const handle : {&other_handle, &third_handle}) {
      ExpectNothingCachedIn(handle->id(), prompt);
      const Lease lease =
          AcquireIn(*handle, prompt, {.max_cached_tokens = 24, .num_capacity_tokens = 24});
      EXPECT_EQ(lease.num_cached_tokens(), 0);
    }
    const Lease lease = Acquire(prompt, 24);
    EXPECT_EQ(lease.num_cached_tokens(), 24);
    EXPECT_EQ(lease.IsLoading(), !is_on_device && HasHost());
  }
}

// Pitfall 3. The scheduler's part is in tests/cpp/scheduler/scheduler_preemption_test.cc.
TEST_P(NamespacePitfallsTest, APreemptedRequestRecoversItsOwnStateAndLeaksNothingElsewhere) {
  KVPrefixCacheOptions options = OptionsWith(kPlenty);
  options.enable_prefix_reuse = false;
  OpenWith(options);
  const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
  const Tokens tokens = Sequence(0, 14);
  Lease lease = Compute(tokens);
  EXPECT_EQ(cache_->StartWriteBack(lease), HasHost());
  End(lease);  // preempted
  CompleteAllTransfers();
  const Lease intruder = ComputeIn(other_handle, tokens);
  EXPECT_EQ(intruder.num_cached_tokens(), 0);
  if (HasHost()) {
    EXPECT_EQ(EvictDevice(), 3);
  }
  EXPECT_EQ(ProbeAll(id_, tokens, MatchIntent::kPrefixReuse).num_resumable_tokens, 0);
  lease = Acquire(tokens, 13, MatchIntent::kRecovery);
  EXPECT_EQ(lease.num_cached_tokens(), 12);
  EXPECT_EQ(lease.num_host_cached_tokens(), HasHost() ? 12 : 0);
  EXPECT_EQ(lease.resumed_snapshot() != kNoStateSlot, HasState());
  if (lease.IsLoading()) FinishLoading(lease);
  ExpectNoCommonPage(lease, intruder);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 3);
  EXPECT_EQ(StatsOf(other_).num_tree_pages, 3);
  EXPECT_EQ(StatsOf(other_).num_host_pages, 0);
}

// Pitfall 5.
TEST_P(NamespacePitfallsTest, NothingThatARunningRequestHoldsGoesWithItsNamespace) {
  Open(16);
  Cache(Concatenate(Sequence(0, 8), Sequence(100, 8)));
  Lease running = Compute(Sequence(0, 16));
  CopyToHost();
  const std::vector<PageId> pages = PagesOf(running);
  EvictOrDrain();
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 4);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 0);
  EXPECT_EQ(Probe(Sequence(0, 16)), 16);
  {  // nobody else gets its pages
    const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
    const Lease newcomer = AcquireIn(other_handle, Sequence(500, 48), {.num_capacity_tokens = 48});
    ExpectNoCommonPage(newcomer, running);
  }
  Grow(running, Sequence(0, 20));
  EXPECT_EQ(std::vector<PageId>(running.pages().begin(), running.pages().begin() + 4), pages);
  End(running);
  handle_ = {};
  EXPECT_EQ(cache_->HasNamespace(id_), IsBase());
}

// Pitfall 5: the only pin of a cold request is on the virtual root.
TEST_P(NamespacePitfallsTest, AColdRequestKeepsTheVirtualRootOfItsNamespace) {
  Open(8);
  Lease cold = Acquire(Sequence(0, 8), 0);
  Cache(Sequence(100, 8));
  CopyToHost();
  EvictOrDrain();
  ASSERT_TRUE(cache_->HasNamespace(id_));
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 0);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 0);
  Grow(cold, Sequence(0, 16));
  EXPECT_EQ(cold.pages().size(), 4u);
  EXPECT_EQ(Probe(Sequence(0, 16)), IsBase() ? 16 : 0) << "a drained namespace publishes nothing";
  handle_ = {};
  EXPECT_TRUE(cache_->HasNamespace(id_));
  End(cold);
  EXPECT_EQ(cache_->HasNamespace(id_), IsBase());
}

// Pitfall 5: nor do the pages go that are on their way to a request.
TEST_P(NamespaceTransferPitfallsTest, ARequestWhosePagesAreOnTheirWayKeepsThem) {
  Open(8);
  Cache(Sequence(0, 12));
  CopyToHost();
  EvictDevice();
  Lease loading = Acquire(Sequence(0, 16), 12);
  ASSERT_TRUE(loading.IsLoading());
  const std::vector<PageId> pages = PagesOf(loading);
  EvictOrDrain();
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 3);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 3) << "a source of the copy is gone";
  Complete(TakeOrder().id);
  EXPECT_EQ(PagesOf(loading), pages);
  EXPECT_EQ(loading.num_cached_tokens(), 12);
  EXPECT_EQ(StatsOf(id_).num_host_pages, IsBase() ? 3 : 0);
  Publish(loading, Sequence(0, 16));
  handle_ = {};
  EXPECT_TRUE(cache_->HasNamespace(id_));
  End(loading);
  EXPECT_EQ(cache_->HasNamespace(id_), IsBase());
}

// Pitfall 7.
TEST_P(NamespacePitfallsTest, AThousandLookUpsCreateNothing) {
  Open(4);
  Cache(Sequence(0, 8));
  CopyToHost();
  const std::string before = cache_->Dump();
  const std::size_t num_namespaces = cache_->NamespaceStatsList().size();
  const Tokens tokens = Sequence(0, 8);
  std::vector<PrefixHint> hints;
  for (std::int64_t id = 100; id < 1100; ++id) {  // adapters that nobody has opened
    EXPECT_THROW((void)ProbeAll(NamespaceId{id}, tokens), NotFoundError);
    EXPECT_THROW(cache_->SetAdapterResident(NamespaceId{id}, false), NotFoundError);
    EXPECT_THROW(cache_->SetQuota(NamespaceId{id}, Tier::kDevice, 1), NotFoundError);
    hints.push_back({.namespace_id = NamespaceId{id}, .tokens = tokens, .num_resumable_tokens = 8});
  }
  cache_->RefreshHints(hints);
  for (const PrefixHint& hint : hints) EXPECT_EQ(hint.num_resumable_tokens, 0);
  for (TokenId first = 1000; first < 2000; ++first) {  // prompts that nobody has computed
    (void)Probe(Sequence(first, 12));
    (void)Probe(Concatenate(Sequence(0, 6), Sequence(first, 6)));
  }
  EXPECT_EQ(cache_->Dump(), before);
  EXPECT_EQ(cache_->NamespaceStatsList().size(), num_namespaces);
}

// Pitfall 8. A request of the base model goes on publishing while an adapter beside it is unloaded.
TEST_P(NamespacePitfallsTest, ARequestThatFinishesAfterTheUnloadPublishesNothing) {
  Open(kPlenty);
  Lease running = Compute(Sequence(0, 8));
  CopyToHost();
  ASSERT_TRUE(cache_->Extend(running, 16));
  EXPECT_EQ(cache_->ReserveSnapshot(running, 16).has_value(), HasState());
  cache_->DrainNamespace(adapter_);
  cache_->Publish(running, Sequence(0, 16));
  const std::int64_t num_pages = IsBase() ? 4 : 2;
  EXPECT_EQ(running.num_published_pages(), num_pages);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, num_pages);
  EXPECT_EQ(StatsOf(id_).num_device_snapshots, IsBase() && HasState() ? 3 : 0);
  EXPECT_EQ(PlanWriteBacks().size(), IsBase() && HasHost() ? 1u : 0u);
  EXPECT_FALSE(cache_->StartWriteBack(running));
  End(running);
  CompleteAllTransfers();
  handle_ = {};
  EXPECT_FALSE(cache_->HasNamespace(adapter_));
  EXPECT_EQ(cache_->Stats().num_tree_pages, IsBase() ? 4 : 0);
  EXPECT_EQ(cache_->Stats().num_host_pages - cache_->Stats().num_free_host_pages,
            IsBase() && HasHost() ? 4 : 0);
}

// Pitfall 8: what is published too late may also be a copy.
TEST_P(NamespaceTransferPitfallsTest, ACopyThatEndsAfterTheUnloadLeavesNothingBehind) {
  Open(kPlenty);
  cache_->SetEventsEnabled(true);
  const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
  Cache(Sequence(0, 8));
  CacheIn(other_handle, Sequence(0, 8));
  const std::vector<TransferOrder> orders = PlanWriteBacks();
  ASSERT_EQ(orders.size(), 2u);
  cache_->DrainNamespace(adapter_);
  (void)cache_->TakeEvents();
  CompleteAllTransfers();
  for (const KVEvent& event : cache_->TakeEvents()) {
    EXPECT_EQ(event.namespace_id, kBaseNamespace) << "an event of a dead namespace";
  }
  EXPECT_EQ(StatsOf(adapter_).num_host_pages, 0);
  EXPECT_EQ(StatsOf(adapter_).num_tree_pages, 0);
  EXPECT_EQ(StatsOf(kBaseNamespace).num_host_pages, 2);
}

// Pitfall 9: the same first page in both namespaces must not open the rest of the chain.
TEST_P(NamespacePitfallsTest, EveryPageOfAChainBelongsToItsNamespaceNotOnlyTheFirst) {
  Open(kPlenty);
  const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
  CacheIn(other_handle, Sequence(0, 4));
  Cache(Sequence(0, 16));
  CopyToHost();
  EXPECT_EQ(ProbeIn(other_, Sequence(0, 16)), 4);
  EXPECT_EQ(ProbeAll(other_, Sequence(0, 16)).num_host_tokens, 0);
  EXPECT_EQ(ProbeAll(other_, Sequence(0, 16)).num_resumable_tokens, 4);
  Lease lease = AcquireIn(other_handle, Sequence(0, 16),
                          {.max_cached_tokens = 16, .num_capacity_tokens = 16});
  EXPECT_EQ(lease.num_cached_tokens(), 4);
  Publish(lease, Sequence(0, 12));  // a chain that starts in the middle
  EXPECT_EQ(StatsOf(other_).num_tree_pages, 3);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 4);
  EXPECT_EQ(ProbeIn(other_, Sequence(0, 16)), 12);
}

// Pitfall 9.
TEST_P(NamespacePitfallsTest, APromptShorterThanAPageIsCachedNowhere) {
  Open(8);
  const std::string before = cache_->Dump();
  {
    Lease lease = Compute(Sequence(0, 3));
    EXPECT_EQ(lease.num_published_pages(), 0);
    EXPECT_TRUE(PlanWriteBacks().empty());
    EXPECT_FALSE(cache_->StartWriteBack(lease));
  }
  for (const NamespaceStats& stats : cache_->NamespaceStatsList()) {
    EXPECT_EQ(stats.num_tree_pages, 0) << "in namespace " << stats.id;
    ExpectNothingCachedIn(stats.id, Sequence(0, 4));
  }
}

// Pitfall 10: ("a", "bc") is not ("ab", "c"), neither as namespace and token nor as two tokens.
TEST_P(NamespacePitfallsTest, NeighbouringPartsOfAKeyNeverRunTogether) {
  Open(kPlenty);
  std::vector<NamespaceHandle> handles;
  for (std::int64_t id = adapter_.value(); id <= 12; ++id) {
    if (id > adapter_.value()) {
      ASSERT_EQ(cache_->OpenNamespace({.digest_seed = static_cast<std::uint64_t>(id)}),
                NamespaceId{id});
    }
    handles.push_back(cache_->RetainNamespace(NamespaceId{id}));
  }
  const NamespaceHandle& ns_1 = handles.front();
  const NamespaceHandle& ns_2 = handles.at(1);
  const NamespaceHandle& ns_3 = handles.at(2);
  const NamespaceHandle& ns_12 = handles.back();
  struct Key {
    const NamespaceHandle& handle;
    Tokens tokens;
  };
  const std::vector<Key> keys{
      {ns_1, {23, 4, 5, 6}},       {ns_12, {3, 4, 5, 6}},       {ns_1, {2, 34, 5, 6}},
      {ns_1, {2, 3, 45, 6}},       {ns_1, {3, 4, 5, 6}},        {ns_12, {23, 4, 5, 6}},
      {handle_, {1, 23, 4, 5}},    {handle_, {12, 3, 4, 5}},    {handle_, {1, 2, 34, 5}},
      {handle_, {0x100, 0, 1, 0}}, {handle_, {1, 0, 0x100, 0}}, {ns_2, {1, 0, 0, 0}},
      {ns_3, {0, 0, 0, 0}},        {ns_2, {0, 0, 0, 0}}};
  cache_->SetEventsEnabled(true);
  std::set<std::uint64_t> hashes;
  for (const Key& key : keys) {
    ExpectNothingCachedIn(key.handle.id(), key.tokens);
    CacheIn(key.handle, key.tokens);
    EXPECT_EQ(ProbeIn(key.handle.id(), key.tokens), 4);
    for (const KVEvent& event : cache_->TakeEvents()) {
      for (const std::uint64_t hash : event.page_hashes) {
        EXPECT_TRUE(hashes.insert(hash).second) << "two keys with one hash";
      }
    }
  }
  EXPECT_EQ(hashes.size(), keys.size());
  EXPECT_EQ(cache_->Stats().num_tree_pages, static_cast<std::int64_t>(keys.size()));
}

// Pitfall 11: same name, same content digest, another generation.
TEST_P(NamespacePitfallsTest, AReloadedAdapterFindsNothingOfItsFormerSelfOnAnyTier) {
  Open(kPlenty);
  const Tokens tokens = Sequence(0, 12);
  Cache(tokens);
  const NamespaceId old_generation = cache_->OpenNamespace({.digest_seed = 5});
  NamespaceHandle old_handle = cache_->RetainNamespace(old_generation);
  Lease running = ComputeIn(old_handle, tokens);
  CacheIn(old_handle, Sequence(100, 8));
  CopyToHost();
  old_handle = {};
  cache_->DrainNamespace(old_generation);
  EXPECT_TRUE(cache_->HasNamespace(old_generation)) << "a request still runs on it";

  const NamespaceId new_generation = cache_->OpenNamespace({.digest_seed = 5});
  EXPECT_GT(new_generation, old_generation);
  const NamespaceHandle new_handle = cache_->RetainNamespace(new_generation);
  ExpectNothingCachedIn(new_generation, tokens);
  ExpectNothingCachedIn(new_generation, Sequence(100, 8));
  const Lease fresh = ComputeIn(new_handle, tokens);
  EXPECT_EQ(fresh.num_cached_tokens(), 0);
  ExpectNoCommonPage(fresh, running);

  End(running);
  EXPECT_FALSE(cache_->HasNamespace(old_generation));
  EXPECT_EQ(ProbeIn(new_generation, tokens), 12);
  EXPECT_EQ(Probe(tokens), 12) << "the drain touched another namespace";
  EXPECT_EQ(StatsOf(id_).num_host_pages, HasHost() ? 3 : 0);
}

// Pitfall 11: the old generation's pages are still on their way to the host when the new one opens.
TEST_P(NamespaceTransferPitfallsTest, ACopyOfTheOldGenerationNeverReachesTheNewOne) {
  Open(kPlenty);
  const Tokens tokens = Sequence(0, 12);
  const NamespaceId old_generation = cache_->OpenNamespace({.digest_seed = 5});
  CacheIn(cache_->RetainNamespace(old_generation), tokens);
  ASSERT_EQ(PlanWriteBacks().size(), 1u);
  cache_->DrainNamespace(old_generation);
  EXPECT_TRUE(cache_->HasNamespace(old_generation)) << "its pages are being copied";
  const NamespaceId new_generation = cache_->OpenNamespace({.digest_seed = 5});
  CompleteAllTransfers();
  EXPECT_FALSE(cache_->HasNamespace(old_generation));
  ExpectNothingCachedIn(new_generation, tokens);
  EXPECT_EQ(cache_->Stats().num_free_host_pages, kPlenty);
  EXPECT_EQ(cache_->Stats().num_free_pages, kPlenty);
}

// Pitfall 11: a router that knows pages by their hashes alone must forget them, too.
TEST_P(NamespacePitfallsTest, ADrainTellsRoutersToForgetTheNamespaceOnEveryTier) {
  Open(kPlenty);
  KVEventMirror mirror(kPageSize);
  const NamespaceId old_generation = cache_->OpenNamespace({.digest_seed = 5});
  mirror.AddNamespace(id_, IsBase() ? 0 : kAdapterSeed);
  mirror.AddNamespace(old_generation, 5);
  cache_->SetEventsEnabled(true);
  Lease running;
  {
    const NamespaceHandle handle = cache_->RetainNamespace(old_generation);
    Cache(Sequence(0, 12));
    running = ComputeIn(handle, Sequence(0, 12));
  }
  CopyToHost();
  mirror.Hear(cache_->TakeEvents());
  EXPECT_EQ(mirror.NumPages(old_generation, Tier::kDevice), 3u);
  EXPECT_EQ(mirror.NumPages(old_generation, Tier::kHost), HasHost() ? 3u : 0u);
  cache_->DrainNamespace(old_generation);
  mirror.Hear(cache_->TakeEvents());
  EXPECT_EQ(mirror.NumPages(old_generation, Tier::kDevice), 0u) << "leased pages are told as well";
  EXPECT_EQ(mirror.NumPages(old_generation, Tier::kHost), 0u);
  EXPECT_EQ(mirror.NumPages(id_, Tier::kDevice), 3u);
  End(running);
  EXPECT_TRUE(cache_->TakeEvents().empty()) << "told twice";
}

}  // namespace
}  // namespace lora_serve
