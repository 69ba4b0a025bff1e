#include <set>

#include "cache_scenario.h"
#include "kv_event_mirror.h"

// What routers are told: every page is stored once in a tier and removed once, under a hash that
// they can compute from a prompt.

namespace lora_serve {
namespace {

class KVEventTest : public CacheScenario {
 protected:
  void OpenAndListen(std::int32_t num_device_pages) {
    Open(num_device_pages);
    other_handle_ = cache_->RetainNamespace(other_);
    mirror_.AddNamespace(kBaseNamespace, 0);
    mirror_.AddNamespace(adapter_, kAdapterSeed);
    cache_->SetEventsEnabled(true);
  }
  void Hear() { mirror_.Hear(cache_->TakeEvents()); }
  /// The router would find exactly the present pages of these sequences.
  void ExpectHeard(const std::vector<Tokens>& sequences) {
    Hear();
    for (const NamespaceId id : {id_, other_}) {
      for (const Tokens& tokens : sequences) {
        const ProbeResult probe = ProbeAll(id, tokens);
        EXPECT_EQ(mirror_.NumLeadingPages(id, Tier::kDevice, tokens) * kPageSize,
                  probe.num_device_tokens);
        if (probe.num_host_tokens > 0) {
          EXPECT_EQ(mirror_.NumLeadingPages(id, Tier::kHost, tokens) * kPageSize,
                    probe.num_device_tokens + probe.num_host_tokens);
        }
      }
    }
  }
  std::int64_t NumHeard(Tier tier) const {
    return static_cast<std::int64_t>(mirror_.NumPages(id_, tier));
  }
  void TearDown() override {
    other_handle_ = {};
    CacheScenario::TearDown();
  }
  void ExpectEverythingIsToldToBeGone() {
    CompleteAllTransfers();
    EvictDevice();
    EvictHost();
    Hear();
    for (const Tier tier : kTiers) {
      EXPECT_EQ(mirror_.NumPages(id_, tier), 0u);
      EXPECT_EQ(mirror_.NumPages(other_, tier), 0u);
    }
  }

