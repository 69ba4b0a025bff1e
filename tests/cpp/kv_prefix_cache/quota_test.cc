#include "cache_scenario.h"
#include "common/errors.h"

// Whose pages go first when two namespaces compete: quotas, adapters that are not on the device,
// age in buckets of 64 ticks; and the statistics that show it.

namespace lora_serve {
namespace {

class QuotaTest : public CacheScenario {
 protected:
  /// `id_` and `other_` compete; leases of the other one come from here.
  void OpenBoth(std::int32_t num_device_pages) {
    Open(num_device_pages);
    other_handle_ = cache_->RetainNamespace(other_);
  }
  void CacheInOther(const Tokens& tokens) { CacheIn(other_handle_, tokens); }
  std::int64_t NumPages() const { return StatsOf(id_).num_tree_pages; }
  std::int64_t NumOtherPages() const { return StatsOf(other_).num_tree_pages; }
  void TearDown() override {
    other_handle_ = {};
    CacheScenario::TearDown();
  }

  NamespaceHandle other_handle_;
};
LS_RUN_FOR_EVERY_SETUP(QuotaTest);

// --- Quotas --------------------------------------------------------------------------------------

TEST_P(QuotaTest, WhoIsOverItsQuotaLosesItsOwnPagesDownToTheQuota) {
  OpenBoth(16);
  cache_->SetQuota(id_, Tier::kDevice, 2);
  CacheInOther(Sequence(0, 16));  // the oldest
  Cache(Sequence(0, 16));
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(NumPages(), 2);
  EXPECT_EQ(NumOtherPages(), 4);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1) << "at its quota it is one of many, and the younger one";
  EXPECT_EQ(NumPages(), 2);
  EXPECT_EQ(NumOtherPages(), 3);
}

TEST_P(QuotaTest, OneEvictionMayCrossTheQuota) {
  OpenBoth(16);
  cache_->SetQuota(id_, Tier::kDevice, 2);
  CacheInOther(Sequence(0, 16));
  Cache(Sequence(0, 16));
  EXPECT_EQ(Evict(Tier::kDevice, 5), 5);
  EXPECT_EQ(NumPages(), 2);
  EXPECT_EQ(NumOtherPages(), 1);
}

TEST_P(QuotaTest, AQuotaIsSoft) {
  OpenBoth(8);
  cache_->SetQuota(id_, Tier::kDevice, 0);
  CacheInOther(Sequence(0, 8));
  Cache(Sequence(0, 24));
  EXPECT_EQ(NumPages(), 6) << "nobody else wants the room";
  EXPECT_EQ(Probe(Sequence(0, 24)), 24);
  CacheInOther(Sequence(100, 8));  // now somebody does
  EXPECT_EQ(NumPages(), 4);
  EXPECT_EQ(NumOtherPages(), 4);
}

TEST_P(QuotaTest, AQuotaCanBeGivenAtTheStartChangedAndTakenAway) {
  Open(16);
  const NamespaceId id = cache_->OpenNamespace({.device_quota_pages = 1});
  Cache(Sequence(0, 8));
  CacheIn(cache_->RetainNamespace(id), Sequence(0, 16));
  Evict(Tier::kDevice, 1);
  EXPECT_EQ(StatsOf(id).num_tree_pages, 3) << "over its quota";
  cache_->SetQuota(id, Tier::kDevice, 3);
  Evict(Tier::kDevice, 1);
  EXPECT_EQ(StatsOf(id).num_tree_pages, 3) << "no longer";
  EXPECT_EQ(NumPages(), 1);
  cache_->SetQuota(id, Tier::kDevice, 2);
  Evict(Tier::kDevice, 1);
  EXPECT_EQ(StatsOf(id).num_tree_pages, 2);
  cache_->SetQuota(id, Tier::kDevice, 0);
  cache_->SetQuota(id, Tier::kDevice, std::nullopt);
  Evict(Tier::kDevice, 1);
  EXPECT_EQ(StatsOf(id).num_tree_pages, 2);
  EXPECT_EQ(NumPages(), 0);
}

TEST_P(QuotaTest, LeasedPagesCountButCannotGo) {
  OpenBoth(16);
  cache_->SetQuota(id_, Tier::kDevice, 2);
  CacheInOther(Sequence(0, 8));
  Cache(Sequence(100, 4));
  const Lease lease = Compute(Sequence(0, 12));
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(Probe(Sequence(100, 4)), 0);
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2) << "still over the quota, with nothing left to give";
  EXPECT_EQ(NumPages(), 3);
  EXPECT_EQ(NumOtherPages(), 0);
}

