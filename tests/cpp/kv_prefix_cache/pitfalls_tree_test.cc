#include <array>
#include <cstddef>
#include <map>
#include <random>

#include "cache_scenario.h"
#include "kv_event_mirror.h"

// Failures of earlier systems around the tree and what it owns, as scenarios; the numbers are those
// of the list of pitfalls.

namespace lora_serve {
namespace {

class TreePitfallsTest : public CacheScenario {};
LS_RUN_FOR_EVERY_SETUP(TreePitfallsTest);

using TreeTransferPitfallsTest = TreePitfallsTest;
LS_RUN_FOR_EVERY_HOST_SETUP(TreeTransferPitfallsTest);

// Pitfall 4: a write-back walk and evictions on every tier take nothing from the virtual root.
TEST_P(TreePitfallsTest, AnEmptiedVirtualRootServesTheNextRequest) {
  Open(8);
  for (const TokenId first : {0, 100}) {
    Cache(Sequence(first, 8));
    cache_->PlanWriteBacks();
    std::size_t num_copied = 0;
    for (const TransferOrder& order : TakeOrders()) num_copied += order.pages.size();
    EXPECT_EQ(num_copied, HasHost() ? 2u : 0u) << "the root has no page to copy";
    CompleteAllTransfers();
    EXPECT_EQ(EvictDevice(), 2);
    EXPECT_EQ(EvictHost(), HasHost() ? 2 : 0);
    EXPECT_EQ(cache_->Stats().num_nodes, 0);
    ASSERT_TRUE(cache_->HasNamespace(id_));
    ExpectNothingCachedIn(id_, Sequence(first, 8));
  }
  const Lease lease = Compute(Sequence(0, 8));
  EXPECT_EQ(Probe(Sequence(0, 8)), 8);
}

// Pitfall 4.
TEST_P(TreePitfallsTest, AColdLeaseStartsAtTheFirstTokenAndHasNothingToWriteBack) {
  Open(8);
  Lease cold = Acquire(Sequence(0, 10), 9);
  EXPECT_EQ(cold.num_cached_tokens(), 0);
  EXPECT_EQ(cold.num_published_pages(), 0);
  EXPECT_EQ(cold.pages().size(), 3u);
  EXPECT_TRUE(PlanWriteBacks().empty());
  EXPECT_FALSE(cache_->StartWriteBack(cold));
  EXPECT_EQ(EvictDevice(), 0);
  EXPECT_EQ(EvictHost(), 0);
  cache_->Publish(cold, Sequence(0, 3));  // less than a page
  EXPECT_EQ(cold.num_published_pages(), 0);
  Publish(cold, Sequence(0, 10));
  EXPECT_EQ(cold.num_published_pages(), 2);
  EXPECT_EQ(Probe(Sequence(0, 10)), 8);
}

// Pitfall 4: the root's hash was published as a parent that no router had ever seen.
TEST_P(TreePitfallsTest, TheFirstPageOfASequenceHasNoParentHash) {
  Open(8);
  KVEventMirror mirror(kPageSize);
  mirror.AddNamespace(id_, IsBase() ? 0 : kAdapterSeed);
  cache_->SetEventsEnabled(true);
  Lease lease = AcquireIn(handle_, Sequence(0, 16), {.num_capacity_tokens = 16});
  std::optional<std::uint64_t> parent_hash;
  for (const std::int32_t num_computed : {8, 16}) {
    cache_->Publish(lease, Sequence(0, num_computed));
    const std::vector<KVEvent> events = cache_->TakeEvents();
    ASSERT_FALSE(events.empty());
    EXPECT_EQ(events.front().parent_hash, parent_hash);
    parent_hash = events.back().page_hashes.back();
    mirror.Hear(events);
  }
  CopyToHost();
  mirror.Hear(cache_->TakeEvents());
  EXPECT_EQ(mirror.NumPages(id_, Tier::kHost), HasHost() ? 4u : 0u);
}

// Pitfall 6.
TEST_P(TreePitfallsTest, AParentIsEvictableAgainAfterItsSubtreeWentInParts) {
  Open(16);
  const Tokens left = Concatenate(Sequence(0, 8), Sequence(100, 8));
  const Tokens right = Concatenate(Sequence(0, 8), Sequence(200, 8));
  for (const Tokens& tokens : {left, right}) {
    Cache(tokens);
    CopyToHost();
  }
  Lease half = Acquire(left, 12);  // the trunk and one page of the left branch
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 0);
  EXPECT_EQ(Probe(left), 12);
  End(half);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Evict(Tier::kDevice, 1), 1);
  EXPECT_EQ(Evict(Tier::kDevice, 1), 0);
  EXPECT_EQ(StatsOf(id_).num_tree_pages, 0);
  if (!HasHost()) return;
  for (int i = 0; i < 6; ++i) EXPECT_EQ(Evict(Tier::kHost, 1), 1);
  EXPECT_EQ(Evict(Tier::kHost, 1), 0);
  EXPECT_EQ(cache_->Stats().num_nodes, 0);
}

