#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
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

/// A cache and one namespace in it: every scenario runs for the base model's and for an adapter's.
/// Pages have 4 tokens. Leases are locals of the tests, so they end before TearDown checks the
/// accounts.
class CacheScenario : public testing::TestWithParam<Domain> {
 protected:
  static constexpr std::int32_t kPageSize = 4;

  void Open(std::int32_t num_device_pages) {
    cache_ = std::make_unique<KVPrefixCache>(
        KVPrefixCacheOptions{.page_size = kPageSize, .num_device_pages = num_device_pages});
    adapter_ = cache_->OpenNamespace({.digest_seed = 7});
    other_ = GetParam() == Domain::kBase ? adapter_ : kBaseNamespace;
    id_ = GetParam() == Domain::kBase ? kBaseNamespace : adapter_;
    handle_ = cache_->RetainNamespace(id_);
  }

  void TearDown() override {
    if (cache_ == nullptr) return;
    cache_->CheckInvariants();
    const CacheStats stats = cache_->Stats();
    EXPECT_EQ(stats.num_private_pages, 0);
    EXPECT_EQ(stats.num_tree_pages + stats.num_free_pages, stats.num_device_pages);
    EXPECT_EQ(cache_->NumAvailablePages(), stats.num_device_pages) << "a page can never come back";
    handle_ = {};
    cache_.reset();
  }

  static std::int32_t NumTokensOf(const Tokens& tokens) {
    return static_cast<std::int32_t>(tokens.size());
  }

  /// A lease for all of `tokens` that took at most `max_cached_tokens` from the cache.
  std::optional<Lease> TryAcquire(const Tokens& tokens, std::int32_t max_cached_tokens) {
    auto lease = cache_->Acquire(
        handle_, tokens,
        {.max_cached_tokens = max_cached_tokens, .num_capacity_tokens = NumTokensOf(tokens)});
    cache_->CheckInvariants();
    return lease;
  }

  Lease Acquire(const Tokens& tokens, std::int32_t max_cached_tokens) {
    auto lease = TryAcquire(tokens, max_cached_tokens);
    EXPECT_TRUE(lease.has_value()) << "no room for " << tokens.size() << " tokens";
    return lease.has_value() ? std::move(*lease) : Lease();
  }

  /// A request that has taken what it could from the cache and has computed and published the rest.
  Lease Compute(const Tokens& tokens) {
    Lease lease = Acquire(tokens, NumTokensOf(tokens));
    Publish(lease, tokens);
    return lease;
  }

  void Publish(Lease& lease, const Tokens& tokens) {
    cache_->Publish(lease, tokens);
    cache_->CheckInvariants();
  }

  std::int32_t Probe(const Tokens& tokens) const { return ProbeIn(id_, tokens); }
  std::int32_t ProbeIn(NamespaceId id, const Tokens& tokens) const {
    return cache_->Probe(id, tokens).num_device_tokens;
  }

  NamespaceStats StatsOf(NamespaceId id) const {
    for (const NamespaceStats& stats : cache_->NamespaceStatsList()) {
      if (stats.id == id) return stats;
    }
    ADD_FAILURE() << "namespace " << id << " is gone";
    return {};
  }

  static std::vector<PageId> PagesOf(const Lease& lease) {
    return {lease.pages().begin(), lease.pages().end()};
  }

  std::unique_ptr<KVPrefixCache> cache_;
  NamespaceId adapter_;
  NamespaceId id_;     // the namespace of this run
  NamespaceId other_;  // another one
  NamespaceHandle handle_;
};

inline std::string DomainName(const testing::TestParamInfo<Domain>& info) {
  return info.param == Domain::kBase ? "Base" : "Adapter";
}

#define LS_RUN_FOR_EVERY_DOMAIN(Scenario)                                                       \
  INSTANTIATE_TEST_SUITE_P(Domains, Scenario, testing::Values(Domain::kBase, Domain::kAdapter), \
                           DomainName)

}  // namespace lora_serve