TEST_P(QuotaTest, NonsenseIsRefused) {
  Open(4);
  const std::size_t num_namespaces = cache_->NamespaceStatsList().size();
  EXPECT_THROW((void)cache_->OpenNamespace({.device_quota_pages = -1}), InvalidArgumentError);
  EXPECT_THROW((void)cache_->OpenNamespace({.host_quota_pages = -1}), InvalidArgumentError);
  EXPECT_EQ(cache_->NamespaceStatsList().size(), num_namespaces);
  const std::string before = cache_->Dump();
  EXPECT_THROW(cache_->SetQuota(id_, Tier::kDevice, -1), InvalidArgumentError);
  EXPECT_THROW(cache_->SetQuota(id_, Tier::kHost, -1), InvalidArgumentError);
  EXPECT_THROW(cache_->SetQuota(NamespaceId{99}, Tier::kHost, 1), NotFoundError);
  EXPECT_THROW(cache_->SetAdapterResident(NamespaceId{99}, true), NotFoundError);
  EXPECT_EQ(cache_->Dump(), before);
}

using HostQuotaTest = QuotaTest;
LS_RUN_FOR_EVERY_HOST_SETUP(HostQuotaTest);

TEST_P(HostQuotaTest, EachTierHasAQuotaOfItsOwn) {
  OpenBoth(16);
  cache_->SetQuota(id_, Tier::kHost, 2);
  CacheInOther(Sequence(0, 16));
  CopyToHost();
  Cache(Sequence(0, 16));
  CopyToHost();
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(NumOtherPages(), 3) << "on the device there is no quota, and it is the older one";
  EXPECT_EQ(Evict(Tier::kHost, 3), 3);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 2);
  EXPECT_EQ(StatsOf(other_).num_host_pages, 3);
}

TEST_P(HostQuotaTest, PagesOnTheirWayCount) {
  OpenBoth(16);
  cache_->SetQuota(id_, Tier::kHost, 2);
  CacheInOther(Sequence(0, 16));
  CopyToHost();
  Cache(Sequence(0, 8));
  CopyToHost();
  Cache(Sequence(100, 4));
  ASSERT_EQ(PlanWriteBacks().size(), 1u);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 3);
  EXPECT_EQ(Evict(Tier::kHost, 1), 1);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 2);
  EXPECT_EQ(StatsOf(other_).num_host_pages, 4);
}

// --- Adapters that are not on the device ---------------------------------------------------------

TEST_P(QuotaTest, PagesOfAnAdapterThatIsNotResidentGoFirst) {
  OpenBoth(16);
  CacheInOther(Sequence(0, 8));
  Cache(Sequence(0, 8));
  cache_->SetAdapterResident(id_, false);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(NumPages(), 1);
  EXPECT_EQ(NumOtherPages(), 2);
  cache_->SetAdapterResident(id_, true);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(NumPages(), 1) << "back on the device it is as good as any, and younger";
  EXPECT_EQ(NumOtherPages(), 1);
}

TEST_P(QuotaTest, AnAdapterIsResidentUntilSaidOtherwise) {
  OpenBoth(16);
  CacheInOther(Sequence(0, 8));
  Cache(Sequence(0, 8));
  cache_->SetAdapterResident(other_, true);
  EXPECT_EQ(Evict(Tier::kDevice, 2), 2);
  EXPECT_EQ(NumPages(), 2);
}

TEST_P(HostQuotaTest, OnTheHostTooPagesOfAnAdapterThatIsNotResidentGoFirst) {
  OpenBoth(16);
  CacheInOther(Sequence(0, 8));
  CopyToHost();
  Cache(Sequence(0, 8));
  CopyToHost();
  cache_->SetAdapterResident(id_, false);
  EXPECT_EQ(Evict(Tier::kHost, 1), 1);
  EXPECT_EQ(StatsOf(id_).num_host_pages, 1);
}

// --- The order of the criteria -------------------------------------------------------------------

/// These count ticks, so they run without recurrent state, whose snapshots tick, too.
using AgeTest = QuotaTest;
LS_RUN_FOR_SETUPS(AgeTest, {Domain::kBase, Domain::kAdapter}, {false, true}, {false});

TEST_P(AgeTest, WithinABucketOf64TicksResidencyDecides) {
  OpenBoth(16);
  Cache(Sequence(0, 4));  // used at 1
  Tick(61);
  CacheInOther(Sequence(0, 4));  // used at 63
  cache_->SetAdapterResident(other_, false);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(NumPages(), 1);
  EXPECT_EQ(NumOtherPages(), 0);
}

TEST_P(AgeTest, AnOlderBucketGoesBeforeAnAdapterThatIsNotResident) {
  OpenBoth(16);
  Tick(62);
  Cache(Sequence(0, 4));         // used at 63
  CacheInOther(Sequence(0, 4));  // used at 64, in the next bucket
  cache_->SetAdapterResident(other_, false);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(NumPages(), 0);
  EXPECT_EQ(NumOtherPages(), 1);
}