// Pitfall 6: a copy pins both of its ends; when it ends they are as evictable as before.
TEST_P(TreeTransferPitfallsTest, ACopyThatEndsLeavesNothingPinned) {
  Open(16);
  const auto end = [&](TransferId id, bool is_done) { is_done ? Complete(id) : Fail(id); };
  for (const bool is_done : {false, true}) {
    Cache(Sequence(0, 12));
    cache_->PlanWriteBacks();
    const TransferOrder write_back = TakeOrder();
    EXPECT_EQ(EvictDevice(), 0) << "the source of a copy";
    EXPECT_EQ(EvictHost(), 0) << "the destination of a copy";
    end(write_back.id, is_done);
    EXPECT_EQ(EvictDevice(), 3);
    EXPECT_EQ(EvictHost(), is_done ? 3 : 0);
    EXPECT_EQ(cache_->Stats().num_nodes, 0);
  }
  for (const bool is_done : {false, true}) {
    Cache(Sequence(0, 12));
    CopyToHost();
    EvictDevice();
    Lease lease = Acquire(Sequence(0, 12), 12);
    const TransferOrder load_back = TakeOrder();
    End(lease);
    EXPECT_EQ(EvictDevice(), 0) << "the destination of a copy";
    EXPECT_EQ(EvictHost(), 0) << "the source of a copy";
    end(load_back.id, is_done);
    EXPECT_EQ(EvictDevice(), is_done ? 3 : 0);
    EXPECT_EQ(EvictHost(), is_done ? 3 : 0) << "after a failure they cannot be read";
    EXPECT_EQ(cache_->Stats().num_nodes, 0);
  }
}

// --- Pitfall 12 ----------------------------------------------------------------------------------

/// One tensor-parallel rank: a cache whose nodes lie at addresses of its own.
class Rank {
 public:
  Rank(const KVPrefixCacheOptions& options, NamespaceId first_id, bool is_scattered)
      : is_scattered_(is_scattered), cache_(options) {
    for (int i = 0; i < 2; ++i) (void)cache_.OpenNamespace({});
    for (std::int64_t id = first_id.value(); id <= 2; ++id) {
      handles_.push_back(cache_.RetainNamespace(NamespaceId{id}));
    }
  }

  [[nodiscard]] std::string Dump() const { return cache_.Dump(); }
  [[nodiscard]] std::int64_t NumEvictedPages() const { return cache_.Stats().num_evicted_pages; }

  /// One of many calls, chosen by `seed`.
  void Call(std::uint64_t seed) {
    if (is_scattered_) Scatter(seed);
    std::mt19937_64 random(seed);
    const std::uint64_t choice = random() % 16;
    const NamespaceHandle& handle = handles_[random() % handles_.size()];
    Tokens tokens(1 + random() % 10);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random() % 2);
    Lease& lease = leases_[random() % 4];
    if (choice < 8) {
      Run(handle, tokens, lease);
    } else if (choice < 10) {
      lease = Lease();
    } else if (choice < 12) {
      cache_.PlanWriteBacks();
    } else if (choice < 14) {
      EndTransfers(random() % 8 != 0);
    } else {
      cache_.SetAdapterResident(handle.id(), random() % 2 == 0);
      cache_.Evict(choice == 14 ? Tier::kDevice : Tier::kHost, 1);
    }
  }

 private:
  /// Frees blocks of a node's size in another order than they lie in, for the next ones to use.
  void Scatter(std::uint64_t seed) {
    std::vector<std::unique_ptr<std::byte[]>> blocks;
    for (std::size_t i = 0; i < 40; ++i) {
      blocks.push_back(std::make_unique<std::byte[]>(16 * (1 + (seed + i) % 40)));
    }
    std::mt19937_64 random(seed);
    std::shuffle(blocks.begin(), blocks.end(), random);
    kept_blocks_[seed % 64] = std::move(blocks.back());
  }

  void Run(const NamespaceHandle& handle, const Tokens& tokens, Lease& lease) {
    const auto num_tokens = static_cast<std::int32_t>(tokens.size());
    lease = Lease();
    lease = cache_
                .Acquire(handle, tokens,
                         {.max_cached_tokens = num_tokens - 1, .num_capacity_tokens = num_tokens})
                .lease;
    if (!lease || lease.IsLoading()) return;
    const std::int32_t num_full_pages = num_tokens / cache_.page_size();
    if (num_full_pages > lease.num_published_pages()) {
      (void)cache_.ReserveSnapshot(lease, num_full_pages * cache_.page_size());
    }
    cache_.Publish(lease, tokens);
  }

  void EndTransfers(bool is_done) {
    for (const TransferOrder& order : cache_.TakeTransferOrders()) {
      is_done ? cache_.CompleteTransfer(order.id) : cache_.FailTransfer(order.id);
    }
  }

  bool is_scattered_;
  std::map<std::uint64_t, std::unique_ptr<std::byte[]>> kept_blocks_;
  KVPrefixCache cache_;
  std::vector<NamespaceHandle> handles_;
  std::array<Lease, 4> leases_;
};