  KVEventMirror mirror_{kPageSize};
  NamespaceHandle other_handle_;
};
LS_RUN_FOR_EVERY_SETUP(KVEventTest);

TEST_P(KVEventTest, APageIsStoredWhenItIsPublishedAndRemovedWhenItIsEvicted) {
  OpenAndListen(8);
  Lease lease = Acquire(Sequence(0, 16), 0);
  EXPECT_TRUE(cache_->TakeEvents().empty()) << "private pages are nobody's business";
  cache_->Publish(lease, Sequence(0, 10));
  const std::vector<KVEvent> stored = cache_->TakeEvents();
  ASSERT_EQ(stored.size(), 1u);
  EXPECT_EQ(stored[0].kind, KVEventKind::kStored);
  EXPECT_EQ(stored[0].tier, Tier::kDevice);
  EXPECT_EQ(stored[0].namespace_id, id_);
  EXPECT_EQ(stored[0].parent_hash, std::nullopt);
  EXPECT_EQ(stored[0].token_ids, Sequence(0, 8));
  EXPECT_EQ(stored[0].page_hashes,
            HashChain(IsBase() ? 0 : kAdapterSeed, Sequence(0, 8), kPageSize));
  EXPECT_TRUE(cache_->TakeEvents().empty()) << "told twice";
  mirror_.Hear(stored);
  End(lease);
  EXPECT_TRUE(cache_->TakeEvents().empty());
  Evict(Tier::kDevice, 1);
  const std::vector<KVEvent> removed = cache_->TakeEvents();
  ASSERT_EQ(removed.size(), 1u);
  EXPECT_EQ(removed[0].kind, KVEventKind::kRemoved);
  EXPECT_EQ(removed[0].page_hashes, std::vector<std::uint64_t>{stored[0].page_hashes[1]});
  EXPECT_EQ(removed[0].parent_hash, stored[0].page_hashes[0]);
  EXPECT_TRUE(removed[0].token_ids.empty());
  mirror_.Hear(removed);
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTest, CutsAndTwinsTellNothing) {
  OpenAndListen(kPlenty);
  Cache(Sequence(0, 24));
  Hear();
  EXPECT_EQ(NumHeard(Tier::kDevice), 6);
  Lease twin = Acquire(Sequence(0, 24), 0);
  cache_->Publish(twin, Sequence(0, 24));
  (void)Acquire(Sequence(0, 24), 4);
  (void)Acquire(Sequence(0, 24), 12);
  EXPECT_TRUE(cache_->TakeEvents().empty());
  // A branch behind a cut continues the hash of the page before it.
  const Tokens branch = Concatenate(Sequence(0, 16), Sequence(100, 8));
  Cache(branch);
  ExpectHeard({Sequence(0, 24), branch});
  EXPECT_EQ(NumHeard(Tier::kDevice), 8);
  End(twin);
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTest, ADecodingRequestIsToldPageByPage) {
  OpenAndListen(kPlenty);
  Tokens tokens = Sequence(0, 6);
  Lease lease = Compute(tokens);
  for (TokenId token = 6; token < 26; ++token) {
    tokens.push_back(token);
    Grow(lease, tokens);
    ExpectHeard({tokens});
  }
  EXPECT_EQ(NumHeard(Tier::kDevice), 6);
  // Another request continues what has grown meanwhile.
  const Tokens longer = Concatenate(FirstTokens(tokens, 24), Sequence(100, 8));
  Cache(longer);
  ExpectHeard({tokens, longer});
  EXPECT_EQ(NumHeard(Tier::kDevice), 8);
  End(lease);
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTest, PagesThatWentAndCameBackAreToldAgain) {
  OpenAndListen(kPlenty);
  for (int i = 0; i < 3; ++i) {
    Cache(Sequence(0, 16));
    ExpectHeard({Sequence(0, 16)});
    EXPECT_EQ(NumHeard(Tier::kDevice), 4);
    Evict(Tier::kDevice, 3);
    ExpectHeard({Sequence(0, 16)});
    EXPECT_EQ(NumHeard(Tier::kDevice), 1);
    const Lease neighbour = Acquire(Sequence(0, 4), 4);  // keeps the next one from growing the edge
    Cache(Sequence(0, 12));
    ExpectHeard({Sequence(0, 16)});
    EXPECT_EQ(NumHeard(Tier::kDevice), 3);
  }
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTest, NamespacesHaveHashesOfTheirOwn) {
  OpenAndListen(kPlenty);
  const NamespaceId third = cache_->OpenNamespace({.digest_seed = 1});
  const NamespaceHandle third_handle = cache_->RetainNamespace(third);
  mirror_.AddNamespace(third, 1);
  std::set<std::uint64_t> hashes;
  for (const NamespaceHandle* const handle :
       std::initializer_list<const NamespaceHandle*>{&handle_, &other_handle_, &third_handle}) {
    CacheIn(*handle, Tokens(12, 0));
    const std::vector<KVEvent> events = cache_->TakeEvents();
    mirror_.Hear(events);
    for (const KVEvent& event : events) {
      EXPECT_EQ(event.namespace_id, handle->id());
      for (const std::uint64_t hash : event.page_hashes) {
        EXPECT_TRUE(hashes.insert(hash).second) << "two pages with one hash";
      }
    }
  }
  EXPECT_EQ(hashes.size(), 9u);
  ExpectEverythingIsToldToBeGone();
}

// --- Switching -----------------------------------------------------------------------------------

TEST_P(KVEventTest, WhoStartsToListenHearsWhatIsPresent) {
  Open(kPlenty);
  mirror_.AddNamespace(kBaseNamespace, 0);
  mirror_.AddNamespace(adapter_, kAdapterSeed);
  const Tokens branch = Concatenate(Sequence(0, 12), Sequence(100, 8));
  Cache(Sequence(0, 20));
  Cache(branch);
  CopyToHost();
  CopyToHost();
  Evict(Tier::kDevice, 1);
  EXPECT_TRUE(cache_->TakeEvents().empty()) << "nobody listens";
  cache_->SetEventsEnabled(true);
  ExpectHeard({Sequence(0, 20), branch});
  EXPECT_EQ(NumHeard(Tier::kDevice), 6);
  EXPECT_EQ(NumHeard(Tier::kHost), HasHost() ? 7 : 0);
  cache_->SetEventsEnabled(true);
  EXPECT_TRUE(cache_->TakeEvents().empty()) << "already on";
  Cache(Sequence(0, 28));
  ExpectHeard({Sequence(0, 28), branch});
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTest, SwitchingOffForgetsWhatWasNotTaken) {
  OpenAndListen(kPlenty);
  Cache(Sequence(0, 8));
  cache_->SetEventsEnabled(false);
  EXPECT_TRUE(cache_->TakeEvents().empty());
  Cache(Sequence(0, 16));
  Evict(Tier::kDevice, 1);
  Cache(Concatenate(Sequence(0, 4), Sequence(100, 4)));  // cuts while nobody listens
  cache_->SetEventsEnabled(true);
  ExpectHeard({Sequence(0, 16), Concatenate(Sequence(0, 4), Sequence(100, 4))});
  EXPECT_EQ(NumHeard(Tier::kDevice), 4);
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTest, ADrainingNamespaceIsNotToldToWhoStartsToListen) {
  OpenAndListen(kPlenty);
  cache_->SetEventsEnabled(false);
  Lease lease = ComputeIn(IsBase() ? other_handle_ : handle_, Sequence(0, 8));
  cache_->DrainNamespace(adapter_);
  cache_->SetEventsEnabled(true);
  EXPECT_TRUE(cache_->TakeEvents().empty());
  End(lease);
  EXPECT_TRUE(cache_->TakeEvents().empty());
}

TEST_P(KVEventTest, ADrainTellsEveryRemovalWhenItStartsAndNothingAfterwards) {
  OpenAndListen(kPlenty);
  const NamespaceHandle& adapter_handle = IsBase() ? other_handle_ : handle_;
  const NamespaceHandle& base_handle = IsBase() ? handle_ : other_handle_;
  CacheIn(base_handle, Sequence(0, 8));
  CacheIn(adapter_handle, Sequence(100, 8));
  Lease running = ComputeIn(adapter_handle, Sequence(0, 16));
  CopyToHost();
  CacheIn(adapter_handle, Sequence(200, 8));
  (void)PlanWriteBacks();  // two pages are on their way to the host
  Hear();
  EXPECT_EQ(mirror_.NumPages(adapter_, Tier::kDevice), 8u);
  EXPECT_EQ(mirror_.NumPages(adapter_, Tier::kHost), HasHost() ? 6u : 0u);
  cache_->DrainNamespace(adapter_);
  Hear();
  EXPECT_EQ(mirror_.NumPages(adapter_, Tier::kDevice), 0u) << "also what a request still uses";
  EXPECT_EQ(mirror_.NumPages(adapter_, Tier::kHost), 0u);
  Grow(running, Sequence(0, 24));
  CompleteAllTransfers();
  End(running);
  EXPECT_TRUE(cache_->TakeEvents().empty());
  EXPECT_EQ(mirror_.NumPages(kBaseNamespace, Tier::kDevice), 2u);
  ExpectEverythingIsToldToBeGone();
}

// --- Tiers ---------------------------------------------------------------------------------------

using KVEventTierTest = KVEventTest;
LS_RUN_FOR_EVERY_HOST_SETUP(KVEventTierTest);

TEST_P(KVEventTierTest, ACopyIsToldWhenItHasArrived) {
  OpenAndListen(kPlenty);
  Cache(Sequence(0, 12));
  Hear();
  const TransferId write_back = PlanWriteBacks().at(0).id;
  EXPECT_TRUE(cache_->TakeEvents().empty());
  Complete(write_back);
  Hear();
  EXPECT_EQ(NumHeard(Tier::kHost), 3);
  EXPECT_EQ(NumHeard(Tier::kDevice), 3);
  EvictDevice();
  Hear();
  EXPECT_EQ(NumHeard(Tier::kHost), 3);
  EXPECT_EQ(NumHeard(Tier::kDevice), 0);
  Lease lease = Acquire(Sequence(0, 12), 12);
  EXPECT_TRUE(cache_->TakeEvents().empty());
  FinishLoading(lease);
  ExpectHeard({Sequence(0, 12)});
  EXPECT_EQ(NumHeard(Tier::kDevice), 3);
  End(lease);
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTierTest, ACopyThatFailsIsToldOnlyByWhatItLoses) {
  OpenAndListen(kPlenty);
  Lease lease = Compute(Sequence(0, 12));
  Hear();
  Fail(PlanWriteBacks().at(0).id);
  EXPECT_TRUE(cache_->TakeEvents().empty());
  ASSERT_TRUE(cache_->StartWriteBack(lease));
  CompleteAllTransfers();
  End(lease);
  Evict(Tier::kDevice, 2);
  Hear();
  lease = Acquire(Sequence(0, 12), 12);
  FailLoading(lease);
  ExpectHeard({Sequence(0, 12)});
  EXPECT_EQ(NumHeard(Tier::kDevice), 1);
  EXPECT_EQ(NumHeard(Tier::kHost), 1);
  End(lease);
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTierTest, ACopyOfACutPathIsToldFromItsStart) {
  OpenAndListen(kPlenty);
  Cache(Sequence(0, 24));
  (void)Acquire(Sequence(0, 24), 4);
  (void)Acquire(Sequence(0, 24), 16);
  const TransferId write_back = PlanWriteBacks().at(0).id;
  (void)Acquire(Sequence(0, 24), 8);
  Complete(write_back);
  ExpectHeard({Sequence(0, 24)});  // the mirror refuses a page whose parent it does not know
  EXPECT_EQ(NumHeard(Tier::kHost), 6);
  EvictDevice();
  Lease lease = Acquire(Sequence(0, 24), 24);
  FinishLoading(lease);
  ExpectHeard({Sequence(0, 24)});
  EXPECT_EQ(NumHeard(Tier::kDevice), 6);
  End(lease);
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTierTest, PagesOnTheirWayAreNotPresentForWhoStartsToListen) {
  OpenAndListen(kPlenty);
  cache_->SetEventsEnabled(false);
  Cache(Sequence(0, 12));
  const TransferId write_back = PlanWriteBacks().at(0).id;
  cache_->SetEventsEnabled(true);
  Hear();
  EXPECT_EQ(NumHeard(Tier::kDevice), 3);
  EXPECT_EQ(NumHeard(Tier::kHost), 0);
  Complete(write_back);
  Hear();
  EXPECT_EQ(NumHeard(Tier::kHost), 3);
  ExpectEverythingIsToldToBeGone();
}

TEST_P(KVEventTierTest, APageTakenOverFromARequestIsNewOnTheDeviceOnly) {
  OpenAndListen(kPlenty);
  Cache(Sequence(0, 12));
  CopyToHost();
  EvictDevice();
  Hear();
  Lease cold = Acquire(Sequence(0, 12), 0);
  cache_->Publish(cold, Sequence(0, 12));
  ExpectHeard({Sequence(0, 12)});
  EXPECT_EQ(NumHeard(Tier::kDevice), 3);
  EXPECT_EQ(NumHeard(Tier::kHost), 3);
  End(cold);
  ExpectEverythingIsToldToBeGone();
}

}  // namespace
}  // namespace lora_serve