TEST_P(AgeTest, AQuotaGoesBeforeAgeAndResidency) {
  OpenBoth(16);
  CacheInOther(Sequence(0, 4));
  Tick(100);
  Cache(Sequence(0, 4));
  cache_->SetAdapterResident(other_, false);
  cache_->SetQuota(id_, Tier::kDevice, 0);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(NumPages(), 0);
  EXPECT_EQ(NumOtherPages(), 1);
}

using HostAgeTest = QuotaTest;
LS_RUN_FOR_SETUPS(HostAgeTest, {Domain::kBase, Domain::kAdapter}, {true}, {false});

TEST_P(HostAgeTest, AnOlderBucketGoesBeforePagesThatTheHostHas) {
  OpenBoth(16);
  Tick(62);
  Cache(Sequence(0, 4));  // used at 63; not on the host
  Lease backed = Compute(Sequence(100, 4));
  ASSERT_TRUE(cache_->StartWriteBack(backed));
  End(backed);  // used at 64
  CompleteAllTransfers();
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(Probe(Sequence(0, 4)), 0);
  EXPECT_EQ(Probe(Sequence(100, 4)), 4);
}

TEST_P(HostAgeTest, ResidencyGoesBeforePagesThatTheHostHas) {
  OpenBoth(16);
  Lease backed = Compute(Sequence(0, 4));
  ASSERT_TRUE(cache_->StartWriteBack(backed));
  End(backed);
  CompleteAllTransfers();
  CacheInOther(Sequence(0, 4));
  cache_->SetAdapterResident(other_, false);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(NumPages(), 1);
  EXPECT_EQ(NumOtherPages(), 0);
}

using StateQuotaTest = QuotaTest;
LS_RUN_FOR_EVERY_STATE_SETUP(StateQuotaTest);

TEST_P(StateQuotaTest, SnapshotsFollowTheSameOrder) {
  KVPrefixCacheOptions options = OptionsWith(16);
  options.num_device_state_slots = 3;
  OpenWith(options);
  other_handle_ = cache_->RetainNamespace(other_);
  CacheInOther(Sequence(0, 4));
  Cache(Sequence(0, 4));
  cache_->SetAdapterResident(id_, false);
  const Lease first = Acquire({}, 0);
  const Lease second = Acquire({}, 0);  // takes the slot of a snapshot
  EXPECT_EQ(StatsOf(id_).num_device_snapshots, 0);
  EXPECT_EQ(StatsOf(other_).num_device_snapshots, 1) << "older, but of an adapter on the device";
}

// --- Statistics ----------------------------------------------------------------------------------

TEST_P(QuotaTest, HitsAndMissesAreCountedPerNamespaceAndOnlyOnSuccess) {
  OpenBoth(8);
  Cache(Sequence(0, 14));                            // 14 missed
  CacheInOther(Sequence(0, 10));                     // 10 missed
  const Lease lease = Acquire(Sequence(0, 14), 13);  // 12 hit, 2 missed
  EXPECT_EQ(TryAcquire(Sequence(0, 40), 14).outcome, AcquireOutcome::kNoRoom);
  EXPECT_EQ(StatsOf(id_).num_hit_tokens, 12);
  EXPECT_EQ(StatsOf(id_).num_missed_tokens, 16);
  EXPECT_EQ(StatsOf(other_).num_hit_tokens, 0);
  EXPECT_EQ(StatsOf(other_).num_missed_tokens, 10);
}

TEST_P(HostQuotaTest, WhatComesFromTheHostIsAHit) {
  OpenBoth(8);
  Cache(Sequence(0, 16));
  CopyToHost();
  Evict(Tier::kDevice, 2);
  const Lease lease = Acquire(Sequence(0, 16), 15);
  EXPECT_EQ(TryAcquire(Sequence(0, 16), 15).outcome, AcquireOutcome::kInFlight);
  EXPECT_EQ(StatsOf(id_).num_hit_tokens, 12);
  EXPECT_EQ(StatsOf(id_).num_missed_tokens, 16 + 4);
}

TEST_P(QuotaTest, EvictionsAreCountedWhereTheyHappen) {
  OpenBoth(16);
  CacheInOther(Sequence(0, 8));
  Cache(Sequence(0, 16));
  CopyToHost();
  CopyToHost();
  Evict(Tier::kDevice, 3);
  Evict(Tier::kHost, 5);
  EXPECT_EQ(StatsOf(other_).num_evicted_device_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_evicted_device_pages, 1);
  EXPECT_EQ(StatsOf(other_).num_evicted_host_pages, HasHost() ? 2 : 0);
  EXPECT_EQ(StatsOf(id_).num_evicted_host_pages, HasHost() ? 3 : 0);
  EXPECT_EQ(cache_->Stats().num_evicted_pages, 3);
  EXPECT_EQ(cache_->Stats().num_evicted_host_pages, HasHost() ? 5 : 0);
}

}  // namespace
}  // namespace lora_serve