// Pitfall 12: nothing may depend on time or on where a node lies, or the ranks part.
TEST_P(TreePitfallsTest, TwoRanksFedTheSameCallsEvictTheSameAndLookTheSame) {
  KVPrefixCacheOptions options = OptionsWith(24);
  options.page_size = 1;
  options.num_host_pages = HasHost() ? 12 : 0;
  options.num_device_state_slots = HasState() ? 12 : 0;
  const NamespaceId first_id = IsBase() ? kBaseNamespace : NamespaceId{1};
  Rank first(options, first_id, false);
  Rank second(options, first_id, true);
  for (std::uint64_t seed = 0; seed < 1500; ++seed) {
    first.Call(seed);
    second.Call(seed);
    ASSERT_EQ(first.Dump(), second.Dump()) << "at call " << seed;
  }
  EXPECT_GT(first.NumEvictedPages(), 100);
}

// --- Pitfall 14 ----------------------------------------------------------------------------------

class PageTablePitfallsTest : public TreePitfallsTest {
 protected:
  static void ExpectStartsWith(const Lease& lease, const std::vector<PageId>& pages) {
    ASSERT_GE(lease.pages().size(), pages.size());
    EXPECT_TRUE(std::ranges::equal(lease.pages().first(pages.size()), pages))
        << "an entry of a page table changed behind its reader's back";
  }
};
LS_RUN_FOR_EVERY_SETUP(PageTablePitfallsTest);

// Pitfall 14. Deltas send an entry once; they are tested in tests/cpp/scheduler
// (page_table_rows_test.cc). Here: what a lease has shown stays.
TEST_P(PageTablePitfallsTest, PagesHandedToARequestNeverChangeUnderIt) {
  Open(kPlenty);
  Lease first = Acquire(Sequence(0, 24), 0);
  Lease second = Acquire(Sequence(0, 24), 0);
  const std::vector<PageId> first_pages = PagesOf(first);
  const std::vector<PageId> second_pages = PagesOf(second);
  const auto expect_unchanged = [&] {
    ExpectStartsWith(first, first_pages);
    ExpectStartsWith(second, second_pages);
  };
  Publish(first, Sequence(0, 8));
  Publish(second, Sequence(0, 24));  // two twins, four of its own
  Publish(first, Sequence(0, 24));   // two of its own, four twins
  expect_unchanged();
  Cache(Concatenate(Sequence(0, 12), Sequence(100, 12)));  // branches off in the middle
  (void)Acquire(Sequence(0, 24), 4);                       // another cut
  expect_unchanged();
  Grow(second, Sequence(0, 32));
  EXPECT_EQ(second.pages().size(), 8u);
  expect_unchanged();
  CopyToHost();
  expect_unchanged();
  EvictOrDrain();
  expect_unchanged();
  End(first);  // what it had published, second uses as its twins or not at all
  EvictDevice();
  ExpectStartsWith(second, second_pages);
}

// Pitfall 14: what the tree takes over from a request keeps its id for both.
TEST_P(PageTablePitfallsTest, APageThatTheTreeTakesOverKeepsItsId) {
  Open(kPlenty);
  Lease cold = Acquire(Sequence(0, 12), 0);
  const std::vector<PageId> pages = PagesOf(cold);
  Cache(Sequence(0, 12));
  CopyToHost();
  EvictDevice();  // now a twin is on the host only, if there is one
  EXPECT_EQ(Probe(Sequence(0, 12)), 0);
  Publish(cold, Sequence(0, 12));
  EXPECT_EQ(PagesOf(cold), pages);
  EXPECT_EQ(PagesOf(Acquire(Sequence(0, 12), 12)), pages);
  EXPECT_EQ(StatsOf(id_).num_host_pages, HasHost() ? 3 : 0);
}

using PageTableTransferPitfallsTest = PageTablePitfallsTest;
LS_RUN_FOR_EVERY_HOST_SETUP(PageTableTransferPitfallsTest);

// Pitfall 14: the one exception is a load-back that fails, and it only shortens the lease.
TEST_P(PageTableTransferPitfallsTest, AFailedLoadBackOnlyCutsTheEndOff) {
  Open(kPlenty);
  Cache(Sequence(0, 24));
  CopyToHost();
  Evict(Tier::kDevice, 3);
  Lease lease = Acquire(Sequence(0, 32), 24);
  const std::vector<PageId> pages = PagesOf(lease);
  Fail(TakeOrder().id);
  const std::ptrdiff_t num_kept = HasState() ? 0 : 3;
  EXPECT_EQ(PagesOf(lease), std::vector<PageId>(pages.begin(), pages.begin() + num_kept));
}

