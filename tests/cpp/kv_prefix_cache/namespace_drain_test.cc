#include <utility>

#include "cache_scenario.h"
#include "common/errors.h"

// The end of a namespace. The base namespace has none, so these run for an adapter's, beside a base
// namespace that must not notice.

namespace lora_serve {
namespace {

class NamespaceDrainTest : public CacheScenario {
 protected:
  void SetUp() override {
    Open(16);
    base_handle_ = cache_->RetainNamespace(kBaseNamespace);
    CacheIn(base_handle_, Sequence(0, 8));
    CopyToHost();
  }
  void TearDown() override {
    DropHandle();
    EXPECT_FALSE(cache_->HasNamespace(id_) && StatsOf(id_).is_draining)
        << "a drained namespace did not destroy itself";
    EXPECT_EQ(ProbeIn(kBaseNamespace, Sequence(0, 8)), 8) << "a drain touched the base namespace";
    EXPECT_EQ(StatsOf(kBaseNamespace).num_host_pages, HasHost() ? 2 : 0);
    base_handle_ = {};
    CacheScenario::TearDown();
  }
  void DropHandle() { handle_ = {}; }

  NamespaceHandle base_handle_;
};
LS_RUN_FOR_EVERY_ADAPTER_SETUP(NamespaceDrainTest);

TEST_P(NamespaceDrainTest, AnUnusedNamespaceGoesAtOnceFromEveryTier) {
  Cache(Sequence(0, 16));
  CopyToHost();
  EXPECT_EQ(StatsOf(id_).num_host_pages, HasHost() ? 4 : 0);
  DropHandle();
  cache_->DrainNamespace(id_);
  EXPECT_FALSE(cache_->HasNamespace(id_));
  EXPECT_EQ(cache_->Stats().num_free_pages, 14);
  EXPECT_EQ(cache_->Stats().num_free_host_pages, HasHost() ? kPlenty - 2 : 0);
  EXPECT_EQ(NumFreeSlots(), HasState() ? kPlenty - 2 : 0);
  EXPECT_EQ(cache_->NamespaceStatsList().size(), 1u);
}

TEST_P(NamespaceDrainTest, UnleasedPagesGoAtOnceAndTheRestWithTheLeases) {
  Cache(Concatenate(Sequence(0, 8), Sequence(100, 8)));
  Lease shallow = Acquire(Sequence(0, 4), 4);
  Lease deep = Compute(Sequence(0, 16));
  DropHandle();
  cache_->DrainNamespace(id_);
  cache_->CheckInvariants();
  EXPECT_TRUE(cache_->HasNamespace(id_));
  EXPECT_TRUE(StatsOf(id_).is_draining);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 4);
  deep = Lease();
  cache_->CheckInvariants();
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 1);
  shallow = Lease();
  EXPECT_FALSE(cache_->HasNamespace(id_));
  EXPECT_EQ(cache_->Stats().num_free_pages, 14);
}

TEST_P(NamespaceDrainTest, AColdLeaseKeepsTheVirtualRoot) {
  Lease cold = Acquire(Sequence(0, 8), 0);  // pins only the virtual root
  DropHandle();
  cache_->DrainNamespace(id_);
  cache_->CheckInvariants();
  EXPECT_TRUE(cache_->HasNamespace(id_));
  EXPECT_TRUE(cache_->Extend(cold, 16));
  EXPECT_EQ(cold.pages().size(), 4u);
  cold = Lease();
  EXPECT_FALSE(cache_->HasNamespace(id_));
}

TEST_P(NamespaceDrainTest, ALeaseOutlivesItsHandleAndAHandleItsLease) {
  Lease lease = Compute(Sequence(0, 8));
  NamespaceHandle second_handle = cache_->RetainNamespace(id_);
  DropHandle();
  cache_->DrainNamespace(id_);
  lease = Lease();
  EXPECT_TRUE(cache_->HasNamespace(id_));
  EXPECT_EQ(StatsOf(id_).num_handles, 1);
  second_handle = {};
  EXPECT_FALSE(cache_->HasNamespace(id_));
}

TEST_P(NamespaceDrainTest, NewHandlesAreRefusedButOldOnesStillAcquire) {
  const Lease running = Compute(Sequence(0, 8));
  cache_->DrainNamespace(id_);
  EXPECT_THROW((void)cache_->RetainNamespace(id_), NotFoundError);
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
  Lease queued = Acquire(Sequence(0, 12), 8);  // was queued before the drain
  EXPECT_EQ(queued.num_cached_tokens(), HasState() ? 0 : 8) << "unpinned snapshots went at once";
  EXPECT_EQ(queued.pages().size(), 3u);
  DropHandle();
}

TEST_P(NamespaceDrainTest, NothingIsPublishedIntoADrainingNamespace) {
  Lease lease = Compute(Sequence(0, 8));
  ASSERT_TRUE(cache_->Extend(lease, 16));
  cache_->DrainNamespace(id_);
  Publish(lease, Sequence(0, 16));
  EXPECT_EQ(lease.num_published_pages(), 2);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 2);
  EXPECT_EQ(Probe(Sequence(0, 16)), 8);
  lease = Lease();  // the request ends
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 0);
  EXPECT_EQ(cache_->Stats().num_free_pages, 14);
  DropHandle();
  EXPECT_FALSE(cache_->HasNamespace(id_));
}

TEST_P(NamespaceDrainTest, DrainingTwiceIsNothing) {
  Lease lease = Compute(Sequence(0, 8));
  cache_->DrainNamespace(id_);
  cache_->DrainNamespace(id_);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 2);
  lease = Lease();
  DropHandle();
  EXPECT_THROW(cache_->DrainNamespace(id_), NotFoundError);
}

TEST_P(NamespaceDrainTest, TheBaseNamespaceIsPermanent) {
  EXPECT_THROW(cache_->DrainNamespace(kBaseNamespace), InvalidArgumentError);
  EXPECT_FALSE(StatsOf(kBaseNamespace).is_draining);
  EXPECT_NO_THROW((void)cache_->RetainNamespace(kBaseNamespace));
}

TEST_P(NamespaceDrainTest, DrainedPagesAreNotCountedAsEvicted) {
  Cache(Sequence(0, 16));
  DropHandle();
  cache_->DrainNamespace(id_);
  EXPECT_EQ(cache_->Stats().num_evicted_pages, 0);
}

TEST_P(NamespaceDrainTest, IdsAreNeverReused) {
  DropHandle();
  cache_->DrainNamespace(id_);
  const NamespaceId next = cache_->OpenNamespace({});
  EXPECT_GT(next, id_);
  cache_->DrainNamespace(next);
  EXPECT_GT(cache_->OpenNamespace({}), next);
}

}  // namespace
}  // namespace lora_serve
