#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"

namespace lora_serve {

using Tokens = std::vector<TokenId>;

/// `num_tokens` tokens that count up from `first`.
inline Tokens Sequence(TokenId first, std::int32_t num_tokens) {
  Tokens tokens(static_cast<std::size_t>(num_tokens));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

inline Tokens Concatenate(Tokens head, const Tokens& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}

enum class Domain { kBase, kAdapter };

/// What one run of a scenario has.
struct Setup {
  Domain domain = Domain::kBase;
  bool has_host = false;
  bool has_state = false;
};

inline std::string NameOf(const Setup& setup) {
  std::string name = setup.domain == Domain::kBase ? "Base" : "Adapter";
  name += setup.has_host ? "_Host" : "_NoHost";
  return setup.has_state ? name + "AndState" : name;
}
inline void PrintTo(const Setup& setup, std::ostream* os) { *os << NameOf(setup); }

inline void PrintTo(AcquireOutcome outcome, std::ostream* os) {
  switch (outcome) {
    case AcquireOutcome::kAcquired:
      *os << "kAcquired";
      break;
    case AcquireOutcome::kNoRoom:
      *os << "kNoRoom";
      break;
    case AcquireOutcome::kInFlight:
      *os << "kInFlight";
      break;
  }
}

/// A cache and one namespace in it: every scenario runs for the base model's and for an adapter's,
/// and where it applies with and without a host tier and recurrent state.
///
/// Pages have 4 tokens. Where there is recurrent state, Publish leaves a snapshot at every page
/// boundary, so that a scenario about pages finds the same prefixes as without. Leases are locals
/// of the tests, so they end before TearDown checks the accounts.
class CacheScenario : public testing::TestWithParam<Setup> {
 protected:
  static constexpr std::int32_t kPageSize = 4;
  /// More of everything than a scenario needs that does not ask for less.
  static constexpr std::int32_t kPlenty = 64;
  static constexpr std::uint64_t kAdapterSeed = 0x6a09e667f3bcc908;

  static bool IsBase() { return GetParam().domain == Domain::kBase; }
  static bool HasHost() { return GetParam().has_host; }
  static bool HasState() { return GetParam().has_state; }

  static KVPrefixCacheOptions OptionsWith(std::int32_t num_device_pages) {
    return {.page_size = kPageSize,
            .num_device_pages = num_device_pages,
            .num_host_pages = HasHost() ? kPlenty : 0,
            .num_device_state_slots = HasState() ? kPlenty : 0,
            .num_host_state_slots = HasHost() && HasState() ? kPlenty : 0,
            .max_snapshots_per_lease = kPlenty};
  }

  void Open(std::int32_t num_device_pages) { OpenWith(OptionsWith(num_device_pages)); }

  void OpenWith(const KVPrefixCacheOptions& options) {
    cache_ = std::make_unique<KVPrefixCache>(options);
    adapter_ = cache_->OpenNamespace({.digest_seed = kAdapterSeed});
    other_ = IsBase() ? adapter_ : kBaseNamespace;
    id_ = IsBase() ? kBaseNamespace : adapter_;
    handle_ = cache_->RetainNamespace(id_);
  }

  void TearDown() override {
    if (cache_ == nullptr) return;
    CompleteAllTransfers();
    ExpectBalancedAccounts();
    ExpectEverythingCanBeEvicted();
    handle_ = {};
    cache_.reset();
  }

  // --- What a request does -----------------------------------------------------------------------

  static std::int32_t NumTokensOf(const Tokens& tokens) {
    return static_cast<std::int32_t>(tokens.size());
  }
  static Tokens FirstTokens(const Tokens& tokens, std::int32_t num_tokens) {
    return {tokens.begin(), tokens.begin() + num_tokens};
  }

  AcquireResult TryAcquireIn(const NamespaceHandle& handle, const Tokens& tokens,
                             const AcquireOptions& options) {
    AcquireResult result = cache_->Acquire(handle, tokens, options);
    EXPECT_EQ(result.outcome == AcquireOutcome::kAcquired, static_cast<bool>(result.lease));
    cache_->CheckInvariants();
    return result;
  }
  /// Asks for a lease for all of `tokens` that takes at most `max_cached_tokens` from the cache.
  AcquireResult TryAcquire(const Tokens& tokens, std::int32_t max_cached_tokens,
                           MatchIntent intent = MatchIntent::kPrefixReuse) {
    return TryAcquireIn(handle_, tokens,
                        {.intent = intent,
                         .max_cached_tokens = max_cached_tokens,
                         .num_capacity_tokens = NumTokensOf(tokens)});
  }

  Lease AcquireIn(const NamespaceHandle& handle, const Tokens& tokens,
                  const AcquireOptions& options) {
    AcquireResult result = TryAcquireIn(handle, tokens, options);
    EXPECT_EQ(result.outcome, AcquireOutcome::kAcquired) << "for " << tokens.size() << " tokens";
    return std::move(result.lease);
  }
  Lease Acquire(const Tokens& tokens, std::int32_t max_cached_tokens,
                MatchIntent intent = MatchIntent::kPrefixReuse) {
    return AcquireIn(handle_, tokens,
                     {.intent = intent,
                      .max_cached_tokens = max_cached_tokens,
                      .num_capacity_tokens = NumTokensOf(tokens)});
  }

  /// Hands the computed pages of `tokens` to the tree, with a snapshot at every boundary.
  void Publish(Lease& lease, const Tokens& tokens) {
    if (HasState()) {
      const std::int32_t num_pages = NumTokensOf(tokens) / kPageSize;
      for (std::int32_t page = lease.num_published_pages() + 1; page <= num_pages; ++page) {
        (void)cache_->ReserveSnapshot(lease, page * kPageSize);
        cache_->Publish(lease, FirstTokens(tokens, page * kPageSize));
        cache_->CheckInvariants();
      }
    }
    cache_->Publish(lease, tokens);
    cache_->CheckInvariants();
  }

  /// The lease gets room for all of `tokens`, and their KV is computed and published.
  void Grow(Lease& lease, const Tokens& tokens) {
    ASSERT_TRUE(cache_->Extend(lease, NumTokensOf(tokens)));
    Publish(lease, tokens);
  }

  /// A request that has taken what it could from the cache and has computed and published the rest.
  Lease ComputeIn(const NamespaceHandle& handle, const Tokens& tokens) {
    Lease lease = AcquireIn(
        handle, tokens,
        {.max_cached_tokens = NumTokensOf(tokens), .num_capacity_tokens = NumTokensOf(tokens)});
    if (lease.IsLoading()) FinishLoading(lease);
    Publish(lease, tokens);
    return lease;
  }
  Lease Compute(const Tokens& tokens) { return ComputeIn(handle_, tokens); }

  /// A request that came, computed, published and ended.
  void CacheIn(const NamespaceHandle& handle, const Tokens& tokens) {
    const Lease lease = ComputeIn(handle, tokens);
  }
  void Cache(const Tokens& tokens) { CacheIn(handle_, tokens); }

  void End(Lease& lease) {
    lease = Lease();
    cache_->CheckInvariants();
  }

  // --- What the executor does --------------------------------------------------------------------

  /// The orders not handed out yet; the scenario remembers to complete them.
  std::vector<TransferOrder> TakeOrders() {
    std::vector<TransferOrder> orders = cache_->TakeTransferOrders();
    for (const TransferOrder& order : orders) open_transfers_.push_back(order.id);
    return orders;
  }
  /// The only order not handed out yet.
  TransferOrder TakeOrder() {
    std::vector<TransferOrder> orders = TakeOrders();
    EXPECT_EQ(orders.size(), 1u);
    return orders.empty() ? TransferOrder{} : std::move(orders.front());
  }
  void Complete(TransferId id) {
    cache_->CompleteTransfer(id);
    std::erase(open_transfers_, id);
    cache_->CheckInvariants();
  }
  void Fail(TransferId id) {
    cache_->FailTransfer(id);
    std::erase(open_transfers_, id);
    cache_->CheckInvariants();
  }
  void CompleteAllTransfers() {
    (void)TakeOrders();
    while (!open_transfers_.empty()) Complete(open_transfers_.front());
  }
  void FinishLoading(Lease& lease) {
    (void)TakeOrders();
    Complete(lease.load_back_id());
    EXPECT_FALSE(lease.IsLoading());
  }

  void FailLoading(Lease& lease) {
    (void)TakeOrders();
    Fail(lease.load_back_id());
    EXPECT_FALSE(lease.IsLoading());
  }

  /// A step that writes back what the policy wants, and its event. Nothing without a host tier.
  void CopyToHost() {
    cache_->PlanWriteBacks();
    cache_->CheckInvariants();
    CompleteAllTransfers();
  }
  /// Starts the write-backs that the policy wants, and leaves them under way.
  std::vector<TransferOrder> PlanWriteBacks() {
    cache_->PlanWriteBacks();
    cache_->CheckInvariants();
    return TakeOrders();
  }

  std::int64_t Evict(Tier tier, std::int64_t num_pages) {
    const std::int64_t num_evicted = cache_->Evict(tier, num_pages);
    cache_->CheckInvariants();
    return num_evicted;
  }
  /// Every device page that nobody protects.
  std::int64_t EvictDevice() { return Evict(Tier::kDevice, cache_->Stats().num_device_pages); }
  std::int64_t EvictHost() { return Evict(Tier::kHost, cache_->Stats().num_host_pages); }

  /// All that may go from this run's namespace goes: an adapter's is drained, the base's is
  /// evicted.
  void EvictOrDrain() {
    if (IsBase()) {
      EvictDevice();
      EvictHost();
    } else {
      cache_->DrainNamespace(id_);
    }
    cache_->CheckInvariants();
  }

  /// Moves the logical clock on without using anything.
  void Tick(std::int32_t num_ticks) {
    for (std::int32_t i = 0; i < num_ticks; ++i) (void)Acquire({}, 0);
  }

  // --- What it looks like ------------------------------------------------------------------------

  ProbeResult ProbeAll(NamespaceId id, const Tokens& tokens,
                       MatchIntent intent = MatchIntent::kPrefixReuse) const {
    return cache_->Probe(id, tokens, intent);
  }
  /// Leading tokens on the device.
  std::int32_t ProbeIn(NamespaceId id, const Tokens& tokens) const {
    return ProbeAll(id, tokens).num_device_tokens;
  }
  std::int32_t Probe(const Tokens& tokens) const { return ProbeIn(id_, tokens); }
  /// Tokens on the host, right behind those on the device.
  std::int32_t ProbeHost(const Tokens& tokens) const {
    return ProbeAll(id_, tokens).num_host_tokens;
  }
  std::int32_t ProbeResumable(const Tokens& tokens) const {
    return ProbeAll(id_, tokens).num_resumable_tokens;
  }

  NamespaceStats StatsOf(NamespaceId id) const {
    for (const NamespaceStats& stats : cache_->NamespaceStatsList()) {
      if (stats.id == id) return stats;
    }
    ADD_FAILURE() << "namespace " << id << " is gone";
    return {};
  }
  void ExpectNothingCachedIn(NamespaceId id, const Tokens& tokens) const {
    const ProbeResult probe = ProbeAll(id, tokens, MatchIntent::kRecovery);
    EXPECT_EQ(probe.num_device_tokens, 0) << "in namespace " << id;
    EXPECT_EQ(probe.num_host_tokens, 0) << "in namespace " << id;
    EXPECT_EQ(probe.num_resumable_tokens, 0) << "in namespace " << id;
    EXPECT_FALSE(probe.is_in_flight) << "in namespace " << id;
  }
  std::int64_t NumFreeSlots() const { return cache_->Stats().num_free_device_state_slots; }

  static std::vector<PageId> PagesOf(const Lease& lease) {
    return {lease.pages().begin(), lease.pages().end()};
  }
  static std::vector<PageId> SourcesOf(const TransferOrder& order) {
    std::vector<PageId> pages;
    for (const PageCopy& copy : order.pages) pages.push_back(copy.source);
    return pages;
  }
  static std::vector<PageId> DestinationsOf(const TransferOrder& order) {
    std::vector<PageId> pages;
    for (const PageCopy& copy : order.pages) pages.push_back(copy.destination);
    return pages;
  }

  static void ExpectNoCommonPage(const Lease& first, const Lease& second) {
    for (const PageId page : first.pages()) {
      EXPECT_EQ(std::ranges::count(second.pages(), page), 0) << "page " << page;
    }
  }

  /// Nobody holds a lease: pages and slots are free, or counted in a tree.
  void ExpectBalancedAccounts() const {
    cache_->CheckInvariants();
    const CacheStats stats = cache_->Stats();
    EXPECT_EQ(stats.num_private_pages, 0);
    EXPECT_EQ(stats.num_transfers, 0);
    EXPECT_EQ(stats.num_tree_pages + stats.num_free_pages, stats.num_device_pages);
    std::int64_t num_host_pages = 0;
    std::int64_t num_device_snapshots = 0;
    std::int64_t num_host_snapshots = 0;
    for (const NamespaceStats& ns : cache_->NamespaceStatsList()) {
      num_host_pages += ns.num_host_pages;
      num_device_snapshots += ns.num_device_snapshots;
      num_host_snapshots += ns.num_host_snapshots;
    }
    EXPECT_EQ(num_host_pages + stats.num_free_host_pages, stats.num_host_pages);
    EXPECT_EQ(num_device_snapshots + stats.num_free_device_state_slots,
              stats.num_device_state_slots);
    EXPECT_EQ(num_host_snapshots + stats.num_free_host_state_slots, stats.num_host_state_slots);
  }

  /// Nobody holds anything: no page and no slot is lost for ever.
  void ExpectEverythingCanBeEvicted() {
    EXPECT_EQ(cache_->NumAvailablePages(), cache_->Stats().num_device_pages)
        << "a page can never come back";
    EvictDevice();
    EvictHost();
    const CacheStats stats = cache_->Stats();
    EXPECT_EQ(stats.num_free_pages, stats.num_device_pages);
    EXPECT_EQ(stats.num_free_host_pages, stats.num_host_pages);
    EXPECT_EQ(stats.num_free_device_state_slots, stats.num_device_state_slots);
    EXPECT_EQ(stats.num_free_host_state_slots, stats.num_host_state_slots);
    EXPECT_EQ(stats.num_nodes, 0);
  }

  std::unique_ptr<KVPrefixCache> cache_;
  NamespaceId adapter_;
  NamespaceId id_;     // the namespace of this run
  NamespaceId other_;  // another one
  NamespaceHandle handle_;
  std::vector<TransferId> open_transfers_;  // handed out, not reported yet
};

inline std::string SetupName(const testing::TestParamInfo<Setup>& info) {
  return NameOf(info.param);
}

/// Every setup whose parts are among those given.
inline std::vector<Setup> Setups(std::initializer_list<Domain> domains,
                                 std::initializer_list<bool> has_host,
                                 std::initializer_list<bool> has_state) {
  std::vector<Setup> setups;
  for (const Domain domain : domains) {
    for (const bool host : has_host) {
      for (const bool state : has_state) {
        setups.push_back({.domain = domain, .has_host = host, .has_state = state});
      }
    }
  }
  return setups;
}

#define LS_RUN_FOR_SETUPS(Scenario, ...) \
  INSTANTIATE_TEST_SUITE_P(Setups, Scenario, testing::ValuesIn(Setups(__VA_ARGS__)), SetupName)

/// Base and adapter, with and without a host tier, with and without recurrent state.
#define LS_RUN_FOR_EVERY_SETUP(Scenario) \
  LS_RUN_FOR_SETUPS(Scenario, {Domain::kBase, Domain::kAdapter}, {false, true}, {false, true})

/// Base and adapter on the device alone, for what has nothing to do with tiers and state.
#define LS_RUN_FOR_EVERY_DOMAIN(Scenario) \
  LS_RUN_FOR_SETUPS(Scenario, {Domain::kBase, Domain::kAdapter}, {false}, {false})

/// For what only a host tier has.
#define LS_RUN_FOR_EVERY_HOST_SETUP(Scenario) \
  LS_RUN_FOR_SETUPS(Scenario, {Domain::kBase, Domain::kAdapter}, {true}, {false, true})

/// For what only recurrent state has.
#define LS_RUN_FOR_EVERY_STATE_SETUP(Scenario) \
  LS_RUN_FOR_SETUPS(Scenario, {Domain::kBase, Domain::kAdapter}, {false, true}, {true})

/// For what only an adapter's namespace has.
#define LS_RUN_FOR_EVERY_ADAPTER_SETUP(Scenario) \
  LS_RUN_FOR_SETUPS(Scenario, {Domain::kAdapter}, {false, true}, {false, true})

}  // namespace lora_serve