// --- Pitfall 16 ----------------------------------------------------------------------------------

// Pitfall 16: moving a lease onto another one gives everything back that the other one held.
TEST_P(TreePitfallsTest, MoveAssignmentReleasesAllThatTheLeaseHeldBefore) {
  Open(kPlenty);
  Cache(Sequence(0, 8));
  const CacheStats before = cache_->Stats();
  Lease lease = Acquire(Sequence(0, 16), 8);  // pins two pages and their snapshot
  EXPECT_EQ(cache_->ReserveSnapshot(lease, 12).has_value(), HasState());
  EXPECT_EQ(NumFreeSlots(), HasState() ? before.num_free_device_state_slots - 2 : 0);
  lease = Acquire(Sequence(100, 4), 0);
  EXPECT_EQ(NumFreeSlots(), HasState() ? before.num_free_device_state_slots - 1 : 0);
  EXPECT_EQ(StatsOf(id_).num_leases, 1);
  EXPECT_EQ(StatsOf(id_).num_private_pages, 1);
  EXPECT_EQ(EvictDevice(), 2) << "the pin of the lease held before is still there";
  lease = Lease();
  EXPECT_EQ(NumFreeSlots(), HasState() ? kPlenty : 0) << "its snapshot is still pinned";
}

// Pitfall 16.
TEST_P(TreeTransferPitfallsTest, MoveAssignmentOverALoadingLeaseLeavesTheCopyUnderWay) {
  Open(16);
  Cache(Sequence(0, 12));
  CopyToHost();
  EvictDevice();
  Lease lease = Acquire(Sequence(0, 16), 12);
  const TransferOrder order = TakeOrder();
  lease = Acquire(Sequence(100, 4), 0);
  EXPECT_FALSE(lease.IsLoading());
  EXPECT_EQ(StatsOf(id_).num_private_pages, 1);
  Complete(order.id);
  EXPECT_EQ(lease.pages().size(), 1u);
  EXPECT_EQ(Probe(Sequence(0, 12)), 12);
}

// Pitfall 16: a loading lease that moves takes the copy's end with it.
TEST_P(TreeTransferPitfallsTest, ALoadingLeaseCanMoveBeforeItsCopyEnds) {
  for (const bool is_done : {true, false}) {
    Open(16);
    Cache(Sequence(0, 12));
    CopyToHost();
    EvictDevice();
    Lease source = Acquire(Sequence(0, 16), 12);
    const TransferOrder order = TakeOrder();
    Lease target(std::move(source));
    EXPECT_FALSE(source.IsLoading());  // NOLINT(bugprone-use-after-move): this is the point
    EXPECT_TRUE(target.IsLoading());
    EXPECT_EQ(target.load_back_id(), order.id);
    is_done ? Complete(order.id) : Fail(order.id);
    EXPECT_FALSE(target.IsLoading());
    EXPECT_EQ(target.num_cached_tokens(), is_done ? 12 : 0);
    End(target);
    handle_ = {};
  }
}

// Pitfall 16: what only the cache holds needs no order. A sanitizer build sees it if it does.
TEST_P(TreePitfallsTest, TheCacheGoesWithSnapshotsCopiesAndNotesInEveryState) {
  Open(kPlenty);
  Cache(Sequence(0, 12));
  CopyToHost();
  EvictDevice();
  if (HasHost()) {
    Lease lease = Acquire(Sequence(0, 12), 12);
    EXPECT_TRUE(lease.IsLoading());
  }
  Cache(Sequence(100, 12));
  cache_->PlanWriteBacks();
  Cache(Sequence(200, 12));
  EXPECT_EQ(cache_->Stats().num_transfers, HasHost() ? 2 : 0);
  handle_ = {};
  cache_.reset();
}

using TreePitfallsDeathTest = TreePitfallsTest;
LS_RUN_FOR_EVERY_SETUP(TreePitfallsDeathTest);

// Pitfall 16. Leases and handles without anything special are in lease_test.cc.
TEST_P(TreePitfallsDeathTest, DestroyingTheCacheBeforeALeaseThatResumesOrLoadsIsFatal) {
  Open(kPlenty);
  Cache(Sequence(0, 12));
  CopyToHost();
  if (HasHost()) {
    EvictDevice();
  }
  EXPECT_DEATH(
      {
        const Lease lease = Acquire(Sequence(0, 16), 12);
        handle_ = {};
        cache_.reset();
      },
      "destroyed before its users: namespace [01] has 0 handles and 1 leases");
}

}  // namespace
}  // namespace lora_serve
