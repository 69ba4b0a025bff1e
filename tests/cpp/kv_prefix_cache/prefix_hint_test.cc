#include "cache_scenario.h"

// Hints that the scheduler keeps between steps: true again after RefreshHints, and computed anew
// only where something has changed.

namespace lora_serve {
namespace {

class PrefixHintTest : public CacheScenario {
 protected:
  /// A hint never computed.
  PrefixHint HintFor(NamespaceId id) const { return {.namespace_id = id, .tokens = tokens_}; }
  void Refresh(PrefixHint& hint) const { cache_->RefreshHints({&hint, 1}); }
  /// Brings the hint up to date, and checks it against a probe.
  void ExpectTrueAfterRefresh(PrefixHint& hint, std::int32_t num_resumable_tokens) const {
    Refresh(hint);
    EXPECT_EQ(hint.num_resumable_tokens, num_resumable_tokens);
    EXPECT_EQ(hint.num_resumable_tokens, ProbeAll(hint.namespace_id, tokens_).num_resumable_tokens);
  }

  Tokens tokens_ = Sequence(0, 24);
};
LS_RUN_FOR_EVERY_SETUP(PrefixHintTest);

TEST_P(PrefixHintTest, AFreshHintIsComputed) {
  Open(kPlenty);
  PrefixHint hint = HintFor(id_);
  hint.num_resumable_tokens = 99;
  ExpectTrueAfterRefresh(hint, 0);
  EXPECT_NE(hint.version, 0u) << "0 means never";
  Cache(Sequence(0, 16));
  PrefixHint second = HintFor(id_);
  ExpectTrueAfterRefresh(second, 16);
}

TEST_P(PrefixHintTest, AHintFollowsPublishingAndEviction) {
  Open(kPlenty);
  PrefixHint hint = HintFor(id_);
  ExpectTrueAfterRefresh(hint, 0);
  Lease lease = Compute(Sequence(0, 8));
  ExpectTrueAfterRefresh(hint, 8);
  Grow(lease, Sequence(0, 16));
  ExpectTrueAfterRefresh(hint, 16);
  End(lease);
  Evict(Tier::kDevice, 1);
  ExpectTrueAfterRefresh(hint, 12);
  EvictDevice();
  ExpectTrueAfterRefresh(hint, 0);
}

TEST_P(PrefixHintTest, AHintThatIsStillTrueIsNotComputedAgain) {
  Open(kPlenty);
  Cache(Sequence(0, 16));
  PrefixHint hint = HintFor(id_);
  ExpectTrueAfterRefresh(hint, 16);
  hint.num_resumable_tokens = 99;  // shows who has written
  Refresh(hint);
  EXPECT_EQ(hint.num_resumable_tokens, 99);
  // What happens in another namespace is no reason either.
  const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
  CacheIn(other_handle, Sequence(0, 24));
  CacheIn(other_handle, Sequence(100, 24));
  Refresh(hint);
  EXPECT_EQ(hint.num_resumable_tokens, 99);
  Cache(Sequence(0, 20));
  ExpectTrueAfterRefresh(hint, 20);
}

TEST_P(PrefixHintTest, ManyHintsOfManyNamespacesAreRefreshedAtOnce) {
  Open(kPlenty);
  const NamespaceHandle other_handle = cache_->RetainNamespace(other_);
  Cache(Sequence(0, 12));
  CacheIn(other_handle, Sequence(0, 20));
  const Tokens elsewhere = Sequence(50, 24);
  std::vector<PrefixHint> hints{HintFor(id_), HintFor(other_), HintFor(id_), HintFor(other_)};
  hints[2].tokens = elsewhere;
  cache_->RefreshHints(hints);
  EXPECT_EQ(hints[0].num_resumable_tokens, 12);
  EXPECT_EQ(hints[1].num_resumable_tokens, 20);
  EXPECT_EQ(hints[2].num_resumable_tokens, 0);
  EXPECT_EQ(hints[3].num_resumable_tokens, 20);
  Cache(elsewhere);
  for (PrefixHint& hint : hints) hint.num_resumable_tokens += 1000;
  cache_->RefreshHints(hints);
  EXPECT_EQ(hints[0].num_resumable_tokens, 12);
  EXPECT_EQ(hints[1].num_resumable_tokens, 1020) << "its namespace has not changed";
  EXPECT_EQ(hints[2].num_resumable_tokens, 24);
  cache_->RefreshHints({});
}

TEST_P(PrefixHintTest, AHintOfANamespaceThatIsGoneIsZero) {
  Open(kPlenty);
  const NamespaceId id = cache_->OpenNamespace({.digest_seed = 3});
  PrefixHint hint = HintFor(id);
  {
    const NamespaceHandle handle = cache_->RetainNamespace(id);
    CacheIn(handle, Sequence(0, 16));
    ExpectTrueAfterRefresh(hint, 16);
    cache_->DrainNamespace(id);
    ExpectTrueAfterRefresh(hint, 0);
    hint.num_resumable_tokens = 16;
  }
  ASSERT_FALSE(cache_->HasNamespace(id));
  Refresh(hint);
  EXPECT_EQ(hint.num_resumable_tokens, 0);
  PrefixHint unknown = HintFor(NamespaceId{99});
  unknown.num_resumable_tokens = 16;
  Refresh(unknown);
  EXPECT_EQ(unknown.num_resumable_tokens, 0);
}

TEST_P(PrefixHintTest, RefreshingChangesNothingElse) {
  Open(kPlenty);
  Cache(Sequence(0, 24));
  const std::string before = cache_->Dump();
  PrefixHint hint = HintFor(id_);
  hint.tokens = std::span(tokens_).first(9);
  Refresh(hint);
  EXPECT_EQ(hint.num_resumable_tokens, 8);
  EXPECT_EQ(cache_->Dump(), before);
}

TEST_P(PrefixHintTest, WithReuseOffThereIsNothingToHintAt) {
  KVPrefixCacheOptions options = OptionsWith(kPlenty);
  options.enable_prefix_reuse = false;
  OpenWith(options);
  Cache(Sequence(0, 24));
  PrefixHint hint = HintFor(id_);
  ExpectTrueAfterRefresh(hint, 0);
}

using HostPrefixHintTest = PrefixHintTest;
LS_RUN_FOR_EVERY_HOST_SETUP(HostPrefixHintTest);

TEST_P(HostPrefixHintTest, AHintFollowsTheHost) {
  Open(kPlenty);
  PrefixHint hint = HintFor(id_);
  Cache(Sequence(0, 16));
  CopyToHost();
  ExpectTrueAfterRefresh(hint, 16);
  EvictDevice();
  ExpectTrueAfterRefresh(hint, 16);
  Evict(Tier::kHost, 1);
  ExpectTrueAfterRefresh(hint, 12);
  Lease lease = Acquire(Sequence(0, 12), 12);
  ExpectTrueAfterRefresh(hint, 12);
  FailLoading(lease);
  ExpectTrueAfterRefresh(hint, 0);
}

TEST_P(HostPrefixHintTest, AHintFollowsWhatArrivesAndWhatIsTakenOver) {
  Open(kPlenty);
  PrefixHint hint = HintFor(id_);
  Cache(Sequence(0, 16));
  CopyToHost();
  Evict(Tier::kDevice, 3);
  Lease lease = Acquire(Sequence(0, 16), 16);
  ExpectTrueAfterRefresh(hint, 16);
  FinishLoading(lease);
  EvictHost();
  ExpectTrueAfterRefresh(hint, 16);
  End(lease);
  Evict(Tier::kDevice, 2);
  ExpectTrueAfterRefresh(hint, 8);
}

using StatePrefixHintTest = PrefixHintTest;
LS_RUN_FOR_EVERY_STATE_SETUP(StatePrefixHintTest);

TEST_P(StatePrefixHintTest, AHintFollowsSnapshots) {
  KVPrefixCacheOptions options = OptionsWith(kPlenty);
  options.num_device_state_slots = 2;
  OpenWith(options);
  PrefixHint hint = HintFor(id_);
  Lease lease = Acquire(Sequence(0, 16), 0);
  cache_->Publish(lease, Sequence(0, 16));
  ExpectTrueAfterRefresh(hint, 0);
  ASSERT_TRUE(cache_->ReserveSnapshot(lease, 16));
  cache_->Publish(lease, Sequence(0, 16));  // attaches it, and no page
  ExpectTrueAfterRefresh(hint, 16);
  const Lease newcomer = Acquire({}, 0);  // takes its slot
  ExpectTrueAfterRefresh(hint, 0);
}

}  // namespace
}  // namespace lora_serve
