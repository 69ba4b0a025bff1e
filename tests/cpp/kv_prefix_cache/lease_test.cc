#include "kv_prefix_cache/lease.h"

#include <type_traits>
#include <utility>

#include "cache_scenario.h"
#include "common/errors.h"

// Ownership of leases and handles.

namespace lora_serve {
namespace {

static_assert(!std::is_copy_constructible_v<Lease> && !std::is_copy_assignable_v<Lease>);
static_assert(std::is_nothrow_move_constructible_v<Lease>);
static_assert(std::is_nothrow_move_assignable_v<Lease>);
static_assert(!std::is_copy_constructible_v<NamespaceHandle>);
static_assert(std::is_nothrow_move_assignable_v<NamespaceHandle>);

class LeaseTest : public CacheScenario {};
LS_RUN_FOR_EVERY_SETUP(LeaseTest);

TEST_P(LeaseTest, ADefaultLeaseIsEmpty) {
  const Lease lease;
  EXPECT_FALSE(lease);
  EXPECT_TRUE(lease.pages().empty());
  EXPECT_EQ(lease.num_cached_tokens(), 0);
  EXPECT_EQ(lease.num_host_cached_tokens(), 0);
  EXPECT_FALSE(lease.IsLoading());
  EXPECT_EQ(lease.load_back_id(), kNoTransfer);
  EXPECT_EQ(lease.state_slot(), kNoStateSlot);
  EXPECT_EQ(lease.resumed_snapshot(), kNoStateSlot);
}

TEST_P(LeaseTest, MovingKeepsOneLease) {
  Open(4);
  Lease source = Compute(Sequence(0, 6));
  const std::vector<PageId> pages = PagesOf(source);
  Lease target(std::move(source));
  EXPECT_FALSE(source);  // NOLINT(bugprone-use-after-move): this is the point
  EXPECT_TRUE(source.pages().empty());
  EXPECT_EQ(source.num_published_pages(), 0);
  EXPECT_TRUE(target);
  EXPECT_EQ(PagesOf(target), pages);
  EXPECT_EQ(target.num_published_pages(), 1);
  EXPECT_EQ(StatsOf(id_).num_leases, 1);
  source = std::move(target);
  EXPECT_EQ(StatsOf(id_).num_leases, 1);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 1);
  cache_->CheckInvariants();
}

TEST_P(LeaseTest, MoveAssignmentReleasesTheLeaseHeldBefore) {
  Open(8);
  Lease target = Compute(Sequence(0, 6));
  Lease source = Compute(Sequence(100, 6));
  target = std::move(source);
  EXPECT_EQ(StatsOf(id_).num_leases, 1);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 1);
  EXPECT_EQ(EvictDevice(), 1) << "the pin of the lease held before is still there";
  EXPECT_EQ(Probe(Sequence(0, 6)), 0);
  EXPECT_EQ(Probe(Sequence(100, 6)), 4);
  cache_->CheckInvariants();
}

TEST_P(LeaseTest, SelfMoveAssignmentIsNothing) {
  Open(4);
  Lease lease = Compute(Sequence(0, 6));
  Lease& alias = lease;
  lease = std::move(alias);
  EXPECT_EQ(lease.pages().size(), 2u);
  EXPECT_EQ(StatsOf(id_).num_leases, 1);
}

TEST_P(LeaseTest, DuplicatesTravelWithTheLease) {
  Open(8);
  const Lease first = Compute(Sequence(0, 4));
  Lease second = Acquire(Sequence(0, 4), 0);
  Publish(second, Sequence(0, 4));
  Lease third(std::move(second));
  EXPECT_EQ(StatsOf(id_).num_private_pages, 1);
  third = Lease();
  EXPECT_EQ(StatsOf(id_).num_private_pages, 0);
  EXPECT_EQ(cache_->Stats().num_free_pages, 7);
}

TEST_P(LeaseTest, HandlesMoveLikeLeases) {
  Open(4);
  EXPECT_EQ(handle_.id(), id_);
  NamespaceHandle second = cache_->RetainNamespace(id_);
  EXPECT_EQ(StatsOf(id_).num_handles, 2);
  NamespaceHandle third(std::move(second));
  EXPECT_FALSE(second);  // NOLINT(bugprone-use-after-move): this is the point
  EXPECT_THROW((void)second.id(), InternalError);
  EXPECT_EQ(StatsOf(id_).num_handles, 2);
  third = cache_->RetainNamespace(other_);
  EXPECT_EQ(StatsOf(id_).num_handles, 1);
  EXPECT_EQ(StatsOf(other_).num_handles, 1);
  NamespaceHandle& alias = third;
  third = std::move(alias);
  EXPECT_EQ(third.id(), other_);
}

using LeaseDeathTest = LeaseTest;
LS_RUN_FOR_EVERY_SETUP(LeaseDeathTest);

TEST_P(LeaseDeathTest, DestroyingTheCacheBeforeALeaseIsFatal) {
  Open(4);
  EXPECT_DEATH(
      {
        const Lease lease = Compute(Sequence(0, 4));
        handle_ = {};
        cache_.reset();
      },
      "destroyed before its users: namespace [01] has 0 handles and 1 leases");
}

TEST_P(LeaseDeathTest, DestroyingTheCacheBeforeAHandleIsFatal) {
  Open(4);
  EXPECT_DEATH(cache_.reset(), "destroyed before its users: namespace [01] has 1 handles");
}

}  // namespace
}  // namespace lora_serve
