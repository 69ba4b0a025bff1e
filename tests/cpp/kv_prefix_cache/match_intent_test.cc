#include "cache_scenario.h"

// What a match is for: reuse of what others computed can be switched off, recovery of one's own
// cannot.

namespace lora_serve {
namespace {

class MatchIntentTest : public CacheScenario {
 protected:
  void OpenWithReuse(bool enable_prefix_reuse) {
    KVPrefixCacheOptions options = OptionsWith(kPlenty);
    options.enable_prefix_reuse = enable_prefix_reuse;
    OpenWith(options);
  }
};
LS_RUN_FOR_EVERY_SETUP(MatchIntentTest);

TEST_P(MatchIntentTest, WithReuseOnBothIntentsFindTheSame) {
  OpenWithReuse(true);
  Cache(Sequence(0, 16));
  for (const MatchIntent intent : {MatchIntent::kPrefixReuse, MatchIntent::kRecovery}) {
    EXPECT_EQ(ProbeAll(id_, Sequence(0, 16), intent).num_resumable_tokens, 16);
    EXPECT_EQ(Acquire(Sequence(0, 16), 15, intent).num_cached_tokens(), 12);
  }
}

TEST_P(MatchIntentTest, WithReuseOffOnlyRecoveryFindsAnything) {
  OpenWithReuse(false);
  Cache(Sequence(0, 16));
  const ProbeResult probe = ProbeAll(id_, Sequence(0, 16), MatchIntent::kPrefixReuse);
  EXPECT_EQ(probe.num_resumable_tokens, 0);
  EXPECT_EQ(probe.num_device_tokens, 16) << "it is there, and says so";
  EXPECT_EQ(ProbeAll(id_, Sequence(0, 16), MatchIntent::kRecovery).num_resumable_tokens, 16);
  const Lease fresh = Acquire(Sequence(0, 16), 15, MatchIntent::kPrefixReuse);
  EXPECT_EQ(fresh.num_cached_tokens(), 0);
  EXPECT_EQ(fresh.num_published_pages(), 0);
  EXPECT_EQ(fresh.resumed_snapshot(), kNoStateSlot);
  const Lease recovered = Acquire(Sequence(0, 16), 15, MatchIntent::kRecovery);
  EXPECT_EQ(recovered.num_cached_tokens(), 12);
  ExpectNoCommonPage(fresh, recovered);
}

TEST_P(MatchIntentTest, WithReuseOffWhatIsPublishedIsStillCopiedAndRecoveredFromEveryTier) {
  OpenWithReuse(false);
  Lease lease = Compute(Sequence(0, 16));
  CopyToHost();
  End(lease);  // preempted
  if (HasHost()) {
    EXPECT_EQ(EvictDevice(), 4);
  }
  EXPECT_FALSE(Acquire(Sequence(0, 16), 15, MatchIntent::kPrefixReuse).IsLoading());
  lease = Acquire(Sequence(0, 16), 15, MatchIntent::kRecovery);
  EXPECT_EQ(lease.num_cached_tokens(), 12);
  EXPECT_EQ(lease.num_host_cached_tokens(), HasHost() ? 12 : 0);
}

TEST_P(MatchIntentTest, WithReuseOffTwinsKeepTheirOwnPages) {
  OpenWithReuse(false);
  const Lease first = Compute(Sequence(0, 8));
  const Lease second = Compute(Sequence(0, 8));
  EXPECT_EQ(second.num_cached_tokens(), 0);
  EXPECT_EQ(second.num_published_pages(), 2);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 2);
}

TEST_P(MatchIntentTest, OnlyReuseIsCountedAsHitsAndMisses) {
  OpenWithReuse(true);
  Cache(Sequence(0, 10));
  EXPECT_EQ(StatsOf(id_).num_hit_tokens, 0);
  EXPECT_EQ(StatsOf(id_).num_missed_tokens, 10);
  (void)Acquire(Sequence(0, 10), 9, MatchIntent::kRecovery);
  EXPECT_EQ(StatsOf(id_).num_hit_tokens, 0);
  EXPECT_EQ(StatsOf(id_).num_missed_tokens, 10);
  (void)Acquire(Sequence(0, 10), 9, MatchIntent::kPrefixReuse);
  EXPECT_EQ(StatsOf(id_).num_hit_tokens, 8);
  EXPECT_EQ(StatsOf(id_).num_missed_tokens, 12);
  EXPECT_EQ(StatsOf(other_).num_missed_tokens, 0);
}

TEST_P(MatchIntentTest, WithReuseOffEverythingIsAMiss) {
  OpenWithReuse(false);
  Cache(Sequence(0, 10));
  Cache(Sequence(0, 10));
  EXPECT_EQ(StatsOf(id_).num_hit_tokens, 0);
  EXPECT_EQ(StatsOf(id_).num_missed_tokens, 20);
}

using HostMatchIntentTest = MatchIntentTest;
LS_RUN_FOR_EVERY_HOST_SETUP(HostMatchIntentTest);

TEST_P(HostMatchIntentTest, WithReuseOffOnlyRecoveryWaitsForPagesOnTheirWay) {
  OpenWithReuse(false);
  Cache(Sequence(0, 16));
  CopyToHost();
  EvictDevice();
  const Lease loading = Acquire(Sequence(0, 16), 16, MatchIntent::kRecovery);
  ASSERT_TRUE(loading.IsLoading());
  EXPECT_TRUE(ProbeAll(id_, Sequence(0, 16), MatchIntent::kRecovery).is_in_flight);
  EXPECT_FALSE(ProbeAll(id_, Sequence(0, 16), MatchIntent::kPrefixReuse).is_in_flight);
  EXPECT_EQ(TryAcquire(Sequence(0, 16), 16, MatchIntent::kRecovery).outcome,
            AcquireOutcome::kInFlight);
  EXPECT_EQ(TryAcquire(Sequence(0, 16), 16, MatchIntent::kPrefixReuse).outcome,
            AcquireOutcome::kAcquired);
}

}  // namespace
}  // namespace lora_serve
